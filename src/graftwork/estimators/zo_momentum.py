"""ZO-SGD-MMT (arXiv 2402.11592): zeroth-order SGD with momentum.

    b <- momentum * b + g       theta <- theta - lr * (b + wd * theta)          b = g at the first update

g as in `_spsa.py`, b as in torch.optim.SGD. State: b, mn values in fp32. Memory: the forward, b, and one piece of a tensor. The
directions of different steps are nearly orthogonal, so b is about 1/sqrt(1 - momentum^2) times as long as g, not 1/(1 - momentum).
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from ..registry import register
from ._spsa import SPSA, ZO_BENCH, SPSAEstimator


class ZOMomentum(SPSA):
    """Options of `zo_momentum`."""

    momentum: float = Field(0.9, ge=0, lt=1, description="decay of the sum of gradients")


@register("estimator", "zo_momentum", config=ZOMomentum, paper="2402.11592", title="ZO-SGD-MMT",
          summary="zeroth-order SGD with momentum; mn values of state",
          bibtex=ZO_BENCH)
class ZOMomentumEstimator(SPSAEstimator):
    """Difference -> g -> momentum."""

    slots = ("momentum",)

    def rule(self, g: Tensor, state: dict[str, Tensor], count: int) -> Tensor:
        return state["momentum"].mul_(self.config.momentum).add_(g)
