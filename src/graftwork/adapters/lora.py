"""LoRA: low-rank adaptation (arXiv 2106.09685); rsLoRA's scale (2312.03732) and LoRA+'s rates (2402.12354) are options.

    y = W x + b + s B (A dropout(x)),   W (out, in) frozen, A (r, in), B (out, r) trained
    s = alpha / r   (use_rslora: alpha / sqrt(r))
    start: A ~ U(-1/sqrt(in), 1/sqrt(in)) (Kaiming uniform, a = sqrt 5), B = 0, so y is unchanged

LoRA+: B's learning rate is `loraplus_lr_ratio` times A's. Parameters r (in + out), and out more with bias='lora_only'.

An initializer that starts from a piece of W (PiSSA) sets the frozen pair (B0, A0): the piece is subtracted in the
adapter, s B A x - B0 A0 x, so the stored base stays pristine and shared by every graft; on quantised storage the
initializer rewrites the storage instead, and the pair is kept only so that the artifact can rebuild it.

Differs from the paper: A's distribution follows the official code, not the Gaussian of the text. bias='lora_only' trains
a change of the bias (zero at start) instead of the bias itself, which is the same function and can be served per row.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import nn

from ..registry import register
from ._lowrank import frozen_plus_low_rank
from .base import Adapter, AdapterConfig, pattern_value


class LoRA(AdapterConfig):
    """Options of `lora`; names as in PEFT."""

    r: int = Field(8, ge=1)
    alpha: float | None = Field(None, description="scale numerator; default r, so s = 1")
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    use_rslora: bool = False
    loraplus_lr_ratio: float = Field(1.0, gt=0.0)
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    bias: str = Field("none", pattern="^(none|lora_only)$")


@register("adapter", "lora", config=LoRA, title="LoRA: Low-Rank Adaptation of Large Language Models", paper="2106.09685",
          summary="rank-r additive change B A; the reference method",
          bibtex="@inproceedings{hu2022lora, title={LoRA: Low-Rank Adaptation of Large Language Models}, author={Hu, Edward J. "
                 "and Shen, Yelong and Wallis, Phillip and Allen-Zhu, Zeyuan and Li, Yuanzhi and Wang, Shean and Wang, Lu and "
                 "Chen, Weizhu}, booktitle={ICLR}, year={2022}}")
class LoRAAdapter(Adapter):
    def __init__(self, site, config, *, shared, generator):
        super().__init__(site, config, shared=shared, generator=generator)
        self.r = pattern_value(config.rank_pattern, site.name, config.r)
        alpha = pattern_value(config.alpha_pattern, site.name, self.r if config.alpha is None else config.alpha)
        self.scale = alpha / (math.sqrt(self.r) if config.use_rslora else self.r)
        self.dropout, self.lr_ratio = config.dropout, config.loraplus_lr_ratio
        bound = 1.0 / math.sqrt(site.in_features)
        self.lora_A = nn.Parameter(torch.empty(self.r, site.in_features).uniform_(-bound, bound, generator=generator))
        self.lora_B = nn.Parameter(torch.zeros(site.out_features, self.r))
        trains_bias = config.bias == "lora_only"
        self.register_parameter("bias_change", nn.Parameter(torch.zeros(site.out_features)) if trains_bias else None)
        # the frozen pair of an initializer: subtracted here, or (edited storage) only remembered
        self.register_parameter("lora_A0", None)
        self.register_parameter("lora_B0", None)
        self.pair_in_storage = False

    @classmethod
    def parameter_count(cls, site, config):
        r = pattern_value(config.rank_pattern, site.name, config.r)
        return r * (site.in_features + site.out_features) + (site.out_features if config.bias == "lora_only" else 0)

    def set_pair(self, B0: torch.Tensor, A0: torch.Tensor, *, in_storage: bool) -> None:
        """Start on W - B0 A0, B0 (out, k), A0 (k, in)."""
        self.lora_B0, self.lora_A0 = nn.Parameter(B0, requires_grad=False), nn.Parameter(A0, requires_grad=False)
        self.pair_in_storage = in_storage

    def factors(self, base=None):
        B, A = self.lora_B * self.scale, self.lora_A
        if self.lora_A0 is not None and not self.pair_in_storage:
            B, A = torch.cat([B, self.lora_B0], 1), torch.cat([A, -self.lora_A0], 0)
        return B, A

    def own_factors(self):
        own = self._parameters  # past nn.Module's own lookup: asked for at every site of a server's step
        if type(self).factors is not LoRAAdapter.factors or own["bias_change"] is not None:
            return None
        if own["lora_A0"] is not None and not self.pair_in_storage:
            return None
        return own["lora_B"], own["lora_A"], self.scale

    def forward(self, x, base):
        dropping = self.dropout and self.training and torch.is_grad_enabled()
        if dropping or not base.frozen.frozen:
            return super().forward(x, base)
        B, A = self.factors()
        return frozen_plus_low_rank(x, A, B, self.bias_change, base.frozen)

    def delta_bias(self):
        return self.bias_change

    def base_edit(self):
        return None if self.lora_A0 is None else (self.lora_B0, self.lora_A0)

    def load_artifact_state(self, state):
        if "lora_A0" in state and self.lora_A0 is None:
            self.set_pair(torch.empty_like(state["lora_B0"], device=self.lora_A.device),
                          torch.empty_like(state["lora_A0"], device=self.lora_A.device), in_storage=self.pair_in_storage)
        super().load_artifact_state(state)

    def stored_extra(self):
        return {"pair_in_storage": True} if self.pair_in_storage else None

    def check_extra(self, extra):
        self.pair_in_storage = extra["pair_in_storage"]

    def parameter_groups(self):
        slow = [p for p in (self.lora_A, self.bias_change) if p is not None]
        return [{"params": slow, "lr_scale": 1.0}, {"params": [self.lora_B], "lr_scale": self.lr_ratio}]
