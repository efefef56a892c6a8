"""BAT: a learned affine map of every block of the weight (arXiv 2409.15371, first version, there called Bone).

    change of W[i, j] = W[i, j] D_i + D_i,   W cut into r x r blocks, D (out / r, r, r) trained, zero at start, so y is unchanged

r divides in and out. The change depends on W and can have full rank: block row i of W is multiplied from the right by one matrix.
Parameters r out. W is needed dense in each pass (a quantised base is dequantised), but nothing of its size is kept: the
backward pass builds the change again and keeps x. Work beside the frozen product: as much again, and r out in for the change.

Additive, without W, is the method `miss`. Differs from PEFT: nothing in the values; unmerging puts the kept weights back instead of
inverting I + D, which loses digits for large D.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..errors import UsageError
from ..modeling.arithmetic import linear, product_dtype
from ..registry import register
from ._row_loop import RowLoop
from .base import AdapterConfig, pattern_value


class BAT(AdapterConfig):
    """Options of `bat`."""

    r: int = Field(64, ge=1, description="side of a block")
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    rank_pattern: dict[str, int] = {}


def blocks_of(W: Tensor, r: int) -> Tensor:
    """(out, in) as (out / r, r, in / r, r)."""
    return W.reshape(W.shape[0] // r, r, W.shape[1] // r, r)


def affine_change(W: Tensor, D: Tensor) -> Tensor:
    """W[i, j] D_i + D_i for all blocks, (out, in) in D's dtype."""
    blocks = blocks_of(W.to(D.dtype), D.shape[-1])
    rows = blocks.flatten(1, 2) @ D  # (out / r, r in / r, r): block rows, each times its matrix
    return (rows.view(blocks.shape) + D.unsqueeze(2)).reshape(W.shape)


def few_rows(x: Tensor, W: Tensor, D: Tensor) -> Tensor:
    """The same product for a few rows x (T, in), T < r: every shard of x is taken through every D_i, and the change, which costs
    r times as much as the product of one row, is not made. (T, out)"""
    o, r, _ = D.shape
    shards = x.view(x.shape[0], x.shape[1] // r, r).permute(2, 1, 0)  # (r, in / r, T)
    moved = (D.reshape(o * r, r) @ shards.flatten(1)).view(o, r, *shards.shape[1:])  # D_i x_j: (out / r, r, in / r, T)
    y = W.to(x.dtype).view(o, r, x.shape[1]) @ moved.transpose(1, 2).flatten(1, 2) + moved.sum(2)
    return y.flatten(0, 1).T


class _Affine(torch.autograd.Function):
    """linear(x, affine_change(W, D)) for x (T, in); keeps x and D, and asks for W again."""

    @staticmethod
    def forward(ctx, x: Tensor, D: Tensor, base) -> Tensor:
        ctx.save_for_backward(x, D)
        ctx.base = base
        return linear(x, affine_change(base.weight(), D).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, D = ctx.saved_tensors
        W = ctx.base.weight()
        dx = linear(grad, affine_change(W, D).to(grad.dtype).T) if ctx.needs_input_grad[0] else None
        dD = None
        if ctx.needs_input_grad[1]:
            G = blocks_of((grad.T @ x).to(D.dtype), D.shape[-1])
            W = blocks_of(W.to(D.dtype), D.shape[-1])
            dD = W.flatten(1, 2).transpose(1, 2) @ G.flatten(1, 2) + G.sum(2)
        return dx, dD, None


@register("adapter", "bat", config=BAT, title="Bone: Block-Affine Adaptation of Large Language Models", paper="2409.15371",
          summary="every r x r block of W gets W D + D, one D a block row; full-rank, no factors",
          bibtex="@misc{kang2024bone, title={Bone: Block-Affine Adaptation of Large Language Models}, author={Kang, Jiale}, "
                 "eprint={2409.15371v1}, archivePrefix={arXiv}, year={2024}}")
class BATAdapter(RowLoop):
    random_start = False

    def __init__(self, site, config, *, shared, generator):
        super().__init__(site, config, shared=shared, generator=generator)
        self.r, self.dropout = pattern_value(config.rank_pattern, site.name, config.r), config.dropout
        if site.in_features % self.r or site.out_features % self.r:
            raise UsageError(f"bat: blocks of side r={self.r} do not tile '{site.name}' ({site.out_features} x {site.in_features})",
                             remedy="choose r that divides both sizes (rank_pattern sets it for single sites), or use miss")
        self.bat_D = nn.Parameter(torch.zeros(site.out_features // self.r, self.r, self.r))

    @classmethod
    def parameter_count(cls, site, config):
        return pattern_value(config.rank_pattern, site.name, config.r) * site.out_features

    def delta_weight(self, base):
        return affine_change(base.weight(), self.bat_D.float())

    def change(self, x, base):
        wide = x.reshape(-1, self.in_features).to(product_dtype(x.dtype, x.device))
        if not torch.is_grad_enabled() and wide.shape[0] * 4 <= self.r:
            change = few_rows(wide, base.weight(), self.bat_D.to(wide.dtype))
        elif base.frozen.frozen:
            change = _Affine.apply(wide, self.bat_D, base)
        else:  # the weight is trained too, and the change depends on it
            change = linear(wide, affine_change(base.weight(), self.bat_D).to(wide.dtype))
        return change.to(x.dtype).view(*x.shape[:-1], self.out_features)
