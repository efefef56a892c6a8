"""FLoRA: a multiplicative low-rank change, so that every row of a batch may have its own (arXiv 2312.05677).

    y = sum_j a_j * (W (b_j * x)) + bias,   j = 1..r,   b_j (in,), a_j (out,) trained, W (out, in) frozen
    which is y = (W * M) x + bias with the mask M = sum_j a_j b_j^T (out, in), * element-wise

W is used only through its product: one product on r-fold rows, whatever the storage and however many adapters the
rows belong to. Rank 1 costs two element-wise products per site and no product of its own. Parameters r (in + out).

Start: component 1 is a = b = 1; components 2..r have b ~ N(0, 0.01), a = 0. So M = 1 and y is unchanged, and no two components
get the same gradient (all-ones factors would stay equal for ever and act as rank 1). Components are summed.

Kept and applied as difference from one: `flora_A[0]`, `flora_B[0]` hold a_1 - 1 and b_1 - 1, and b_1 * x is computed as
x + (b_1 - 1) * x. Cast to bf16, a factor just above one is rounded in steps of 0.8 %, the same way for every token, and
1.003 is one; here only the sum is rounded. Weight decay pulls towards the base, not towards zero.

Differs from the paper: the paper gives no start and a reduction "such as mean"; a sum differs by a factor in a. The change
has no scale and cannot be added to other grafts at one site; rows of one batch may choose it.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from ..registry import register
from .base import Adapter, AdapterConfig, Bank

#: standard deviation of b_2..b_r at the start
SPREAD = 0.1


class FLoRA(AdapterConfig):
    """Options of `flora`."""

    r: int = Field(1, ge=1)


def spread(x: Tensor, B: Tensor) -> Tensor:
    """The inputs b_j * x of all components: x (..., in), B (r, ..., in) broadcasting to x -> (r, ..., in)."""
    first = torch.addcmul(x, x, B[0]).unsqueeze(0)
    return first if B.shape[0] == 1 else torch.cat([first, x.unsqueeze(0) * B[1:]])


def gather(z: Tensor, A: Tensor, bias: Tensor | None = None) -> Tensor:
    """sum_j a_j * z_j (+ bias): z (r, ..., out), A (r, ..., out) broadcasting to z -> (..., out)."""
    y = torch.addcmul(z[0], z[0], A[0]) if A.shape[0] == 1 else z[0] + (z * A).sum(0)
    return y if bias is None else y + bias.to(y.dtype)


@register("adapter", "flora", config=FLoRA, title="FLoRA: Batched Low-Rank Adaptation of Foundation Models", paper="2312.05677",
          summary="element-wise rank-r mask on W, applied by scaling inputs and outputs of one shared product",
          bibtex="@inproceedings{wen2024flora, title={Batched Low-Rank Adaptation of Foundation Models}, author={Wen, Yeming and "
                 "Chaudhuri, Swarat}, booktitle={ICLR}, year={2024}}")
class FLoRAAdapter(Adapter):
    multiplicative = True

    def __init__(self, site, config, *, shared, generator):
        super().__init__(site, config, shared=shared, generator=generator)
        self.r = config.r
        start = torch.randn(self.r, site.in_features, generator=generator) * SPREAD
        start[0] = 0.0
        self.flora_B = nn.Parameter(start)
        self.flora_A = nn.Parameter(torch.zeros(self.r, site.out_features))

    @classmethod
    def parameter_count(cls, site, config):
        return config.r * (site.in_features + site.out_features)

    def mask_change(self) -> Tensor:
        """M - 1 (out, in), fp32; exactly zero at the start."""
        A, B = self.flora_A, self.flora_B
        return A.T @ B + A[0][:, None] + B[0][None, :]

    def delta_weight(self, base):
        return base.weight().float() * self.mask_change().float()

    def forward(self, x, base):
        shape = (self.r,) + (1,) * (x.dim() - 1) + (-1,)
        inputs = spread(x, self.flora_B.to(x.dtype).view(shape))
        return gather(base.product(inputs), self.flora_A.to(x.dtype).view(shape), base.bias)

    def delta(self, x, base):
        return self.forward(x, base) - base(x)

    # -- many rows ---------------------------------------------------------------------------------------------------
    @classmethod
    def stack(cls, adapters, dtype):
        """Bank with A (K, r, out) and B (K, r, in); ranks padded with zeros, which add nothing."""
        rank = max(a.r for a in adapters)

        def padded(factor: Tensor) -> Tensor:
            return torch.nn.functional.pad(factor, (0, 0, 0, rank - factor.shape[0]))

        return Bank(torch.stack([padded(a.flora_A) for a in adapters]).to(dtype),
                    torch.stack([padded(a.flora_B) for a in adapters]).to(dtype), key=adapters[0].site_name)

    @staticmethod
    def _by_row(bank: Tensor, index: Tensor, dims: int) -> Tensor:
        """(K, r, n) -> (r, N, 1.., n), broadcasting to a tensor of `dims` dimensions with N rows."""
        chosen = bank.index_select(0, index).transpose(0, 1)
        return chosen.view(chosen.shape[:2] + (1,) * (dims - 2) + chosen.shape[2:]) if dims > 2 else chosen

    @classmethod
    def rows_inputs(cls, bank, index, x):
        return spread(x, cls._by_row(bank.B, index, x.dim())).flatten(0, 1)

    @classmethod
    def rows_combine(cls, bank, index, z, x, base):
        A = cls._by_row(bank.A, index, z.dim())
        return gather(z.unflatten(0, A.shape[:2]), A)

    @classmethod
    def forward_rows(cls, bank, index, x, base):
        z = base.product(cls.rows_inputs(bank, index, x))
        y = cls.rows_combine(bank, index, z, x, base)
        return (y if base.bias is None else y + base.bias.to(y.dtype)) - base(x)
