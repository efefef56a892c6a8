"""APOLLO and APOLLO-Mini (arXiv 2412.05270): a random projection only estimates how Adam would rescale each channel.

With a = min(m, n), b = max(m, n); P (r, n) if m >= n, (m, r) otherwise, entries N(0, 1/r), redrawn every `update_proj_gap`
steps from the next seed; R = G P^T or P^T G (b r numbers); N = M / (sqrt(V) + eps) of R; c_t = sqrt(1 - b2^t) / (1 - b1^t):

    s_j = ||N_j|| / (||R_j|| + 1e-8)  per channel of length r (APOLLO), or s = ||N|| / (||R|| + 1e-8) (APOLLO-Mini, r = 1)
    U = s G, norm growth limited to 1 % a step;   W <- W - lr c_t sqrt(scale) U;   then W <- W - lr * wd * W

The update has the full rank of G. State 2 b r, a seed and a norm; `projection: cached` keeps P (a r more) and saves drawing it
at each step, `state: 8bit` makes the 2 b r numbers as many bytes and 8 ceil(b r / 256).

Departures from the reference package: P is not kept by default (the paper's byte count; same numbers); no limit after an
all-zero gradient (see residuals.py); no `scale_front`, because a constant before the limiter cancels in its ratio.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..registry import register
from .base import OptimizerConfig
from .coded import State, adam
from .residuals import NormScaled
from .staged import StagedOptimizer, Stages
from .subspace import RandomSubspace

_BIBTEX = ("@inproceedings{zhu2025apollo, title={APOLLO: SGD-like Memory, AdamW-level Performance}, author={Zhu, Hanqing and "
           "Zhang, Zhenyu and Cong, Wenyan and Liu, Xi and Park, Sem and Chandra, Vikas and Long, Bo and Pan, David Z. and "
           "Wang, Zhangyang and Lee, Jinwon}, booktitle={MLSys}, year={2025}}")


class Apollo(OptimizerConfig):
    """Options of APOLLO; names of apollo-torch and of Transformers' optim_args."""

    rank: int = Field(256, ge=1, description="rank of the projection, cut to min(m, n)")
    update_proj_gap: int = Field(200, ge=1, description="steps between two draws")
    scale: float = Field(1.0, gt=0, description="enters as its square root")
    scale_type: Literal["channel", "tensor"] = "channel"
    growth_limit: float | None = Field(1.01, ge=1, description="largest growth of the update's norm a step; null: no limit")
    projection: Literal["seeded", "cached"] = Field("seeded", description="draw P at each step, or keep it")
    state: State = Field("dense", description="8bit: the moments as 8-bit codes in blocks of 256")
    min_8bit_size: int = Field(4096, ge=0, description="moments with fewer numbers keep state_dtype")
    eps: float = Field(1e-6, ge=0)
    seed: int = Field(0, ge=0, description="the i-th parameter starts from seed + i, i from 1")


class ApolloMini(Apollo):
    """APOLLO with rank 1 and one scale per tensor."""

    rank: int = Field(1, ge=1, description="rank of the projection")
    scale: float = Field(128.0, gt=0, description="enters as its square root")
    scale_type: Literal["channel", "tensor"] = "tensor"


@register("optimizer", "apollo", config=Apollo, title="APOLLO", paper="2412.05270",
          summary="full-rank gradient, channels rescaled as Adam does in a random subspace; no SVD", bibtex=_BIBTEX,
          projects=True, fused_capable=True, reads="gradient")
class ApolloOptimizer(StagedOptimizer):
    """Random subspace, Adam, gradient scaled by the norm ratio and limited."""

    uses_seed = True

    @classmethod
    def build(cls, config: Apollo) -> Stages:
        return Stages(RandomSubspace(config.rank, config.update_proj_gap, cached=config.projection == "cached"),
                      adam(config.betas, config.eps, config.state, config.min_8bit_size),
                      NormScaled(config.scale, per_channel=config.scale_type == "channel", growth=config.growth_limit))


@register("optimizer", "apollo_mini", config=ApolloMini, title="APOLLO-Mini", paper="2412.05270",
          summary="APOLLO at rank 1 with one scale per tensor: optimizer memory close to SGD's", bibtex=_BIBTEX,
          projects=True, fused_capable=True, reads="gradient")
class ApolloMiniOptimizer(ApolloOptimizer):
    """The preset rank 1, tensor, scale 128."""
