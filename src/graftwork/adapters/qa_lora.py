"""QA-LoRA: a LoRA whose input is pooled over the groups of a quantized weight, so that it merges into their zero points (arXiv 2309.14717).

    y = W x + b + s B (A pool(x)),   pool: (..., in) -> (..., in / g), the sum or the mean of each run of g inputs
    A (r, in / g) ~ Xavier uniform, B (out, r) = 0,   s = alpha / r

B A is the same for all inputs of a group. So with W = scale (code - zero), and groups of the storage that lie within those of the pool,

    scale (code - zero) + s B A  =  scale (code - (zero - s B A / scale))         (mean: / g once more)

Merging writes these zero points where they are floats (`storage: {method: int4, zero_point: float}`, the same group size): with
fp32 metadata, which is exact up to fp32 rounding, or rounded to the base's own dtype (`requantize`), and reports the error. Into any
other storage it merges like a LoRA: to dense weights, or quantized again with loss. Everywhere else it is a LoRA of rank r with the
columns of A repeated, so it is served, stacked and exported as one. A group may be short at the end of a row; its mean is over what
it has. Parameters r (in / g + out).

Scales in circulation differ: a mean in the official code (the default here), a sum in the paper's text, in/g times the mean in
PEFT. `pooling` is saved with the adapter. Groups are of 64 by default, as those of the storages here, not of 32.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..modeling.arithmetic import linear
from ..registry import register
from .base import Adapter, AdapterConfig, pattern_value


class QALoRA(AdapterConfig):
    """Options of `qa_lora`."""

    r: int = Field(8, ge=1)
    alpha: float | None = Field(None, description="scale numerator; default r, so s = 1")
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    group_size: int = Field(64, ge=-1, description="inputs that are pooled; -1: all of them. Merges without loss into groups of that size")
    pooling: Literal["mean", "sum"] = "mean"
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}


def group_of(site, config) -> int:
    return site.in_features if config.group_size < 1 else min(config.group_size, site.in_features)


@register("adapter", "qa_lora", config=QALoRA, title="QA-LoRA: Quantization-Aware Low-Rank Adaptation of Large Language Models",
          paper="2309.14717", summary="LoRA on inputs pooled by group: merges into the float zero points of integer weights without loss",
          bibtex="@inproceedings{xu2024qalora, title={QA-LoRA: Quantization-Aware Low-Rank Adaptation of Large Language Models}, "
                 "author={Xu, Yuhui and Xie, Lingxi and Gu, Xiaotao and Chen, Xin and Chang, Heng and Zhang, Hengheng and Chen, Zhengsu "
                 "and Zhang, Xiaopeng and Tian, Qi}, booktitle={ICLR}, year={2024}}")
class QALoRAAdapter(Adapter):
    position = "metadata"

    def __init__(self, site, config, *, shared, generator):
        super().__init__(site, config, shared=shared, generator=generator)
        self.r = pattern_value(config.rank_pattern, site.name, config.r)
        self.scale = pattern_value(config.alpha_pattern, site.name, self.r if config.alpha is None else config.alpha) / self.r
        self.dropout, self.group, self.mean = config.dropout, group_of(site, config), config.pooling == "mean"
        groups = -(-site.in_features // self.group)
        bound = math.sqrt(6 / (self.r + groups))
        self.lora_A = nn.Parameter(torch.empty(self.r, groups).uniform_(-bound, bound, generator=generator))
        self.lora_B = nn.Parameter(torch.zeros(site.out_features, self.r))

    @classmethod
    def parameter_count(cls, site, config):
        groups = -(-site.in_features // group_of(site, config))
        return pattern_value(config.rank_pattern, site.name, config.r) * (groups + site.out_features)

    def _weighted(self) -> Tensor:
        """A with the factor of the mean in it (r, groups)."""
        if not self.mean:
            return self.lora_A
        last = self.in_features - (self.lora_A.shape[1] - 1) * self.group
        if last == self.group:
            return self.lora_A / self.group
        return torch.cat([self.lora_A[:, :-1] / self.group, self.lora_A[:, -1:] / last], 1)

    def factors(self, base=None):
        return self.lora_B * self.scale, self._weighted().repeat_interleave(self.group, 1)[:, : self.in_features]

    def delta(self, x, base):
        x = F.pad(self.drop(x, base), (0, -self.in_features % self.group))
        pooled = x.unflatten(-1, (-1, self.group)).sum(-1)
        return linear(linear(pooled, self._weighted().to(x.dtype)), (self.lora_B * self.scale).to(x.dtype))

    def held_by(self, product, weight, *, exact):
        return None if product.stored is None else product.stored.shifted(self.delta_weight(None) * weight, exact=exact)
