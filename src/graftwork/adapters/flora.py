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

from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, nn

from ..registry import register
from .base import Adapter, AdapterConfig
from .batched import KeepsRows, numbers_of

#: standard deviation of b_2..b_r at the start
SPREAD = 0.1


class FLoRA(AdapterConfig):
    """Options of `flora`."""

    r: int = Field(1, ge=1)


def spread(x: Tensor, B: Tensor) -> Tensor:
    """The inputs b_j * x of all components: x (..., in), B (r, ..., in) broadcasting to x -> (r, ..., in)."""
    if B.shape[0] == 1:
        return torch.addcmul(x, x, B[0]).unsqueeze(0)
    if torch.is_grad_enabled() and (x.requires_grad or B.requires_grad):
        return torch.cat([torch.addcmul(x, x, B[0]).unsqueeze(0), x.unsqueeze(0) * B[1:]])
    inputs = x.new_empty(B.shape[0], *x.shape)  # written in place: up to twice as fast for many tokens
    torch.addcmul(x, x, B[0], out=inputs[0])
    torch.mul(x, B[1:], out=inputs[1:])
    return inputs


def gather(z: Tensor, A: Tensor, bias: Tensor | None = None) -> Tensor:
    """sum_j a_j * z_j (+ bias): z (r, ..., out), A (r, ..., out) broadcasting to z -> (..., out)."""
    y = torch.addcmul(z[0], z[0], A[0])
    for part, factor in zip(z[1:], A[1:]):  # one pass each and no (r, ..., out) between: two to three times as fast as a sum
        y.addcmul_(part, factor)
    return y if bias is None else y + bias.to(y.dtype)


@dataclass
class MaskBank(KeepsRows):
    """K adapters of one site: A (K, r, out) and B (K, r, in), r the largest of `ranks`, padded with zeros, which add nothing."""

    A: Tensor
    B: Tensor
    ranks: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.A.untyped_storage().nbytes() + self.B.untyped_storage().nbytes()


def _ragged(bank: MaskBank, index: Tensor) -> list[Tensor] | None:
    """The rows that have each component, where not all have all: a padded one would cost a product. None where they do (and for
    an index without values)."""
    numbers = bank.made_of(index, numbers_of)
    ranks = [bank.ranks[k] for k in numbers or ()]
    if not ranks or min(ranks) == max(bank.ranks):
        return None
    return [torch.tensor([n for n, r in enumerate(ranks) if r > j], device=index.device) for j in range(max(ranks))]


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
        rank = max(a.r for a in adapters)

        def padded(factor: Tensor) -> Tensor:
            return torch.nn.functional.pad(factor, (0, 0, 0, rank - factor.shape[0]))

        return MaskBank(torch.stack([padded(a.flora_A) for a in adapters]).to(dtype),
                        torch.stack([padded(a.flora_B) for a in adapters]).to(dtype), tuple(a.r for a in adapters))

    @staticmethod
    def _by_row(bank: Tensor, index: Tensor, dims: int) -> Tensor:
        """(K, r, n) -> (r, N, 1.., n), broadcasting to a tensor of `dims` dimensions with N rows."""
        chosen = bank.index_select(0, index).transpose(0, 1)
        return chosen.view(chosen.shape[:2] + (1,) * (dims - 2) + chosen.shape[2:]) if dims > 2 else chosen

    @classmethod
    def rows_inputs(cls, bank, index, x):
        parts = bank.made_of(index, _ragged)
        if parts is None:
            return spread(x, cls._by_row(bank.B, index, x.dim())).flatten(0, 1)
        inputs = [spread(x, cls._by_row(bank.B[:, :1], index, x.dim()))[0]]
        for j, rows in enumerate(parts[1:], 1):
            inputs.append(x.index_select(0, rows) * cls._by_row(bank.B[:, j: j + 1], index.index_select(0, rows), x.dim())[0])
        return torch.cat(inputs)

    @classmethod
    def rows_combine(cls, bank, index, z, x, base):
        parts = bank.made_of(index, _ragged)
        if parts is None:
            A = cls._by_row(bank.A, index, z.dim())
            return gather(z.unflatten(0, A.shape[:2]), A)
        first, *others = z.split([rows.shape[0] for rows in parts])
        y = gather(first.unsqueeze(0), cls._by_row(bank.A[:, :1], index, z.dim()))
        for j, (rows, own) in enumerate(zip(parts[1:], others), 1):
            y.index_add_(0, rows, own * cls._by_row(bank.A[:, j: j + 1], index.index_select(0, rows), z.dim())[0])
        return y

    @classmethod
    def forward_rows(cls, bank, index, x, base):
        z = base.product(cls.rows_inputs(bank, index, x))
        y = cls.rows_combine(bank, index, z, x, base)
        return (y if base.bias is None else y + base.bias.to(y.dtype)) - base(x)
