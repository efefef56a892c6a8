"""Binary LoRA: low-rank factors of 1, 2 or 4 bits a number (arXiv 2307.16867).

    y = W x + b + s B^ (A^ x),   A (r, in), B (out, r) trained
    w^ = q((w - mean w) / std w) std w + mean w: the nearest of 2^b levels, trained through the quantizer (_binary.py)
    start: A ~ U(-1/sqrt(in), 1/sqrt(in)), B ~ N(0, 0.001) cut at 0.002, so the change is small but not zero

Trained: r (in + out) numbers a site. Stored: ceil(numel b / 8) + 8 bytes for each factor, 1/32 of a LoRA at one bit. It is a LoRA
with factors A^, B^, so it merges and converts exactly; what it is merged into keeps the precision of the base.

Differs from the paper: sites are chosen freely (the paper has q and v); the quantized head is not here, modules_to_save
are kept in fp32.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field

from ..registry import register
from ._binary import BinaryWeights, small_normal
from ._weights import check_rank
from .base import Adapter, AdapterConfig, pattern_value
from .binary_adapter import BIBTEX, TITLE


class BinaryLoRA(AdapterConfig):
    """Options of `binary_lora`."""

    r: int = Field(32, ge=1)
    bits: Literal[1, 2, 4] = Field(1, description="1, 2 or 4 bits a number")
    scaling: float = Field(1.0, gt=0.0, description="s; searched per task in the paper")
    rank_pattern: dict[str, int] = {}


@register("adapter", "binary_lora", config=BinaryLoRA, title=TITLE, paper="2307.16867", bibtex=BIBTEX,
          summary="LoRA factors trained and stored in 1, 2 or 4 bits a number")
class BinaryLoRAAdapter(BinaryWeights, Adapter):
    starts_at_identity = False  # a quantizer of zeros has no scale

    def __init__(self, site, config, *, shared, generator):
        super().__init__(site, config, shared=shared, generator=generator)
        self.r, self.scale = pattern_value(config.rank_pattern, site.name, config.r), config.scaling
        check_rank("binary_lora", site, self.r)
        bound = 1.0 / math.sqrt(site.in_features)
        self.keep(config.bits, A=torch.empty(self.r, site.in_features).uniform_(-bound, bound, generator=generator),
                  B=small_normal(site.out_features, self.r, generator=generator))

    @classmethod
    def parameter_count(cls, site, config):
        return pattern_value(config.rank_pattern, site.name, config.r) * (site.in_features + site.out_features)

    def factors(self, base=None):
        return self.weight("B") * self.scale, self.weight("A")
