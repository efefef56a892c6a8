"""LaMDA: a frozen projection into a few dimensions, a small square map there, and a way back that is frozen early (arXiv 2406.12832).

    y = W x + b + s B S A dropout(x),   W (out, in) frozen, A (r, in) frozen, S (r, r) trained, B (out, r) trained at first
    s = alpha / r.  Parameters r^2 + r out at the start, r^2 once B is frozen

With U diag(sigma) V^T the r largest components of W, init says what the factors are at the start; the output is unchanged in all:
    spectral   A = V^T, B = U, S = 0
    residual   A = V^T, B = U, S = diag(sigma) / s, and U diag(sigma) V^T is subtracted from W (by the adapter: W is not rewritten)
    random     A and S Kaiming uniform, B = 0, as in the released code
A is frozen, so the adapter keeps A x (T, r) for the backward pass and not x (T, in).

The schedule that freezes the columns of B in the order of the singular values is the selection `lamda_freeze`; without it B trains
to the end. The ranks of LaMDA++ are the initializer `lamda_ranks`.
Stored: S and B. A (and the subtracted part) is taken from W, or drawn from the seed, again at every load. As a LoRA: rank r, exact.

The paper does not say whether S starts at zero or at the singular values, so both are options. The released code has no SVD at
all and its schedule freezes at most three columns; see `lamda_freeze`.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from ..modeling.arithmetic import linear
from ..registry import register
from ._three_factor import ThreeFactor, frozen, kaiming
from ._weights import check_rank, principal, weight_of
from .base import AdapterConfig, pattern_value


class LaMDA(AdapterConfig):
    """Options of `lamda`."""

    r: int = Field(32, ge=1)
    alpha: float | None = Field(None, description="scale numerator; default r, so s = 1")
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    init: Literal["spectral", "residual", "random"] = "spectral"
    svd: Literal["fast", "exact"] = "fast"
    niter: int = Field(10, ge=0, description="power iterations of the fast SVD")
    rank_pattern: dict[str, int] = {}

    @model_validator(mode="after")
    def _no_dropped_weight(self):
        if self.init == "residual" and self.dropout:
            raise ValueError("init=residual moves a part of W into the adapter, and dropout would drop it: use dropout=0")
        return self


@register("adapter", "lamda", config=LaMDA, paper="2406.12832",
          title="LaMDA: Large Model Fine-Tuning via Spectrally Decomposed Low-Dimensional Adaptation",
          summary="frozen projection, small square map, output projection that is frozen early; keeps r activations a token",
          bibtex="@inproceedings{azizi2024lamda, title={LaMDA: Large Model Fine-Tuning via Spectrally Decomposed Low-Dimensional "
                 "Adaptation}, author={Azizi, Seyedarmin and Kundu, Souvik and Pedram, Massoud}, booktitle={Findings of EMNLP}, "
                 "year={2024}}")
class LaMDAAdapter(ThreeFactor):
    def __init__(self, site, config, *, shared, generator):
        super().__init__(site, config, shared=shared, generator=generator)
        self.r = r = pattern_value(config.rank_pattern, site.name, config.r)
        check_rank("lamda", site, r)
        self.scale = 1.0 if config.alpha is None else config.alpha / r
        self.dropout, self.init, self.svd, self.niter = config.dropout, config.init, config.svd, config.niter
        self.A = frozen(r, site.in_features)
        self.M, self.B = nn.Parameter(torch.zeros(r, r)), nn.Parameter(torch.zeros(site.out_features, r))
        self.register_parameter("moved", frozen(site.out_features, r) if self.init == "residual" else None)  # U diag(sigma)
        self.taken = ("A", "moved") if self.init == "residual" else ("A",)
        if self.init == "random":
            self.A.data.copy_(kaiming(r, site.in_features, generator))
            self.M.data.copy_(kaiming(r, r, generator))

    @classmethod
    def parameter_count(cls, site, config):
        r = pattern_value(config.rank_pattern, site.name, config.r)
        return r * (r + site.out_features)

    def start(self, product, pristine, generator):
        if self.init == "random":
            return
        U, S, Vh = principal(weight_of(product, pristine), self.r, self.svd, self.niter, generator)
        self.A.copy_(Vh)
        self.B.copy_(U)
        if self.init == "residual":
            self.M.copy_(torch.diag(S / self.scale))
            self.moved.copy_(U * S)

    def factors(self, base=None):
        B, A = super().factors(base)
        return (B if self.moved is None else B - self.moved), A

    def delta(self, x, base):
        hidden = linear(self.drop(x, base), self.A.to(x.dtype))
        change = linear(linear(hidden, self.middle().to(x.dtype)), self.B.to(x.dtype))
        return change if self.moved is None else change - linear(hidden, self.moved.to(x.dtype))

    def base_edit(self):
        return None if self.moved is None else (self.moved, self.A)
