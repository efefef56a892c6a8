"""SoRA: sparse low-rank adaptation (arXiv 2311.11696). LoRA with a gate per rank; selection `sora` drives gates to exact zero.

    y = W x + b + s B (g * (A dropout(x))),   A (r, in), g (r,), B (out, r),   s = alpha / r
    start: A Kaiming uniform (a = sqrt 5), B = 0, g ~ N(0, 1), so y is unchanged
    loss += l1 * mean |g| over all gates of the graft
    r (in + out + 1) trained values; a row whose gate is zero is not saved, and s keeps the r of the config

The gates have no weight decay, as in the official code. There the mean is over what the code calls gates, one a rank; here too.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import nn

from ..registry import register
from ._gated import GatedAdapter, GatedConfig


class SoRA(GatedConfig):
    """Options of `sora`."""

    l1: float = Field(0.0, ge=0.0, description="factor of the mean |gate| in the loss (the official code's sparse_lambda)")


@register("adapter", "sora", config=SoRA, title="SoRA: Sparse Low-rank Adaptation of Pre-trained Language Models", paper="2311.11696",
          summary="LoRA with a gate per rank, which selection sora prunes to exact zero",
          bibtex="@inproceedings{ding2023sora, title={Sparse Low-rank Adaptation of Pre-trained Language Models}, author={Ding, Ning "
                 "and Lv, Xingtai and Wang, Qiaosen and Chen, Yulin and Zhou, Bowen and Liu, Zhiyuan and Sun, Maosong}, "
                 "booktitle={EMNLP}, year={2023}}")
class SoRAAdapter(GatedAdapter):
    def __init__(self, site, config, *, shared, generator):
        super().__init__(site, config, shared=shared, generator=generator)
        bound = 1.0 / math.sqrt(site.in_features)
        self.lora_A = nn.Parameter(torch.empty(self.r, site.in_features).uniform_(-bound, bound, generator=generator))
        self.gate = nn.Parameter(torch.randn(self.r, generator=generator))
        self.lora_B = nn.Parameter(torch.zeros(site.out_features, self.r))
        self.l1 = config.l1

    @classmethod
    def parameter_count(cls, site, config):
        return config.r * (site.in_features + site.out_features + 1)

    def auxiliary_loss(self):
        return self.l1 * self.gate.abs().sum() / (self.r * self.shared.sites) if self.l1 else None

    def parameter_groups(self):
        return [{"params": [p for p in (self.lora_A, self.lora_B) if p.requires_grad], "lr_scale": 1.0},
                {"params": [self.gate] if self.gate.requires_grad else [], "lr_scale": 1.0, "weight_decay": 0.0}]
