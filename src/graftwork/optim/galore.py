"""GaLore (arXiv 2403.03507): Adam's moments live in a rank-r projection of the gradient, the weight stays full and dense.

Every `update_proj_gap` steps, from the gradient G (m, n) = U S V^T of that step, with a = min(m, n), b = max(m, n):

    std, m >= n:  Q = V[:, :r]^T (r, n),  R = G Q^T (m, r),  W <- W - lr * scale * Adam(R) Q
    std, m <  n:  P = U[:, :r]   (m, r),  R = P^T G (r, n),  W <- W - lr * scale * P Adam(R);   then W <- W - lr * wd * W

State a r + 2 b r against Adam's 2 m n. `scale` multiplies the learning rate of the projected weights only. Other tensors
(embeddings, head, norms, biases) get plain Adam with the same learning rate.

Departures from the reference package: the projection is kept as its own r rows (a slice there keeps all a singular vectors
alive); `reverse_std` chooses its side by the gradient, so rank = min(m, n) works for wide weights; state is float32 for
bfloat16 weights unless asked; all state is tensors; optional randomized SVD, and optional `moments` at a refresh (the
reference keeps the old ones although the basis they refer to has gone).

`state: 8bit` keeps the moments as 8-bit codes (coded.py), a r floats and 2 b r bytes + 8 ceil(b r / 256); small ones, and the
projection, stay floating point. The reference's 8-bit class runs bitsandbytes' kernel instead, on CUDA only.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..registry import register
from .base import OptimizerConfig
from .coded import State, adam
from .residuals import Dropped
from .rules import Moments
from .staged import StagedOptimizer, Stages
from .subspace import ProjType, SVDSubspace


class GaLore(OptimizerConfig):
    """Options of GaLore; names of galore-torch and of Transformers' optim_args."""

    rank: int = Field(128, ge=1, description="rank of the projection, cut to min(m, n)")
    update_proj_gap: int = Field(200, ge=1, description="steps between two SVDs")
    scale: float = Field(0.25, gt=0, description="factor on the update of projected weights")
    proj_type: ProjType = Field("std", description="side(s) to compress; std: the smaller one")
    svd: Literal["exact", "randomized"] = "exact"
    moments: Moments = Field("keep", description="the moments at a refresh: keep (as published), reset, rotate")
    state: State = Field("dense", description="8bit: the moments as 8-bit codes in blocks of 256")
    min_8bit_size: int = Field(4096, ge=0, description="moments with fewer numbers keep state_dtype")
    eps: float = Field(1e-6, ge=0)
    seed: int = Field(0, ge=0, description="of the randomized SVD")


@register("optimizer", "galore", config=GaLore, title="GaLore", paper="2403.03507",
          summary="Adam in a rank-r subspace of the gradient, refreshed by SVD; full-rank weights",
          bibtex="@inproceedings{zhao2024galore, title={GaLore: Memory-Efficient LLM Training by Gradient Low-Rank "
                 "Projection}, author={Zhao, Jiawei and Zhang, Zhenyu and Chen, Beidi and Wang, Zhangyang and Anandkumar, "
                 "Anima and Tian, Yuandong}, booktitle={ICML}, year={2024}}",
          projects=True, fused_capable=True, reads="gradient")
class GaLoreOptimizer(StagedOptimizer):
    """SVD subspace, Adam, residual dropped."""

    @classmethod
    def build(cls, config: GaLore) -> Stages:
        return Stages(SVDSubspace(config.rank, config.update_proj_gap, config.proj_type, randomized=config.svd == "randomized"),
                      adam(config.betas, config.eps, config.state, config.min_8bit_size), Dropped(config.scale), config.moments)
