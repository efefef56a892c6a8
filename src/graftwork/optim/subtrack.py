"""SubTrack++ (Rajabi et al., NeurIPS 2025): GaLore whose subspace follows the gradient along a geodesic, without a new SVD.

For m < n (a tall matrix is treated as its transpose, hence equally): S (m, r) from the SVD of the first gradient, then every
`update_proj_gap` steps one turn of S, in the plane where the projection error falls fastest:

    A = S^T G,  E = G - S A,  F = -2 (I - S S^T) E A^T (m, r) = ... + s u v^T,  the top singular triple of F
    S' = (S v cos(s step) - u sin(s step)) v^T + S (I - v v^T)

    C = S'^T S:   M <- C M,   V <- |(C*C)(V - M*M) + (C M)*(C M)|   (variance about a rotated mean)

and the update is Fira's: W <- W - lr c_t (scale S' N + limited(||N_j|| / ||R_j|| (G - S' R)));  then W <- W - lr wd W.

State a r + 2 b r and one norm: turning the moments at the refresh itself needs no older S. S is kept in float32 at least,
since the errors of each turn add up. Departures from the reference code: there the subspace of a tall matrix never moves (it
subtracts S S^T on the wrong side), and moments are always turned from the first basis; both follow the equations here. The
angle s step is cut to a right angle: s grows with the square of the gradient, and beyond it the turn would go back.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from ..registry import register
from .base import Clock, OptimizerConfig, Slots
from .residuals import ScaledRemainder
from .rules import Adam, Moments
from .staged import StagedOptimizer, Stages
from .subspace import SVDSubspace


class TrackedSubspace(SVDSubspace):
    """The first gradient's top singular vectors, then one geodesic step at each refresh."""

    def __init__(self, rank: int, gap: int, tracking_step: float):
        super().__init__(rank, gap)
        self.tracking_step = tracking_step

    def slots(self, shape: tuple[int, ...], dtype: torch.dtype) -> Slots:
        return self._basis_slots(shape, torch.promote_types(dtype, torch.float32))

    def refresh(self, grad: Tensor, state: dict[str, Tensor], clock: Clock) -> None:
        if clock.step == 0:
            super().refresh(grad, state, clock)
            return
        left, right = self.basis(grad, state, clock)
        kept = state["projection_left" if right is None else "projection_right"]
        kept.copy_(turned(left.T, grad, self.tracking_step).T if right is None else turned(right.T, grad.T, self.tracking_step).T)


def turned(s: Tensor, grad: Tensor, step: float) -> Tensor:
    """S' (m, r) from S (m, r) and G (m, n)."""
    a = s.T @ grad
    tangent = (s @ a - grad).mul_(2.0) @ a.T
    tangent = tangent - s @ (s.T @ tangent)
    u, sigma, vh = torch.linalg.svd(tangent, full_matrices=False)
    u, v = u[:, :1], vh[:1].T
    angle = (sigma[0] * step).clamp(max=math.pi / 2)
    along = s @ v
    return s + (along * (torch.cos(angle) - 1.0) - u * torch.sin(angle)) @ v.T


class TurnedAdam(Adam):
    """Adam whose second moment turns as a variance about the turned mean."""

    def change_basis(self, state: dict[str, Tensor], moments: Moments, maps: tuple[Tensor | None, Tensor | None] | None) -> None:
        left, right = maps  # L = S^T S' = C^T or the same on the right
        m, v = (state[name].to((right if left is None else left).dtype) for name in self.names)
        turn = (lambda x, power: x @ right ** power) if left is None else (lambda x, power: (left ** power).T @ x)
        mean = turn(m, 1)
        state["exp_avg_sq"].copy_((turn(v - m * m, 2) + mean * mean).abs_())
        state["exp_avg"].copy_(mean)


class SubTrack(OptimizerConfig):
    """Options of SubTrack++."""

    rank: int = Field(128, ge=1, description="rank of the subspace, cut to min(m, n)")
    update_proj_gap: int = Field(200, ge=1, description="steps between two turns of the subspace")
    scale: float = Field(0.25, gt=0, description="factor on the part inside the subspace")
    tracking_step: float = Field(10.0, gt=0, description="angle of a turn is this times the tangent's norm, at most a right angle")
    growth_limit: float | None = Field(1.01, ge=1, description="largest growth a step of the norm of the rest; null: no limit")
    eps: float = Field(1e-6, ge=0)


@register("optimizer", "subtrack", config=SubTrack, title="SubTrack++",
          summary="Adam in a subspace that turns toward the gradient along a geodesic; the rest rescaled as in Fira",
          bibtex="@inproceedings{rajabi2025subtrack, title={SubTrack++: Gradient Subspace Tracking for Scalable LLM Training}, "
                 "author={Rajabi, Sahar and Nonta, Nayeema and Rambhatla, Sirisha}, booktitle={NeurIPS}, year={2025}}",
          projects=True, fused_capable=True, reads="gradient")
class SubTrackOptimizer(StagedOptimizer):
    """Tracked subspace, Adam with turned moments, remainder scaled and limited."""

    @classmethod
    def build(cls, config: SubTrack) -> Stages:
        return Stages(TrackedSubspace(config.rank, config.update_proj_gap, config.tracking_step),
                      TurnedAdam(config.betas, config.eps), ScaledRemainder(config.scale, growth=config.growth_limit), "rotate")
