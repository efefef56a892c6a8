"""LoRA-XS: an r x r matrix between the frozen singular vectors of W (arXiv 2405.17604).

    y = W x + b + s B R A dropout(x),   W (out, in) frozen, its r largest components U S V^T
    B = U (out, r),   A = S V^T (r, in),   R (r, r) trained, R ~ N(0, init_std^2),   s = alpha / r
    so s B R A x maps x through the principal directions of W and mixes them; r^2 parameters, whatever the width

Stored: R alone. A and B are taken from W again when an artifact is loaded (`_weights`), r (in + out) fp32 values in memory.
As a LoRA: (s B R, A), rank r, exact.

svd='fast' is the paper's randomized SVD with its 10 iterations, from a private generator; 'exact' takes the full SVD of every
weight, which is slow on large models. Both are computed in fp64 with fixed signs, for R means nothing in another basis.
R is not zero at the start, since the code starts it at 1e-5 N(0, 1): the logits move by less than 1 % (SmolLM2-135M at r = 32:
0.03 % and 0.7 % on two texts), and the loss by nothing that can be seen.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import nn

from ..registry import register
from ._three_factor import ThreeFactor, frozen
from ._weights import check_rank, principal, weight_of
from .base import AdapterConfig, pattern_value


class LoRAXS(AdapterConfig):
    """Options of `lora_xs`."""

    r: int = Field(32, ge=1)
    alpha: float | None = Field(None, description="scale numerator; default r, so s = 1")
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    svd: Literal["fast", "exact"] = "fast"
    niter: int = Field(10, ge=0, description="power iterations of the fast SVD")
    init_std: float = Field(1e-5, gt=0.0, description="standard deviation of R at the start")
    rank_pattern: dict[str, int] = {}


@register("adapter", "lora_xs", config=LoRAXS, title="LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters",
          paper="2405.17604", summary="trains r x r numbers between the frozen principal singular vectors of W",
          bibtex="@article{balazy2024loraxs, title={LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters}, "
                 "author={Ba{\\l}azy, Klaudia and Banaei, Mohammadreza and Aberer, Karl and Tabor, Jacek}, "
                 "journal={arXiv:2405.17604}, year={2024}}")
class LoRAXSAdapter(ThreeFactor):
    starts_at_identity = False
    taken = ("A", "B")

    def __init__(self, site, config, *, shared, generator):
        super().__init__(site, config, shared=shared, generator=generator)
        self.r = pattern_value(config.rank_pattern, site.name, config.r)
        check_rank("lora_xs", site, self.r)
        self.scale = 1.0 if config.alpha is None else config.alpha / self.r
        self.dropout, self.svd, self.niter = config.dropout, config.svd, config.niter
        self.A, self.B = frozen(self.r, site.in_features), frozen(site.out_features, self.r)
        self.M = nn.Parameter(torch.randn(self.r, self.r, generator=generator) * config.init_std)

    @classmethod
    def parameter_count(cls, site, config):
        return pattern_value(config.rank_pattern, site.name, config.r) ** 2

    def start(self, product, pristine, generator):
        U, S, Vh = principal(weight_of(product, pristine), self.r, self.svd, self.niter, generator)
        self.A.copy_(S[:, None] * Vh)
        self.B.copy_(U)
