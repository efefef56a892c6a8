"""Bottleneck adapters (arXiv 1902.00751), in series with a map or parallel to it (arXiv 2110.04366).

    serial:    y' = y + s (U act(D y + b_D) + b_U)     y = W x + b (out,)   D (r, out), b_D (r,), U (out, r), b_U (out,)
    parallel:  y' = y + s (U act(D x + b_D) + b_U)     x (in,)              D (r, in)
    start: D ~ U(-1/sqrt(width), 1/sqrt(width)), U = 0, biases 0, so y' = y

The default sites are the maps that write to the residual stream, the output projections of attention and feed-forward: there a
serial network is the paper's adapter. Parameters a site: r (width + out), and r + out more with biases (width: out or in).
Nothing can be merged: the change is no linear function of x (activation=identity is kept unmergeable too; that is a LoRA).

Differs from the papers: the layer norms stay frozen (serial adapters trained them too). U starts at exactly zero, not at
a small Gaussian. The parallel form reads the input of its site, not that of the whole sublayer. Experts of a mixture get
one network each. No initializer can start it: it has no factors.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import nn

from ..registry import register
from ._serial import ACTIVATION_PATTERN, SerialAdapter
from .base import AdapterConfig

#: output projections: of attention, of gated and plain feed-forward, of experts
OUTPUTS = ["o", "down", "fc2", "down_proj"]


class Bottleneck(AdapterConfig):
    """Options of `bottleneck`."""

    target_modules: str | list[str] = OUTPUTS
    r: int = Field(64, ge=1, description="width of the bottleneck")
    activation: str = Field("gelu", pattern=ACTIVATION_PATTERN, description="relu, gelu, silu, tanh or identity")
    scaling: float = Field(1.0, gt=0.0, description="s; 4 is usual for the parallel form")
    position: str = Field("serial", pattern="^(serial|parallel)$", description="read the output of the site, or its input")
    bias: bool = Field(True, description="biases of both maps")
    rank_pattern: dict[str, int] = {}


@register("adapter", "bottleneck", config=Bottleneck, title="Parameter-Efficient Transfer Learning for NLP", paper="1902.00751",
          aliases=("houlsby",), summary="a small non-linear network behind (or beside) each output projection",
          bibtex="@inproceedings{houlsby2019parameter, title={Parameter-Efficient Transfer Learning for NLP}, author={Houlsby, Neil "
                 "and Giurgiu, Andrei and Jastrzebski, Stanislaw and Morrone, Bruna and de Laroussilhe, Quentin and Gesmundo, "
                 "Andrea and Attariyan, Mona and Gelly, Sylvain}, booktitle={ICML}, year={2019}}")
class BottleneckAdapter(SerialAdapter):
    def __init__(self, site, config, *, shared, generator):
        super().__init__(site, config, shared=shared, generator=generator)
        self.r, self.activation, self.reads, self.scale = (
            self.rank_of(site, config), config.activation, config.position, config.scaling)
        width = self.width(site, config)
        bound = 1.0 / math.sqrt(width)
        self.down = nn.Parameter(torch.empty(self.r, width).uniform_(-bound, bound, generator=generator))
        self.up = nn.Parameter(torch.zeros(site.out_features, self.r))
        self.register_parameter("down_bias", nn.Parameter(torch.zeros(self.r)) if config.bias else None)
        self.register_parameter("up_bias", nn.Parameter(torch.zeros(site.out_features)) if config.bias else None)

    @classmethod
    def parameter_count(cls, site, config):
        r = cls.rank_of(site, config)
        return r * (cls.width(site, config) + site.out_features) + (r + site.out_features if config.bias else 0)

    def weights(self):
        return self.down, self.down_bias, self.up, self.up_bias
