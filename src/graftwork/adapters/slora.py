"""SLoRA: LoRA with a trained r x r matrix between its factors (arXiv 2502.14482); IntTune trains that matrix alone.

    y = W x + b + s B N A dropout(x),   A (r, in), N (r, r), B (out, r),   s = alpha / r
    train = all     A, N ~ Kaiming uniform (a = sqrt 5), B = 0;   r (in + out) + r^2 trained values
    train = middle  A, B ~ Kaiming uniform and frozen, N = 0;     r^2 trained values (saved with A and B)

With initializer `nystrom` the three are blocks of W (NLoRA), and train = middle is then the paper's IntTune. Without it,
train = middle differs from IntTune: frozen B = 0 would never learn, so A and B are random and N starts at zero.

An initializer that keeps the function sets the frozen pair (B0, A0), which is subtracted: y = ... - B0 A0 x.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..registry import register
from ._lowrank import frozen_plus_low_rank
from .base import Adapter, AdapterConfig


class SLoRA(AdapterConfig):
    """Options of `slora`."""

    r: int = Field(8, ge=1)
    alpha: float | None = Field(None, description="scale numerator; default r, so s = 1")
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    train: Literal["all", "middle"] = Field("all", description="middle: only N learns (IntTune)")


@register("adapter", "slora", config=SLoRA, title="SLoRA: Structured LoRA (of NLoRA)", paper="2502.14482",
          summary="LoRA with a trained r x r matrix in the middle; that matrix can be all that learns",
          bibtex="@article{guo2025nlora, title={NLoRA: Nystr{\\\"o}m-Initiated Low-Rank Adaptation for Large Language Models}, "
                 "author={Guo, Chenlu and Wu, Yuan and Chang, Yi}, journal={arXiv:2502.14482}, year={2025}}")
class SLoRAAdapter(Adapter):
    def __init__(self, site, config, *, shared, generator):
        super().__init__(site, config, shared=shared, generator=generator)
        r = self.r = config.r
        self.scale = (r if config.alpha is None else config.alpha) / r
        self.dropout = config.dropout
        outer = config.train == "all"

        def uniform(*shape: int) -> Tensor:
            bound = 1.0 / math.sqrt(shape[1])
            return torch.empty(*shape).uniform_(-bound, bound, generator=generator)

        self.lora_A = nn.Parameter(uniform(r, site.in_features), requires_grad=outer)
        self.lora_N = nn.Parameter(uniform(r, r) if outer else torch.zeros(r, r))
        self.lora_B = nn.Parameter(torch.zeros(site.out_features, r) if outer else uniform(site.out_features, r), requires_grad=outer)
        self.register_parameter("lora_A0", None)
        self.register_parameter("lora_B0", None)

    @classmethod
    def parameter_count(cls, site, config):
        return config.r**2 + (config.r * (site.in_features + site.out_features) if config.train == "all" else 0)

    def set_pair(self, B0: Tensor, A0: Tensor, *, in_storage: bool = False) -> None:
        """Start on W - B0 A0, B0 (out, r), A0 (r, in); the pair is always subtracted here (in_storage False)."""
        self.lora_B0, self.lora_A0 = nn.Parameter(B0, requires_grad=False), nn.Parameter(A0, requires_grad=False)

    def factors(self, base=None):
        B, A = (self.lora_B * self.scale) @ self.lora_N, self.lora_A
        if self.lora_A0 is not None:
            B, A = torch.cat([B, self.lora_B0], 1), torch.cat([A, -self.lora_A0], 0)
        return B, A

    def forward(self, x, base):
        if (self.dropout and self.training and torch.is_grad_enabled()) or not base.frozen.frozen:
            return super().forward(x, base)
        B, A = self.factors()
        return frozen_plus_low_rank(x, A, B, None, base.frozen)

    def load_artifact_state(self, state):
        if "lora_A0" in state and self.lora_A0 is None:
            self.set_pair(torch.empty_like(state["lora_B0"], device=self.lora_A.device),
                          torch.empty_like(state["lora_A0"], device=self.lora_A.device))
        super().load_artifact_state(state)
