"""LoLDU: train the diagonal of a partial LDU factorization of W (arXiv 2410.13618).

    W = P L D U,   P (out, out) a permutation, L (out, q) unit lower, D (q,) diagonal, U (q, in) unit upper, q = min(out, in)
    y = W x + b + s L_r ((z - z0) * (U_r x)),   L_r = (P L)[:, :r] (out, r), U_r = U[:r] (r, in), z (r,) trained, s = alpha / r
    start: z = z0, so y is unchanged (init: where z0 is)

This is the paper's residual form, (W - s L_r diag(z0) U_r) + s L_r diag(z) U_r, with the common factors taken out: the leading block of
an LDU is no good approximation of W (its residual may be larger than W), so a residual rounded to bf16 would lose bits of
W; here W is untouched and the start is exact. Parameters r. Stored: z alone; L_r, U_r and z0 are taken from W again at every
load. As a LoRA: rank r, exact.

Only r steps of the elimination with partial pivoting are run, on all rows in place, which leaves L_r in the order of W's rows: no
permutation is kept, and the cost is r out in. A pivot that is zero beside W is taken as one (its row of U stays as it is), so
nothing is divided by it.

init: 'ldu' z0 = D_r; 'uniform', 'normal', 'constant' draw z0 from the range, the moments or the mean of D_r; all four start at
the base. 'ones', 'zeros', 'standard_normal', 'standard_uniform' (in [-1, 1]) set z and leave z0 = D_r: as in the official code the
output is then changed at the start. Differs from that code: parameters exist before the first forward, no dense change
is formed per forward, nothing is claimed to be orthogonal, and the scale is no (never trained) parameter.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..modeling.arithmetic import linear
from ..registry import register
from ._three_factor import frozen
from ._weights import FromWeight, check_rank, weight_of
from .base import AdapterConfig, pattern_value


class LoLDU(AdapterConfig):
    """Options of `loldu`."""

    r: int = Field(64, ge=1)
    alpha: float | None = Field(None, description="scale numerator; default r, so s = 1")
    init: Literal["ldu", "uniform", "normal", "constant", "ones", "zeros", "standard_normal", "standard_uniform"] = "ldu"
    rank_pattern: dict[str, int] = {}


def leading_ldu(W: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """((P L)[:, :r] (out, r), D[:r] (r,), U[:r] (r, in)) of W (out, in), by r steps of elimination with partial pivoting."""
    rest, floor = W.clone(), W.abs().amax() * torch.finfo(W.dtype).eps
    rows = torch.arange(W.shape[0], device=W.device)
    L, D, U = [], [], []
    for i in range(r):
        column = rest[:, i].clone()
        place = column.abs().argmax().view(1)  # used rows are exactly zero by now
        row, pivot = rest.index_select(0, place)[0], column.index_select(0, place)[0]
        tiny = pivot.abs() <= floor
        pivot = torch.where(tiny, torch.ones_like(pivot), pivot)
        lower = torch.where(tiny, (rows == place).to(W.dtype), column / pivot)
        rest.sub_(torch.outer(lower, row))
        rest[:, i] = torch.where(tiny, rest[:, i], torch.zeros_like(column))
        L.append(lower)
        D.append(pivot)
        U.append(row / pivot)
    return torch.stack(L, 1), torch.stack(D), torch.stack(U)


@register("adapter", "loldu", config=LoLDU, title="LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition", paper="2410.13618",
          summary="trains r numbers a weight: the leading diagonal of its LDU factorization",
          bibtex="@article{shi2024loldu, title={LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for "
                 "Parameter-Efficient Fine-Tuning}, author={Shi, Yiming and Wei, Jiwei and Wu, Yujia and Ran, Ran and Sun, Chengwei "
                 "and He, Shiyuan and Yang, Yang}, journal={arXiv:2410.13618}, year={2024}}")
class LoLDUAdapter(FromWeight):
    taken = ("L", "U", "z0")

    def __init__(self, site, config, *, shared, generator):
        super().__init__(site, config, shared=shared, generator=generator)
        self.r = pattern_value(config.rank_pattern, site.name, config.r)
        check_rank("loldu", site, self.r)
        self.scale = 1.0 if config.alpha is None else config.alpha / self.r
        self.init = config.init
        self.z = nn.Parameter(torch.zeros(self.r))
        self.L, self.U, self.z0 = frozen(site.out_features, self.r), frozen(self.r, site.in_features), frozen(self.r)

    @classmethod
    def parameter_count(cls, site, config):
        return pattern_value(config.rank_pattern, site.name, config.r)

    def start(self, product, pristine, generator):
        L, D, U = leading_ldu(weight_of(product, pristine), self.r)
        self.L.copy_(L)
        self.U.copy_(U)
        drawn = self._draw(D, generator)
        self.z.copy_(drawn)
        self.z0.copy_(drawn if self.init in ("ldu", "uniform", "normal", "constant") else D)

    def _draw(self, D: Tensor, generator: torch.Generator) -> Tensor:
        if self.init == "ldu":
            return D
        if self.init in ("constant", "ones", "zeros"):
            return torch.ones_like(D) * {"constant": D.mean(), "ones": 1.0, "zeros": 0.0}[self.init]
        if self.init in ("normal", "standard_normal"):
            noise = torch.randn(self.r, generator=generator, dtype=D.dtype).to(D.device)
            return noise if self.init == "standard_normal" else D.mean() + noise * D.std(correction=0)
        noise = torch.rand(self.r, generator=generator, dtype=D.dtype).to(D.device)
        return 2 * noise - 1 if self.init == "standard_uniform" else D.min() + noise * (D.max() - D.min())

    def factors(self, base=None):
        return self.L * ((self.z - self.z0) * self.scale), self.U

    def delta(self, x, base):
        hidden = linear(x, self.U.to(x.dtype)) * ((self.z - self.z0) * self.scale).to(x.dtype)
        return linear(hidden, self.L.to(x.dtype))
