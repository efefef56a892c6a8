"""NLoRA: three factors that start from rows and columns of W, in the way of Nystrom (arXiv 2502.14482); with SLoRA and IntTune.

    y = W x + b + s B N A x,   W (out, in) frozen, A (r, in), N (r, r), B (out, r),   s = alpha / r
    variant       start                                               trained             parameters
    nlora         A = W[I, :], B = W[:, J], N = W[I, J] or its pinv   A, N, B             r (in + out) + r^2
    inttune       the same                                            N                   r^2
    slora         A, N Kaiming uniform, B = 0                         A, N, B             r (in + out) + r^2

I, J (r,): the landmark rows and columns, the leading ones as in the official code, or (landmarks='random') a choice by the seed.
center='block' is the official code; center='pinv' is Nystrom's W ~ W[:, J] pinv(W[I, J]) W[I, :], exact for a W of rank r.

The start is subtracted (subtract_init, the default here): the adapter computes s (B N A - B0 N0 A0) x, so the output is unchanged
at the start and the base is not rewritten. subtract_init=false is the official code: the output moves by s B0 N0 A0 x, which grows
with r and with the scale of W (0.3 % of |W| at r = 8, 5 % at r = 128 for a Gaussian W of standard deviation 0.02). With pinv the start
is as large as W or larger, so it is always subtracted.

What comes from W is taken again at every load: the file of `inttune` holds N alone (r^2 numbers). As a LoRA: rank 2r where A and B
train and a start is subtracted, else r; exact. SLoRA takes nothing from W, and the options of the start do not apply to it.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..modeling.arithmetic import linear
from ..modeling.protocols import has_values
from ..registry import register
from ._three_factor import ThreeFactor, frozen, kaiming
from ._weights import check_rank, weight_of
from .base import AdapterConfig, pattern_value


class NLoRA(AdapterConfig):
    """Options of `nlora`."""

    r: int = Field(32, ge=1)
    alpha: float | None = Field(None, description="scale numerator; default r, so s = 1")
    variant: Literal["nlora", "slora", "inttune"] = "nlora"
    center: Literal["block", "pinv"] = Field("block", description="N at the start: the block of W, or its pseudo-inverse")
    landmarks: Literal["leading", "random"] = Field("leading", description="which rows and columns of W")
    subtract_init: bool = Field(True, description="start at the base; false: the official code's shifted start")
    rank_pattern: dict[str, int] = {}

    @model_validator(mode="after")
    def _applies(self):
        if self.center == "pinv" and not self.subtract_init:
            raise ValueError("center=pinv starts with a change as large as W: it needs subtract_init=true")
        if self.variant == "slora" and not (self.center == "block" and self.landmarks == "leading" and self.subtract_init):
            raise ValueError("center, landmarks and subtract_init belong to a start from W, which slora does not have")
        return self


@register("adapter", "nlora", config=NLoRA, title="NLoRA: Nyström-Initiated Low-Rank Adaptation for Large Language Models",
          paper="2502.14482", summary="three factors from rows and columns of W; SLoRA and IntTune are variants",
          bibtex="@article{guo2025nlora, title={NLoRA: Nystr{\\\"o}m-Initiated Low-Rank Adaptation for Large Language Models}, "
                 "author={Guo, Chenlu and Wu, Yuan and Chang, Yi}, journal={arXiv:2502.14482}, year={2025}}")
class NLoRAAdapter(ThreeFactor):
    def __init__(self, site, config, *, shared, generator):
        super().__init__(site, config, shared=shared, generator=generator)
        self.r = r = pattern_value(config.rank_pattern, site.name, config.r)
        check_rank("nlora", site, r)
        self.scale = 1.0 if config.alpha is None else config.alpha / r
        self.variant, self.center, self.landmarks = config.variant, config.center, config.landmarks
        self.subtracted = config.subtract_init and self.variant != "slora"
        outer = frozen if self.variant == "inttune" else lambda *shape: nn.Parameter(torch.zeros(*shape))
        self.A, self.B, self.M = outer(r, site.in_features), outer(site.out_features, r), nn.Parameter(torch.zeros(r, r))
        if self.variant == "slora":
            self.A.data.copy_(kaiming(r, site.in_features, generator))
            self.M.data.copy_(kaiming(r, r, generator))
        self.taken = ("A", "B") if self.variant == "inttune" else ()
        for name, shape in (("A0", (r, site.in_features)), ("B0", (site.out_features, r)), ("M0", (r, r))):
            needed = self.subtracted and (name == "M0" or self.variant == "nlora")
            self.register_parameter(name, frozen(*shape) if needed else None)
            self.taken += (name,) if needed else ()

    @classmethod
    def parameter_count(cls, site, config):
        r = pattern_value(config.rank_pattern, site.name, config.r)
        return r * r + (0 if config.variant == "inttune" else r * (site.in_features + site.out_features))

    def start(self, product, pristine, generator):
        if self.variant == "slora":
            return
        W = weight_of(product, pristine)
        rows, columns = (self._chosen(n, generator).to(W.device) for n in W.shape)
        A, B = W.index_select(0, rows), W.index_select(1, columns)
        block = A.index_select(1, columns)
        M = torch.linalg.pinv(block) if self.center == "pinv" and has_values(block) else block
        for name, value in (("A", A), ("B", B), ("M", M)):
            getattr(self, name).copy_(value)
            if getattr(self, name + "0") is not None:
                getattr(self, name + "0").copy_(value)

    def _chosen(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.arange(self.r) if self.landmarks == "leading" else torch.randperm(n, generator=generator)[: self.r].sort().values

    def middle(self):
        moved = self.M - self.M0 if self.variant == "inttune" and self.subtracted else self.M
        return moved if self.scale == 1.0 else moved * self.scale

    def _outer_pair(self) -> tuple[Tensor, Tensor] | None:
        """(B0, A0) of a start that does not share its outer factors with the trained change."""
        return None if self.A0 is None else (self.B0 @ (self.M0 * self.scale), self.A0)

    def factors(self, base=None):
        B, A = super().factors(base)
        pair = self._outer_pair()
        return (B, A) if pair is None else (torch.cat([B, pair[0]], 1), torch.cat([A, -pair[1]]))

    def delta(self, x, base):
        change = super().delta(x, base)
        if self.A0 is None:
            return change
        hidden = linear(linear(x, self.A0.to(x.dtype)), (self.M0 * self.scale).to(x.dtype))
        return change - linear(hidden, self.B0.to(x.dtype))

    def base_edit(self):
        if not self.subtracted:
            return None
        return self._outer_pair() or (self.B @ (self.M0 * self.scale), self.A)
