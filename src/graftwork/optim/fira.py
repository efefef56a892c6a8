"""Fira (arXiv 2410.01623): GaLore, plus the part of the gradient that GaLore drops, rescaled as Adam rescaled the rest.

With the basis, R (b r numbers) and N = M / (sqrt(V) + eps), uncorrected, of GaLore; R' and N' projected back to (m, n):

    s_j = ||N_j|| / (||R_j|| + 1e-8) per row (m >= n) or column (m < n), or one s for the matrix
    S = s (G - R'), its norm growing at most by `growth_limit` a step;   W <- W - lr c_t (scale N' + S);   then W <- W - lr wd W

The update has full rank. State a r + 2 b r and one norm (`state: 8bit`: 2 b r bytes and 8 ceil(b r / 256) for the 2 b r numbers).

Departures from the reference package: it projects back with the factor `scale` and so subtracts scale R' where the paper
subtracts R', which leaks the part 1 - scale of the subspace into S (`remainder: reference` does so too); no limit after a step
whose S was zero (see residuals.py).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..registry import register
from .base import OptimizerConfig
from .coded import State, adam
from .residuals import ScaledRemainder
from .staged import StagedOptimizer, Stages
from .subspace import SVDSubspace


class Fira(OptimizerConfig):
    """Options of Fira; names of the reference package where it has them."""

    rank: int = Field(128, ge=1, description="rank of the projection, cut to min(m, n)")
    update_proj_gap: int = Field(200, ge=1, description="steps between two SVDs")
    scale: float = Field(0.25, gt=0, description="factor on the part inside the subspace")
    scale_type: Literal["channel", "tensor"] = Field("channel", description="one s per channel, or per matrix")
    growth_limit: float | None = Field(1.01, ge=1, description="largest growth of the norm of S a step; null: no limit")
    remainder: Literal["exact", "reference"] = Field("exact", description="G - R', or the reference package's G - scale R'")
    svd: Literal["exact", "randomized"] = "exact"
    state: State = Field("dense", description="8bit: the moments as 8-bit codes in blocks of 256")
    min_8bit_size: int = Field(4096, ge=0, description="moments with fewer numbers keep state_dtype")
    eps: float = Field(1e-6, ge=0)
    seed: int = Field(0, ge=0, description="of the randomized SVD")


@register("optimizer", "fira", config=Fira, title="Fira", paper="2410.01623",
          summary="GaLore plus the rest of the gradient, rescaled by Adam's ratio in the subspace and limited; full-rank updates",
          bibtex="@article{chen2024fira, title={Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?}, "
                 "author={Chen, Xi and Feng, Kaituo and Li, Changsheng and Lai, Xunhao and Yue, Xiangyu and Yuan, Ye and "
                 "Wang, Guoren}, journal={arXiv:2410.01623}, year={2024}}",
          projects=True, fused_capable=True, reads="gradient")
class FiraOptimizer(StagedOptimizer):
    """SVD subspace, Adam, remainder scaled by the norm ratio and limited."""

    @classmethod
    def build(cls, config: Fira) -> Stages:
        return Stages(SVDSubspace(config.rank, config.update_proj_gap, randomized=config.svd == "randomized"),
                      adam(config.betas, config.eps, config.state, config.min_8bit_size),
                      ScaledRemainder(config.scale, per_channel=config.scale_type == "channel", growth=config.growth_limit,
                                      exact=config.remainder == "exact"))
