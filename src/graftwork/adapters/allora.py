"""ALLoRA: LoRA whose up-projection learns row by row at its own rate (arXiv 2410.09692); no dropout, no alpha.

    y = W x + b + B A x,   A (r, in) uniform as in LoRA, B (out, r) zero at the start, no scale
    rate of row i of B:    gain_i = 1 / sqrt(||B_i|| + 1 / eta^2),   of the norm before the step, anew at every step

The gain is eta while a row is zero and falls like ||B_i||^(-1/2): B leaves zero fast, then slows down. eta takes the place of
alpha and dropout. Parameters r (in + out).

`gain_on` says what is multiplied. `update` (default): the step that the optimizer makes, decay included, which is a learning
rate per row whatever the optimizer. `gradient`: the gradient of B, as the paper writes it. The two are the same for
SGD; Adam divides a row's constant gain out again, so that under Adam `gradient` is nearly plain LoRA. `update` needs an
optimizer of this library (others ignore the group's `update_gain`); `gradient` works with any, and clipping sees scaled
gradients. Estimators that move the weights themselves (MeZO) know no rates of groups and ignore the gain, as they do LoRA+'s.

Differs from the paper: the place, see above. Its published value of eta is not known to us; 2 is the one public
implementations use.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ..registry import register
from ._weights import check_rank
from .base import AdapterConfig, pattern_value
from .lora import LoRA, LoRAAdapter


class ALLoRA(AdapterConfig):
    """Options of `allora`."""

    r: int = Field(8, ge=1)
    eta: float = Field(2.0, gt=0.0, allow_inf_nan=False, description="gain of a row of B that is zero")
    gain_on: Literal["update", "gradient"] = Field("update", description="what the gain multiplies")
    rank_pattern: dict[str, int] = {}


def row_gain(weight: Tensor, eta: float) -> Tensor:
    """1 / sqrt(||row|| + 1 / eta^2): (out, r) -> (out, 1)."""
    return torch.rsqrt(torch.linalg.vector_norm(weight, dim=1, keepdim=True) + 1.0 / eta**2)


@cache
def gain_of(eta: float) -> Callable[[Tensor], Tensor]:
    """One object per eta, so that the groups of all sites are one group."""
    return partial(row_gain, eta=eta)


class _GainOnGradient(torch.autograd.Function):
    """B itself; its gradient is multiplied row by row."""

    @staticmethod
    def forward(ctx, weight, eta):
        ctx.save_for_backward(weight)
        ctx.eta = eta
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return grad * row_gain(weight, ctx.eta), None


@register("adapter", "allora", config=ALLoRA, title="ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws",
          paper="2410.09692", summary="LoRA without alpha and dropout; each row of B has a rate that falls with its norm",
          bibtex="@article{huang2024allora, title={ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws}, author={Huang, "
                 "Hai and Balestriero, Randall}, journal={arXiv preprint arXiv:2410.09692}, year={2024}}")
class ALLoRAAdapter(LoRAAdapter):
    def __init__(self, site, config, *, shared, generator):
        r = pattern_value(config.rank_pattern, site.name, config.r)
        check_rank("allora", site, r)
        super().__init__(site, LoRA(r=r), shared=shared, generator=generator)
        self.eta, self.on_gradient = config.eta, config.gain_on == "gradient"

    @classmethod
    def parameter_count(cls, site, config):
        return pattern_value(config.rank_pattern, site.name, config.r) * (site.in_features + site.out_features)

    def factors(self, base=None):
        if self.on_gradient and torch.is_grad_enabled() and self.lora_B.requires_grad:
            return _GainOnGradient.apply(self.lora_B, self.eta), self.lora_A
        return self.lora_B, self.lora_A

    def parameter_groups(self):
        up = {"params": [self.lora_B], "lr_scale": 1.0}
        return [{"params": [self.lora_A], "lr_scale": 1.0}, up if self.on_gradient else {**up, "update_gain": gain_of(self.eta)}]
