"""ZO-SGD-Sign (arXiv 2402.11592): the sign of the zeroth-order gradient, theta <- theta - lr * (sign(g) + wd * theta).

g = 1/n sum_q c_q z_q as in `_spsa.py`; the sign is taken entry by entry of the mean over all n directions, as the paper has it (the
official code moves by sign(c) z, which for n = 1 has the same signs but normal sizes). All entries move by lr: the rate is the
step, and is smaller than that of zo_sgd. State: none. Memory: the forward and one piece of a tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import register
from ._spsa import SPSA, ZO_BENCH, SPSAEstimator


class ZOSGDSign(SPSA):
    """Options of `zo_sgd_sign`."""


@register("estimator", "zo_sgd_sign", config=ZOSGDSign, paper="2402.11592", title="ZO-SGD-Sign",
          summary="zeroth-order sign descent: every entry moves by the rate; no state",
          bibtex=ZO_BENCH)
class ZOSGDSignEstimator(SPSAEstimator):
    """Difference -> g -> sign."""

    def rule(self, g: Tensor, state: dict[str, Tensor], count: int) -> Tensor:
        return torch.sign(g)
