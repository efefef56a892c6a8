"""SpIEL: a sparse change of single weights, anywhere in the matrix (arXiv 2401.16405).

    y = W x + b + D x,   D (out, in) zero but for D.flatten()[phi] = delta
    phi (k,) int32 distinct positions, stored; delta (k,) trained, zero at the start; k = density * out * in, one at least

Only delta, its gradient and its optimizer state have k values: memory does not depend on which weights they are. In the backward
pass the dense gradient G = g^T x of one site exists for a moment, is read at phi and freed; `selection: spiel` looks at it there
to drop and grow positions. Without the selection the positions stay those of the start. Any optimizer works; weight decay pulls
delta to zero, so the weight to the base. Parameters k.

Start: one position drawn in each of k equal stretches of the flattened matrix, so that drawing costs k numbers and not out * in.

Differs from the paper: D is a product of its own instead of a copy of W with k entries changed, so that delta is not rounded to
the spacing of a 16-bit or 4-bit W; it costs a dense product more, in training and before merging. In a batch of several grafts
this product is made once for each graft over all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, nn

from ..errors import UsageError
from ..modeling.arithmetic import linear, product_dtype
from ..registry import register
from .base import Adapter, AdapterConfig, as_rows


class SpIEL(AdapterConfig):
    """Options of `spiel`."""

    density: float = Field(0.01, gt=0.0, le=0.5, description="share of each site's weights that is trained")


def scattered(values: Tensor, positions: Tensor, shape: tuple[int, int]) -> Tensor:
    """D (out, in) in the dtype of the values."""
    flat = torch.zeros(shape[0] * shape[1], dtype=values.dtype, device=values.device)
    return flat.index_copy(0, positions.long(), values).view(shape)


class _SparseChange(torch.autograd.Function):
    """D x; keeps x, delta and phi, never D or G."""

    @staticmethod
    def forward(ctx, x, values, positions, adapter):
        ctx.save_for_backward(x, values, positions)
        ctx.adapter, ctx.shape = adapter, (adapter.out_features, adapter.in_features)
        return linear(x, scattered(values, positions, ctx.shape).to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        x, values, positions = ctx.saved_tensors
        g, rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        dx = dv = None
        if ctx.needs_input_grad[0]:
            dense = scattered(values, positions, ctx.shape).to(x.dtype)
            dx = linear(g, dense.T).reshape(x.shape)
        if ctx.needs_input_grad[1]:
            kind = product_dtype(g.dtype, g.device)
            G = (g.to(kind).T @ rows.to(kind)).to(values.dtype)
            dv = G.flatten().index_select(0, positions.long())
            if ctx.adapter.watch is not None:
                ctx.adapter.watch(G)
        return dx, dv, None, None


@dataclass
class SparseBank:
    """K adapters of one site. They keep their positions and values, since a dense stack would be K matrices."""

    adapters: list[SpIELAdapter]

    @property
    def nbytes(self) -> int:
        return 0


@register("adapter", "spiel", config=SpIEL, title="SpIEL: Scaling Sparse Fine-Tuning to Large Language Models",
          paper="2401.16405", summary="trains single weights anywhere in the matrix; a selection may move them",
          bibtex="@article{ansell2024scaling, title={Scaling Sparse Fine-Tuning to Large Language Models}, author={Ansell, Alan "
                 "and Vuli{\\'c}, Ivan and Sterz, Hannah and Korhonen, Anna and Ponti, Edoardo M.}, journal={arXiv preprint "
                 "arXiv:2401.16405}, year={2024}}")
class SpIELAdapter(Adapter):
    moves = ("positions",)

    def __init__(self, site, config, *, shared, generator):
        super().__init__(site, config, shared=shared, generator=generator)
        total, k = site.out_features * site.in_features, self.parameter_count(site, config)
        if total >= 2**31:
            raise UsageError(f"spiel: '{site.name}' has {total:,} weights, more than int32 positions can name",
                             remedy="leave it out with exclude_modules")
        starts = torch.arange(k + 1, dtype=torch.int64) * total // k
        inside = torch.rand(k, generator=generator, dtype=torch.float64) * (starts[1:] - starts[:-1])
        self.positions = nn.Parameter((starts[:-1] + inside.long()).to(torch.int32), requires_grad=False)
        self.values = nn.Parameter(torch.zeros(k))
        self.watch: Callable[[Tensor], None] | None = None  # sees the dense gradient (out, in) of each backward pass

    @classmethod
    def parameter_count(cls, site, config):
        return max(1, int(config.density * site.out_features * site.in_features))

    def delta_weight(self, base):
        return scattered(self.values.float(), self.positions, (self.out_features, self.in_features))

    def delta(self, x, base):
        return _SparseChange.apply(x, self.values, self.positions, self)

    # -- many rows ---------------------------------------------------------------------------------------------------
    @classmethod
    def stack(cls, adapters, dtype):
        return SparseBank(list(adapters))

    @classmethod
    def forward_rows(cls, bank, index, x, base):
        rows, change = as_rows(x), None
        for number, adapter in enumerate(bank.adapters):
            own = rows if len(bank.adapters) == 1 else rows * (index == number).to(x.dtype).view(-1, 1, 1)
            part = adapter.delta(own, base)
            change = part if change is None else change + part
        return change.reshape(*x.shape[:-1], change.shape[-1])
