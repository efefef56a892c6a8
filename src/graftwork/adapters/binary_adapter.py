"""Binary bottleneck adapters: bottleneck networks whose weights take 1, 2 or 4 bits (arXiv 2307.16867).

    serial:    y' = y + s U^ act(D^ y)     y = W x + b (out,)    D^ (r, out), U^ (out, r)
    parallel:  y' = y + s U^ act(D^ x)     x (in,)               D^ (r, in)
    w^ = q((w - mean w) / std w) std w + mean w: the nearest of 2^b levels, trained through the quantizer (_binary.py)
    start: D ~ U(-1/sqrt(width), 1/sqrt(width)), U ~ N(0, 0.001) cut at 0.002, so y' is close to y but not equal

Trained: r (width + out) numbers a site. Stored: ceil(numel b / 8) + 8 bytes for each of D and U, 1/32 of an fp32 network at one
bit. `binary_lora` is the linear form. Nothing can be merged.

Differs from the official code: the serial form at output projections is the default, the paper's own form is the parallel one;
numbers that fill no whole byte are kept (the official packer drops them); codes are found by a search of the
boundaries, not by a comparison with every level. No dropout in the network, no biases (the paper has none), no quantized head:
modules_to_save are kept in fp32.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field

from ..registry import register
from ._binary import BinaryWeights, small_normal
from ._serial import ACTIVATION_PATTERN, SerialAdapter
from .base import AdapterConfig
from .bottleneck import OUTPUTS

BIBTEX = ("@inproceedings{jie2023revisiting, title={Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision "
          "Redundancy}, author={Jie, Shibo and Wang, Haoqing and Deng, Zhi-Hong}, booktitle={ICCV}, year={2023}}")
TITLE = "Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision Redundancy"


class BinaryAdapter(AdapterConfig):
    """Options of `binary_adapter`."""

    target_modules: str | list[str] = OUTPUTS
    r: int = Field(32, ge=1, description="width of the bottleneck")
    bits: Literal[1, 2, 4] = Field(1, description="1, 2 or 4 bits a weight")
    activation: str = Field("relu", pattern=ACTIVATION_PATTERN, description="relu, gelu, silu, tanh or identity")
    scaling: float = Field(1.0, gt=0.0, description="s; searched per task in the paper")
    position: str = Field("serial", pattern="^(serial|parallel)$", description="read the output of the site, or its input")
    rank_pattern: dict[str, int] = {}


@register("adapter", "binary_adapter", config=BinaryAdapter, title=TITLE, paper="2307.16867", bibtex=BIBTEX,
          summary="bottleneck networks trained and stored in 1, 2 or 4 bits a weight")
class BinaryBottleneckAdapter(BinaryWeights, SerialAdapter):
    starts_at_identity = False  # a quantizer of zeros has no scale

    def __init__(self, site, config, *, shared, generator):
        super().__init__(site, config, shared=shared, generator=generator)
        self.r, self.activation, self.reads, self.scale = (
            self.rank_of(site, config), config.activation, config.position, config.scaling)
        width = self.width(site, config)
        bound = 1.0 / math.sqrt(width)
        self.keep(config.bits, down=torch.empty(self.r, width).uniform_(-bound, bound, generator=generator),
                  up=small_normal(site.out_features, self.r, generator=generator))

    @classmethod
    def parameter_count(cls, site, config):
        return cls.rank_of(site, config) * (cls.width(site, config) + site.out_features)

    def weights(self):
        return self.weight("down"), None, self.weight("up"), None
