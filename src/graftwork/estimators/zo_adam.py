"""ZO-Adam (arXiv 2402.11592): Adam on the zeroth-order gradient, one piece of a tensor at a time.

    M <- b1 M + (1 - b1) g,  V <- b2 V + (1 - b2) g^2
    theta <- theta - lr * (M / (1 - b1^t) / (sqrt(V / (1 - b2^t)) + adam_eps) + wd * theta)

g as in `_spsa.py`, Adam as in torch.optim.AdamW; t counts each tensor's own updates. State: M and V, 2 mn values in fp32. No
gradient exists: the memory is the forward, the state and one piece. `eps` is the size of the perturbation, hence `adam_eps`.
"""

from __future__ import annotations

import math

from pydantic import Field, field_validator
from torch import Tensor

from ..registry import register
from ._spsa import SPSA, ZO_BENCH, SPSAEstimator


class ZOAdam(SPSA):
    """Options of `zo_adam`."""

    betas: tuple[float, float] = Field((0.9, 0.999), description="decay of the first and second moment")
    adam_eps: float = Field(1e-8, ge=0, description="added to the root of the second moment")

    @field_validator("betas")
    @classmethod
    def _betas_below_one(cls, betas):
        if not all(0.0 <= b < 1.0 for b in betas):
            raise ValueError("each beta must lie in [0, 1)")
        return betas


@register("estimator", "zo_adam", config=ZOAdam, paper="2402.11592", title="ZO-Adam",
          summary="Adam on zeroth-order gradients, in pieces: two moments and no gradient",
          bibtex=ZO_BENCH)
class ZOAdamEstimator(SPSAEstimator):
    """Difference -> g -> Adam."""

    slots = ("exp_avg", "exp_avg_sq")

    def rule(self, g: Tensor, state: dict[str, Tensor], count: int) -> Tensor:
        b1, b2 = self.config.betas
        m = state["exp_avg"].mul_(b1).add_(g, alpha=1 - b1)
        v = state["exp_avg_sq"].mul_(b2).addcmul_(g, g, value=1 - b2)
        size = v.sqrt().div_(math.sqrt(1 - b2**count)).add_(self.config.adam_eps)
        return size.reciprocal_().mul_(m).div_(1 - b1**count)
