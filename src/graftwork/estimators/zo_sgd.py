"""ZO-SGD (arXiv 2402.11592): the plain preset of the SPSA family, theta <- theta - lr * (g + wd * theta).

With difference = two_sided and blocks = all it is `mezo` number for number; the preset adds the one-sided and the residual
estimate and blocks. See `_spsa.py` for g. State: none. Memory: the forward and one piece of a tensor.
"""

from __future__ import annotations

from ..registry import register
from ._spsa import SPSA, ZO_BENCH, SPSAEstimator


class ZOSGD(SPSA):
    """Options of `zo_sgd`."""


@register("estimator", "zo_sgd", config=ZOSGD, paper="2402.11592", title="ZO-SGD",
          summary="zeroth-order SGD: two, one-sided or one-point estimates, whole or block by block; no state",
          bibtex=ZO_BENCH)
class ZOSGDEstimator(SPSAEstimator):
    """Difference -> g -> SGD."""
