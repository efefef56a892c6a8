"""Natural GaLore (arXiv 2410.16029): the projected gradient is multiplied by the inverse of a damped Fisher matrix first.

R = G Q^T or P^T G as in GaLore, b r numbers, g = vec(R); H = [g_t, ..., g_{t-s+1}] the last s of them, the current one included:

    F = damping I + H H^T,   g' = F^-1 g,   W <- W - lr * scale * (Adam(g') projected back);   then W <- W - lr * wd * W

The paper gets F^-1 g by Woodbury's identity, as g / d - H (I + H^T H / d)^-1 H^T g / d^2, with d the damping. Since g is the
column e of H, this equals H (d I + H^T H)^-1 e, without the difference of two nearly equal vectors that costs all digits of
float32 when ||g||^2 >> d. So that is what is computed; the s x s algebra in float64.

State a r + 2 b r + s b r: the history weighs more than Adam's moments (with s = 20, more than plain AdamW's from r = a / 11 on).
`proj_type: full` projects from both sides (the reference code does, its paper does not): (m + n) r + (2 + s) r^2.
Departures from the reference code: gradients of an older basis are not mixed with new ones: a refresh empties the history, or
takes it along with `moments: rotate`. No online tracking of the factors instead of the SVD.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ..registry import register
from .base import OptimizerConfig, Slots
from .residuals import Dropped
from .rules import Adam, Moments
from .staged import StagedOptimizer, Stages
from .subspace import ProjType, SVDSubspace

_CHUNK = 65536  # history entries turned to float64 at a time


class FisherTransform:
    """g' = (damping I + H H^T)^-1 g over a ring of the last `history` projected gradients. An empty place is a zero column."""

    def __init__(self, history: int, damping: float):
        self.history, self.damping = history, damping

    def slots(self, shape: tuple[int, ...], dtype: torch.dtype) -> Slots:
        return {"history": ((self.history, *shape), dtype)}

    def apply(self, low: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        ring, place = state["history"], (step - 1) % self.history
        ring[place].copy_(low)
        columns = ring.flatten(1)                                                  # H^T (s, k)
        gram = torch.zeros((self.history, self.history), dtype=torch.float64, device=low.device)
        for part in columns.split(_CHUNK, dim=1):
            wide = part.to(torch.float64)
            gram.addmm_(wide, wide.T)
        gram.diagonal().add_(self.damping)
        current = torch.zeros((self.history, 1), dtype=torch.float64, device=low.device)
        current[place] = 1.0
        weights = torch.linalg.solve(gram, current).to(low.dtype)                  # (s, 1)
        return torch.mm(columns.to(low.dtype).T, weights).reshape(low.shape)

    def restart(self, state: dict[str, Tensor], maps: tuple[Tensor | None, Tensor | None] | None) -> None:
        ring = state["history"]
        if maps is None:
            ring.zero_()
            return
        left, right = maps
        moved = ring if left is None else left.T @ ring.to(left.dtype)
        ring.copy_(moved if right is None else moved.to(right.dtype) @ right)


class NaturalGaLore(OptimizerConfig):
    """Options of Natural GaLore: GaLore's, and the two of the Fisher matrix."""

    rank: int = Field(128, ge=1, description="rank of the projection, cut to min(m, n)")
    update_proj_gap: int = Field(200, ge=1, description="steps between two SVDs")
    scale: float = Field(0.25, gt=0, description="factor on the update of projected weights")
    history: int = Field(20, ge=1, description="projected gradients in the Fisher matrix; all are kept")
    damping: float = Field(1e-3, gt=0, description="added to the diagonal of the Fisher matrix")
    proj_type: ProjType = Field("std", description="side(s) to compress; full: the reference code's")
    svd: Literal["exact", "randomized"] = "exact"
    moments: Moments = Field("keep", description="the moments at a refresh: keep (as published), reset, rotate")
    eps: float = Field(1e-6, ge=0)
    seed: int = Field(0, ge=0, description="of the randomized SVD")


@register("optimizer", "natural_galore", config=NaturalGaLore, title="Natural GaLore", paper="2410.16029",
          summary="GaLore whose projected gradient is preconditioned by a damped Fisher matrix of its last s values",
          bibtex="@article{das2024natural, title={Natural GaLore: Accelerating GaLore for memory-efficient LLM Training and "
                 "Fine-tuning}, author={Das, Arijit}, journal={arXiv:2410.16029}, year={2024}}",
          projects=True, fused_capable=True, reads="gradient")
class NaturalGaLoreOptimizer(StagedOptimizer):
    """SVD subspace, inverse Fisher, Adam, residual dropped."""

    @classmethod
    def build(cls, config: NaturalGaLore) -> Stages:
        return Stages(SVDSubspace(config.rank, config.update_proj_gap, config.proj_type, randomized=config.svd == "randomized"),
                      Adam(config.betas, config.eps), Dropped(config.scale), config.moments,
                      transform=FisherTransform(config.history, config.damping))
