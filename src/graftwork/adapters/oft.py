"""OFT: the input of a map is rotated, block by block (arXiv 2306.07280; on the input's side as in OFTv2, 2506.19847).

    y = W (R^T x) + b,   W (out, in) frozen,  R = diag(R_1 .. R_k),  k = in / block_size
    R_i = (I + Q_i) (I - Q_i)^-1,   Q_i skew (block_size, block_size), its upper triangle trained, zero at the start

R is orthogonal, so the angles between the rows of W and their lengths stay as they are. `neumann_terms` replaces the inverse by the
first terms of its series, (I + Q)(I + Q + .. + Q^(terms - 2)): cheaper and slightly off orthogonal. With block_share all blocks
are one. The rotation comes before the product, so W is multiplied once in any storage, and the rows of a batch may be rotated
differently. Parameters k block_size (block_size - 1) / 2; with block_share a k-th of it.

Kept as Q and applied as x + (R^T - I) x with R - I = 2 Q (I - Q)^-1 in fp32, since a rotation by a small angle has entries just below
one, which bf16 rounds to one. Without gradients R is built once per value of Q.

Differs from the paper: the paper rotates the outputs (R W); rotating the inputs is what peft does, and W stays behind its product. peft
takes (I - Q)(I + Q)^-1 when it solves exactly, the inverse rotation of its own series: same function class, other sign of Q. No
constraint on the angle (COFT), no block dropout. A block size that does not divide the map is refused instead of changed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, nn

from ..errors import UsageError
from ..modeling.arithmetic import product_dtype
from ..modeling.protocols import has_values
from ..registry import register
from .base import Adapter, AdapterConfig, pattern_value


class OFT(AdapterConfig):
    """Options of `oft`."""

    block_size: int = Field(32, ge=2)
    block_size_pattern: dict[str, int] = {}
    block_share: bool = Field(False, description="one rotation for all blocks of a map")
    neumann_terms: int | None = Field(None, ge=4, description="terms of the series; default: the exact inverse")


@dataclass
class RotationBank:
    """K adapters of one site: R - I of each, (K, k, size, size), or (K, 1, in, in) where their block sizes differ."""

    turns: Tensor

    @property
    def nbytes(self) -> int:
        return self.turns.untyped_storage().nbytes()


def skew(upper: Tensor, size: int) -> Tensor:
    """Skew matrices (k, size, size) from their upper triangles (k, size (size - 1) / 2), row by row."""
    rows, columns = torch.triu_indices(size, size, 1, device=upper.device)
    flat = upper.new_zeros(upper.shape[0], size * size).index_copy(1, rows * size + columns, upper)
    matrix = flat.view(-1, size, size)
    return matrix - matrix.transpose(1, 2)


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """R^T x = x + (R - I)^T x: x (N, T, in), turns R - I of every row (N, k, size, size) or of all (k, size, size)."""
    dtype = product_dtype(x.dtype, x.device)
    blocks = x.to(dtype).unflatten(-1, (turns.shape[-3], -1))
    turned = torch.einsum("...tkc,...kcd->...tkd", blocks, turns.to(dtype))
    return x + turned.flatten(-2).to(x.dtype)


@register("adapter", "oft", config=OFT, paper="2306.07280",
          title="Controlling Text-to-Image Diffusion by Orthogonal Finetuning",
          summary="orthogonal rotation of each block of inputs; keeps the angles between the rows of W",
          bibtex="@inproceedings{qiu2023oft, title={Controlling Text-to-Image Diffusion by Orthogonal Finetuning}, author={Qiu, Zeju "
                 "and Liu, Weiyang and Feng, Haiwen and Xue, Yuxuan and Feng, Yao and Liu, Zhen and Zhang, Dan and Weller, Adrian "
                 "and Sch{\\\"o}lkopf, Bernhard}, booktitle={NeurIPS}, year={2023}}")
class OFTAdapter(Adapter):
    multiplicative = True
    random_start = False

    def __init__(self, site, config, *, shared, generator):
        super().__init__(site, config, shared=shared, generator=generator)
        self.size, self.terms = pattern_value(config.block_size_pattern, site.name, config.block_size), config.neumann_terms
        if site.in_features % self.size:
            near = min((d for d in range(2, site.in_features + 1) if site.in_features % d == 0), key=lambda d: abs(d - self.size))
            raise UsageError(f"oft: blocks of {self.size} do not divide the {site.in_features} inputs of '{site.name}'",
                             remedy=f"block_size={near}, or {near} for this site alone with block_size_pattern")
        self.blocks = site.in_features // self.size
        self.upper = nn.Parameter(torch.zeros(1 if config.block_share else self.blocks, self.size * (self.size - 1) // 2))
        self._kept: tuple | None = None

    @classmethod
    def parameter_count(cls, site, config):
        size = pattern_value(config.block_size_pattern, site.name, config.block_size)
        return (1 if config.block_share else site.in_features // size) * (size * (size - 1) // 2)

    # -- built -------------------------------------------------------------------------------------------------------
    def turns(self) -> Tensor:
        """R - I of all blocks, fp32 (k, size, size); anew while gradients are wanted."""
        if (torch.is_grad_enabled() and self.upper.requires_grad) or not has_values(self.upper):
            self._kept = None
            return self._turns()
        state = (torch.is_inference_mode_enabled(), id(self.upper), self.upper._version, self.upper.device)
        if self._kept is None or self._kept[0] != state:
            self._kept = (state, self._turns())
        return self._kept[1]

    def _turns(self) -> Tensor:
        Q = skew(self.upper, self.size)
        if self.terms is None:
            identity = torch.eye(self.size, device=Q.device, dtype=Q.dtype)
            turns = torch.linalg.solve(identity - Q, 2.0 * Q)  # the factors commute
        else:
            power, turns = Q, 2.0 * Q
            for _ in range(2, self.terms - 1):
                power = power @ Q
                turns = turns + 2.0 * power
            turns = turns + power @ Q
        return turns.expand(self.blocks, -1, -1)

    def delta_weight(self, base):
        blocks = base.weight().float().unflatten(1, (self.blocks, self.size))  # W R^T - W, block by block
        return torch.einsum("okd,kcd->okc", blocks, self.turns().float()).flatten(1)

    # -- applied -----------------------------------------------------------------------------------------------------
    def forward(self, x, base):
        y = base.product(rotate(x.unsqueeze(0) if x.dim() == 1 else x, self.turns()).view(x.shape))
        return y if base.bias is None else y + base.bias.to(y.dtype)

    def delta(self, x, base):
        return self.forward(x, base) - base(x)

    # -- many rows ---------------------------------------------------------------------------------------------------
    @classmethod
    def stack(cls, adapters, dtype):
        turns = [a.turns() for a in adapters]
        if len({t.shape for t in turns}) > 1:
            turns = [torch.block_diag(*t).unsqueeze(0) for t in turns]
        return RotationBank(torch.stack(turns).to(product_dtype(dtype, turns[0].device)))

    @classmethod
    def rows_inputs(cls, bank, index, x):
        shape = x.shape
        return rotate(x.reshape(shape[0], shape[1:-1].numel(), shape[-1]), bank.turns.index_select(0, index)).view(shape)

    @classmethod
    def rows_combine(cls, bank, index, z, x, base):
        return z

    @classmethod
    def forward_rows(cls, bank, index, x, base):
        y = base.product(cls.rows_inputs(bank, index, x))
        return (y if base.bias is None else y + base.bias.to(y.dtype)) - base(x)
