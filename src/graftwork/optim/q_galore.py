"""Q-GaLore (arXiv 2407.08296): GaLore with INT4 projections, 8-bit moments, a refresh that slows down per matrix, INT8 weights.

W <- W - lr * scale * Adam(R) Q as GaLore (galore.py), where Q is decoded from INT4 (quantized.py) and Adam's moments are 8-bit codes
(coded.py). The weights are the matter of the storage: with `storage: int8` and `adapter: null` they are codes too, and this
optimizer rounds them stochastically, which is what lets updates far below a code train them. Over any other weights it is the rest
of the method.

State of an (m, n) matrix, a = min(m, n), b = max(m, n), groups of g: a r / 2 + 8 a r / g bytes of projection, 2 b r + 8 ceil(b r / 256)
of moments, 8 + 4 queue of the refresh clock (and 4 a with `similarity: cosine`). INT8 weights: m n + 8 m n / g bytes.

Departures from the reference code: two INT4 codes a byte (it keeps one); zero points are not cut to the codes' range; similarity is
the overlap of the subspaces, since one vector's sign and order are arbitrary, and `cosine` takes the absolute value (its
signed one can sit at -1 for an unchanged vector); a gap is not doubled once more by per-layer updates.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..registry import register
from .base import OptimizerConfig
from .coded import State, adam
from .quantized import LazySubspace, Similarity
from .residuals import Dropped
from .staged import StagedOptimizer, Stages


class QGaLore(OptimizerConfig):
    """Options of Q-GaLore; names of q-galore-torch where it has them."""

    rank: int = Field(128, ge=1, description="rank of the projection, cut to min(m, n)")
    update_proj_gap: int = Field(200, ge=1, description="steps between two SVDs, at first")
    scale: float = Field(0.25, gt=0, description="factor on the update of projected weights")
    svd: Literal["exact", "randomized"] = "exact"
    projection: Literal["int4", "dense"] = Field("int4", description="how the singular vectors are kept; dense: in state_dtype")
    quant_group_size: int = Field(256, ge=16, multiple_of=2, description="numbers of the projection that share a scale")
    similarity: Similarity = Field("overlap", description="of two subspaces; cosine: of their first vectors, as the reference")
    cos_threshold: float | None = Field(0.4, description="mean similarity from which the gap grows; null: one fixed gap")
    gamma_proj: float = Field(2.0, ge=1, description="factor on the gap of a matrix whose subspace is steady")
    queue_size: int = Field(5, ge=1, description="refreshes in that mean")
    state: State = Field("8bit", description="dense: the moments in state_dtype")
    min_8bit_size: int = Field(4096, ge=0, description="moments with fewer numbers keep state_dtype")
    rounding: Literal["nearest", "stochastic", "kahan"] = Field("stochastic", description="of updated INT8 and 16-bit weights")
    eps: float = Field(1e-6, ge=0)
    seed: int = Field(0, ge=0, description="of the randomized SVD")


@register("optimizer", "q_galore", config=QGaLore, title="Q-GaLore", paper="2407.08296", aliases=("qgalore",),
          summary="GaLore with INT4 projections, 8-bit moments and rarer refreshes of steady subspaces; for INT8 weights (storage: int8)",
          bibtex="@article{zhang2024qgalore, title={Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank "
                 "Gradients}, author={Zhang, Zhenyu and Jaiswal, Ajay and Yin, Lu and Liu, Shiwei and Zhao, Jiawei and Tian, "
                 "Yuandong and Wang, Zhangyang}, journal={arXiv:2407.08296}, year={2024}}",
          projects=True, fused_capable=True, reads="gradient")
class QGaLoreOptimizer(StagedOptimizer):
    """Lazy INT4 subspace, 8-bit Adam, residual dropped."""

    @classmethod
    def build(cls, config: QGaLore) -> Stages:
        return Stages(LazySubspace(config.rank, config.update_proj_gap, randomized=config.svd == "randomized",
                                   group=config.quant_group_size if config.projection == "int4" else None,
                                   similarity=config.similarity, threshold=config.cos_threshold, growth=config.gamma_proj,
                                   queue=config.queue_size),
                      adam(config.betas, config.eps, config.state, config.min_8bit_size), Dropped(config.scale))
