"""LoHa: the element-wise product of two low-rank matrices (FedPara, arXiv 2108.06098).

    y = W x + b + s ((B1 A1) * (B2 A2)) x,   W (out, in) frozen, A1, A2 (r, in), B1, B2 (out, r) trained, s = alpha / r
    start: A1, B1, B2 Kaiming uniform (a = sqrt 5), A2 = 0, so y is unchanged

2 r (in + out) parameters reach rank r^2: row by row, B1 A1 * B2 A2 = B A with B (out, r^2) = the products B1[:, i] B2[:, j] and
A (r^2, in) = A1[i] A2[j]. So the change is a LoRA of rank r^2, exactly. It is applied in that form while that is the cheaper
one, r^2 (in + out) <= in out, and as a dense matrix beyond. Rows of different adapters always use the factors.

Differs from the paper and peft: no Tucker form (convolutions only), no tanh, no rank or module dropout. The paper starts all four
factors at random and trains the product instead of a change; A2 = 0 is peft's way of starting at the base. peft builds the dense
matrix in every step; the result is the same.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import nn

from ..modeling.arithmetic import linear
from ..registry import register
from ._weights import check_rank
from .base import Adapter, AdapterConfig, pattern_value


class LoHa(AdapterConfig):
    """Options of `loha`; names as in PEFT."""

    r: int = Field(8, ge=1)
    alpha: float | None = Field(None, description="scale numerator; default r, so s = 1")
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}


@register("adapter", "loha", config=LoHa, paper="2108.06098",
          title="FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning",
          summary="element-wise product of two rank-r changes: rank r^2 with the parameters of rank 2r",
          bibtex="@inproceedings{hyeonwoo2022fedpara, title={FedPara: Low-Rank Hadamard Product for Communication-Efficient "
                 "Federated Learning}, author={Hyeon-Woo, Nam and Ye-Bin, Moon and Oh, Tae-Hyun}, booktitle={ICLR}, year={2022}}")
class LoHaAdapter(Adapter):
    def __init__(self, site, config, *, shared, generator):
        super().__init__(site, config, shared=shared, generator=generator)
        self.r = pattern_value(config.rank_pattern, site.name, config.r)
        check_rank("loha", site, self.r)
        self.scale = pattern_value(config.alpha_pattern, site.name, self.r if config.alpha is None else config.alpha) / self.r

        def uniform(*shape: int) -> nn.Parameter:
            bound = 1.0 / math.sqrt(shape[1])
            return nn.Parameter(torch.empty(shape).uniform_(-bound, bound, generator=generator))

        self.B1, self.A1 = uniform(site.out_features, self.r), uniform(self.r, site.in_features)
        self.B2, self.A2 = uniform(site.out_features, self.r), nn.Parameter(torch.zeros(self.r, site.in_features))

    @classmethod
    def parameter_count(cls, site, config):
        return 2 * pattern_value(config.rank_pattern, site.name, config.r) * (site.in_features + site.out_features)

    def factors(self, base=None):
        B = (self.B1.unsqueeze(2) * self.B2.unsqueeze(1)).flatten(1)
        A = (self.A1.unsqueeze(1) * self.A2.unsqueeze(0)).flatten(0, 1)
        return B * self.scale, A

    def delta_weight(self, base):
        return (self.B1 @ self.A1).float() * (self.B2 @ self.A2).float() * self.scale

    def delta(self, x, base):
        if self.r**2 * (self.in_features + self.out_features) <= self.in_features * self.out_features:
            return super().delta(x, base)
        return linear(x, self.delta_weight(base).to(x.dtype))
