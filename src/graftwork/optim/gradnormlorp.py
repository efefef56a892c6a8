"""GradNormLoRP (arXiv 2412.19616): rows are trained as magnitude times direction; the direction's gradient is projected.

W_i = g_i v_i / ||v_i|| per row i, g and ||v|| (m,). From the gradient G (m, n) of W:

    dg = <G, v> / ||v||;   dv = (g / ||v||) (G - dg v / ||v||), which is orthogonal to v row by row
    v <- v - lr c_t scale * (N projected back), N = Adam of dv in the subspace of its SVD, as in GaLore
    g <- g - lr c_t Adam(dg);   W <- g v / ||v||;   then W <- W - lr * wd * W, a decay of g: that of v changes nothing in W

v is not stored: it is W with its rows brought to length ||v||, and g is the length of W's rows. State a r + 2 b r as GaLore's,
plus 3 m: two moments of g, and ||v||, which starts as g and goes its own way.

Departures from the reference code, which keeps v in full (m n), overwrites g by ||v|| at the start of each step so that no
magnitude is learned, and does not make dv orthogonal to v: here the true gradients and the memory of the idea. The paper's
adapter on top (a low-rank part inside v) is the adapter axis' matter; its projection from both sides is `proj_type: full`.
Rows are those of the stored tensor: outputs of nn.Linear, inputs of GPT-2's Conv1D.
A row of zeros has no direction: it takes a plain projected step. A step of g across zero reverses the row once and g is its
length again.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ..registry import register
from .base import Clock, OptimizerConfig, Slots, kept_dtype
from .residuals import Dropped
from .rules import Adam
from .staged import StagedOptimizer, Stages
from .subspace import ProjType, SVDSubspace


class GradNormLoRP(OptimizerConfig):
    """Options of GradNormLoRP; those of GaLore that act on the direction."""

    rank: int = Field(128, ge=1, description="rank of the projection, cut to min(m, n)")
    update_proj_gap: int = Field(250, ge=1, description="steps between two SVDs")
    scale: float = Field(0.25, gt=0, description="factor on the update of the direction")
    proj_type: ProjType = Field("std", description="side(s) to compress; full: both, the paper's")
    eps: float = Field(1e-6, ge=0)


@register("optimizer", "gradnormlorp", config=GradNormLoRP, title="GradNormLoRP", paper="2412.19616",
          summary="rows as magnitude times direction: plain Adam on the magnitudes, GaLore on the direction",
          bibtex="@inproceedings{huang2025gradient, title={Gradient Weight-normalized Low-rank Projection for Efficient LLM "
                 "Training}, author={Huang, Jia-Hong and Shen, Yixian and Zhu, Hongyi and Rudinac, Stevan and Kanoulas, "
                 "Evangelos}, booktitle={AAAI}, year={2025}}",
          projects=True, fused_capable=True, reads="gradient")
class GradNormLoRPOptimizer(StagedOptimizer):
    """GaLore's stages, on the direction of each row."""

    @classmethod
    def build(cls, config: GradNormLoRP) -> Stages:
        return Stages(SVDSubspace(config.rank, config.update_proj_gap, config.proj_type), Adam(config.betas, config.eps),
                      Dropped(config.scale))

    @classmethod
    def slots(cls, config: GradNormLoRP, shape: tuple[int, ...], dtype: torch.dtype, role: str) -> Slots:
        slots = super().slots(config, shape, dtype, role)
        if not cls.build(config).subspace.accepts(shape, role):
            return slots
        rows = (shape[0],)
        # ||v|| changes by tiny steps, which bfloat16 would round away.
        return {**slots, "direction_norm": (rows, torch.promote_types(dtype, torch.float32)),
                "magnitude_avg": (rows, kept_dtype(dtype, config)), "magnitude_avg_sq": (rows, kept_dtype(dtype, config))}

    def _update_projected(self, group: dict[str, Any], weight: Tensor, grad: Tensor, state: dict[str, Tensor],
                          clock: Clock) -> None:
        rule = self.stages.rule
        magnitude = _row_lengths(weight)                                             # g (m,)
        if clock.step == 0:
            state["direction_norm"].copy_(magnitude)
        length = state["direction_norm"].to(weight.dtype)
        alive = (magnitude > 0) & (length > 0)
        ones = torch.ones_like(magnitude)
        ratio = torch.where(alive, magnitude / torch.where(alive, length, ones), ones)  # g / ||v||, or 1 for a row of zeros
        unit = weight / torch.where(alive, magnitude, ones)[:, None]
        along = (grad * unit).sum(dim=1)                                             # dg (m,)
        direction = weight / ratio[:, None]                                          # v (m, n)
        super()._update_projected(group, direction, ratio[:, None] * torch.addcmul(grad, unit, along[:, None], value=-1.0),
                                  state, clock)
        moments = {"exp_avg": state["magnitude_avg"], "exp_avg_sq": state["magnitude_avg_sq"]}
        step = rule.direction(along, moments) * (group["lr"] * rule.correction(clock.step))
        length = _row_lengths(direction)
        state["direction_norm"].copy_(length)
        magnitude = torch.where(alive, magnitude - step, length)
        weight.copy_(direction.mul_((magnitude / torch.where(length > 0, length, ones))[:, None]))


def _row_lengths(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=1)
