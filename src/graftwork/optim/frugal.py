"""FRUGAL (arXiv 2411.07837): Adam on a small part of the gradient that changes often, signSGD, without state, on all the rest.

Every `update_proj_gap` steps a new part is chosen; R is G's view of it, R' that view put back into (m, n), E = G - R':

    columns:  k = floor(density n) random columns of G,  R (m, k)
    svd:      r = round(density a) top singular directions of the smaller side a = min(m, n), as GaLore (b = max(m, n))
    random:   r = round(density a) random orthonormal directions of that side

    W <- (1 - lr wd) W;   N = bias-corrected Adam of R, eps inside as in torch;   W <- W - lr (scale N' + scale free_scale F(E))

F is the sign (each entry moves by lr, as under Adam), the identity (sgd) or zero (none). State 2 m k and a seed for columns,
a r + 2 b r for the others; density 0 is signSGD without moments, density 1 with columns is AdamW. The moments, and the
bias correction with them, start again with each new part (`moments: keep` goes on with those of the old one).
`{subspace: svd, moments: keep, state_free: none}` is GaLore with decay first and eps after the bias correction.

Departures from the reference code: the clock is each parameter's own (there the first parameter of a group decides for all);
columns are drawn from a saved seed at each step and not stored. Its choice of single entries (two index tensors outweigh
the moments they save) and of whole tensors (a layer selection's task) is not offered.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field
from torch import Tensor

from ..registry import register
from .base import OptimizerConfig
from .residuals import FullUpdate, SumUpdate, Update, projected_back
from .rules import Adam, adamw_any_
from .sampled import ColumnSubspace, OrthogonalSubspace
from .staged import StagedOptimizer, Stages
from .subspace import Basis, SVDSubspace, remainder


class CorrectedAdam(Adam):
    """Adam whose N holds its bias correction, since the state-free part of the update must not get it."""

    def direction(self, low: Tensor, state: dict[str, Tensor], age: int = 1) -> Tensor:
        second = math.sqrt(1.0 - self.betas[1] ** age)
        inner = Adam(self.betas, self.eps * second)  # c_t M / (sqrt(V) + eps sqrt(1 - b2^t)) is torch's form
        return inner.direction(low, state).mul_(inner.correction(age))

    def correction(self, step: int) -> float:
        return 1.0

    def update_plain(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], lr: float, step: int) -> None:
        adamw_any_([weight], [grad], [state["exp_avg"]], [state["exp_avg_sq"]], [state["step"]], lr=lr, betas=self.betas,
                   eps=self.eps, weight_decay=0.0)


class StateFree:
    """scale * (N projected back + free_scale F(E))."""

    def __init__(self, scale: float, free_scale: float, kind: Literal["sign", "sgd", "none"]):
        self.scale, self.free_scale, self.kind = scale, free_scale, kind

    def slots(self) -> dict:
        return {}

    def update(self, grad: Tensor, low: Tensor, direction: Tensor, basis: Basis, state: dict[str, Tensor],
               step: int) -> tuple[Update, float]:
        kept = projected_back(direction, basis)
        if self.kind == "none" or self.free_scale == 0.0:
            return kept, self.scale
        rest = remainder(grad, low, basis)
        free = FullUpdate(rest.sign_() if self.kind == "sign" else rest)
        return SumUpdate(((kept, 1.0), (free, self.free_scale))), self.scale


class Frugal(OptimizerConfig):
    """Options of FRUGAL."""

    density: float = Field(0.25, ge=0, le=1, description="share of the columns or directions with state")
    update_proj_gap: int = Field(200, ge=1, description="steps between two choices of them")
    subspace: Literal["columns", "svd", "random"] = "columns"
    state_free: Literal["sign", "sgd", "none"] = Field("sign", description="rule for the rest of the gradient")
    free_scale: float = Field(1.0, ge=0, description="factor on the state-free part; 0.1 in the paper's fine-tuning")
    scale: float = Field(1.0, gt=0, description="factor on the update of projected weights")
    moments: Literal["reset", "keep"] = Field("reset", description="the moments at a new choice")
    seed: int = Field(0, ge=0, description="of the random choices; the i-th parameter starts from seed + i")


@register("optimizer", "frugal", config=Frugal, title="FRUGAL", paper="2411.07837",
          summary="Adam on a changing part of the gradient, signSGD without state on the rest; full-rank updates",
          bibtex="@article{zmushko2024frugal, title={FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for "
                 "Scalable Training}, author={Zmushko, Philip and Beznosikov, Aleksandr and Tak\\'a\\v{c}, Martin and "
                 "Horv\\'ath, Samuel}, journal={arXiv:2411.07837}, year={2024}}",
          projects=True, fused_capable=True, reads="gradient")
class FrugalOptimizer(StagedOptimizer):
    """Columns (or directions), bias-corrected Adam, a state-free rule on the remainder, decay first."""

    @classmethod
    def build(cls, config: Frugal) -> Stages:
        kind = {"columns": ColumnSubspace, "svd": SVDSubspace, "random": OrthogonalSubspace}[config.subspace]
        return Stages(kind(float(config.density), config.update_proj_gap), CorrectedAdam(config.betas, config.eps),
                      StateFree(config.scale, config.free_scale, config.state_free), config.moments, decay_first=True)
