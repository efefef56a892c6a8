"""Block-wise ZO (arXiv 2402.11592): zeroth-order SGD that perturbs and moves one decoder layer at a time.

For each block b of a sweep, with z in the entries of b only:  theta_b <- theta_b - lr * (g_b + wd * theta_b), g_b as in `_spsa.py`.
A block has fewer entries than the model, so its estimate is closer to its gradient (the cosine is about sqrt(n / (n + d_b + 1))), at
2 n forwards a block instead of a step. Tensors outside the layers are blocks of their owners. `blocks` chooses smaller ones,
`sequential: false` moves all blocks after the last. State: none. Memory: the forward and one piece of a tensor.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..registry import register
from ._spsa import SPSA, ZO_BENCH, SPSAEstimator


class ZOBlockwise(SPSA):
    """Options of `zo_blockwise`."""

    blocks: Literal["all", "layer", "part", "map"] = Field("layer", description="what is perturbed at a time: everything, a decoder "
                                                           "layer, its attention or MLP, one linear map")


@register("estimator", "zo_blockwise", config=ZOBlockwise, paper="2402.11592", title="Block-wise ZO",
          summary="zeroth-order SGD in sweeps over the layers: closer estimates, two forwards a block; no state",
          bibtex=ZO_BENCH)
class ZOBlockwiseEstimator(SPSAEstimator):
    """Blocks of layers -> difference -> g -> SGD."""
