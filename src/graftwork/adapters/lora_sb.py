"""LoRA-SB: an r x r matrix between frozen directions of the first full step (arXiv 2411.19557).

    y = W x + b + B R A dropout(x),   B (out, r) and A (r, in) frozen, B^T B = A A^T = I,   R (r, r) trained: r^2 parameters
    dL/dR = B^T G A^T with G = dL/dW, so a step in R moves the weight by B B^T G A^T A: the nearest matrix to G among all B X A

So no scale is left to choose, and none is offered. The initializer `lora_sb` takes B, A and R from a gradient on the data, and is
what a recipe uses with this adapter. Without it (initializer: default, or `attach` with none) B and A are random orthonormal
directions and R = 0, so the output is unchanged.

Stored: R, B and A, for the directions come from data; r^2 + r (in + out) fp32 values. As a LoRA: (B R, A), rank r, exact.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from ..registry import register
from ._three_factor import ThreeFactor, frozen
from ._weights import check_rank
from .base import AdapterConfig, pattern_value


class LoRASB(AdapterConfig):
    """Options of `lora_sb`."""

    r: int = Field(32, ge=1)
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    rank_pattern: dict[str, int] = {}


def directions(n: int, r: int, generator: torch.Generator) -> Tensor:
    """(n, r) with random orthonormal columns."""
    return torch.linalg.qr(torch.randn(n, r, generator=generator)).Q


@register("adapter", "lora_sb", config=LoRASB, title="Initialization using Update Approximation is a Silver Bullet for Extremely "
          "Efficient Low-Rank Fine-Tuning", paper="2411.19557",
          summary="trains r x r numbers between frozen directions of the first full gradient step",
          bibtex="@article{ponkshe2024lorasb, title={Initialization using Update Approximation is a Silver Bullet for Extremely "
                 "Efficient Low-Rank Fine-Tuning}, author={Ponkshe, Kaustubh and Singhal, Raghav and Gorbunov, Eduard and "
                 "Tumanov, Alexey and Horvath, Samuel and Vepakomma, Praneeth}, journal={arXiv:2411.19557}, year={2024}}",
          initializer="lora_sb")
class LoRASBAdapter(ThreeFactor):
    scale = 1.0
    moves = ("A", "B")  # in checkpoints too: a second gradient pass on another processor may end in other directions

    def __init__(self, site, config, *, shared, generator):
        super().__init__(site, config, shared=shared, generator=generator)
        self.r = pattern_value(config.rank_pattern, site.name, config.r)
        check_rank("lora_sb", site, self.r)
        self.dropout = config.dropout
        self.A, self.B = frozen(self.r, site.in_features), frozen(site.out_features, self.r)
        self.M = nn.Parameter(torch.zeros(self.r, self.r))
        self.A.data.copy_(directions(site.in_features, self.r, generator).T)
        self.B.data.copy_(directions(site.out_features, self.r, generator))

    @classmethod
    def parameter_count(cls, site, config):
        return pattern_value(config.rank_pattern, site.name, config.r) ** 2
