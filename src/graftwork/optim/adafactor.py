"""Adafactor (arXiv 1804.04235): the second moment of a matrix kept as its row and column means.

For G (m, n), with b2_t = 1 - t^decay_rate, so that the first step forgets the zeros and no bias correction is needed:

    r <- b2_t r + (1 - b2_t) mean_j(G^2 + eps1)  (m,),   c <- b2_t c + (1 - b2_t) mean_i(G^2 + eps1)  (n,)
    U = G / sqrt(r c^T / mean(r));   U <- U / max(1, rms(U) / clip_threshold)
    s = max(eps2, rms(W)) with scale_parameter, else 1;   beta1: M <- beta1 M + (1 - beta1) lr s U,  step M;   else step lr s U
    W <- (1 - lr s wd) W;   W <- W - step

State m + n (mn more with beta1); other shapes: the last two dimensions are factored, vectors keep all of V. Order and numbers
are those of transformers' Adafactor with a given rate. Departures: scale_parameter is off by default, which is how a given
rate is used; no relative_step, whose min(1e-2, 1 / sqrt(t)) is a schedule and schedules are train.schedule's.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ..registry import register
from .base import CommonConfig, Slots, kept_dtype
from .plain import PlainOptimizer


class Adafactor(CommonConfig):
    """Options of Adafactor; names of transformers.Adafactor."""

    eps: tuple[float, float] = Field((1e-30, 1e-3), description="added to G^2, and the least rms(W) of scale_parameter")
    clip_threshold: float = Field(1.0, gt=0, description="largest rms of an update before the learning rate")
    decay_rate: float = Field(-0.8, lt=0, description="exponent of t in the decay of the second moment")
    beta1: float | None = Field(None, ge=0, lt=1, description="decay of a first moment; null keeps none")
    scale_parameter: bool = Field(False, description="multiply the learning rate by the rms of the weight")


@register("optimizer", "adafactor", config=Adafactor, title="Adafactor", paper="1804.04235",
          summary="second moment from row and column means: m + n numbers for a matrix",
          bibtex="@inproceedings{shazeer2018adafactor, title={Adafactor: Adaptive Learning Rates with Sublinear Memory Cost}, "
                 "author={Shazeer, Noam and Stern, Mitchell}, booktitle={ICML}, year={2018}}",
          projects=False, fused_capable=True, reads="gradient")
class AdafactorOptimizer(PlainOptimizer):
    """Adafactor; tensors with at least two dimensions are factored."""

    @classmethod
    def slots(cls, config: Adafactor, shape: tuple[int, ...], dtype: torch.dtype, role: str) -> Slots:
        kept = kept_dtype(dtype, config)
        first = {} if config.beta1 is None else {"exp_avg": (shape, kept)}
        if len(shape) < 2:
            return {**first, "exp_avg_sq": (shape, kept)}
        return {**first, **factored_slots("exp_avg_sq", shape, kept)}

    def decay(self, weight: Tensor, grad: Tensor, group: dict[str, Any]) -> Tensor:
        return grad  # `move` decays, by the scaled rate

    def move(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any], step: int) -> None:
        config, wd = self.config, group["weight_decay"]
        rate = torch.as_tensor(group["lr"], dtype=weight.dtype)  # stays a tensor: rms(W) is not read
        if config.scale_parameter:
            rate = rate * _rms(weight).clamp(min=config.eps[1])
        update = over_root(grad, grad.square().add_(config.eps[0]), state, "exp_avg_sq", 1.0 - step ** config.decay_rate)
        clip_rms_(update, config.clip_threshold).mul_(rate)
        if config.beta1 is not None:
            update = state["exp_avg"].mul_(config.beta1).add_(update, alpha=1.0 - config.beta1)
        if wd:
            weight.sub_(weight * (rate * wd))
        weight.sub_(update)


def _rms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x) / x.numel() ** 0.5


def clip_rms_(update: Tensor, threshold: float) -> Tensor:
    """U / max(1, rms(U) / threshold), in place."""
    return update.div_((_rms(update) / threshold).clamp_(min=1.0))


def factored_slots(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Slots:
    """Row and column means of tensors like a parameter of that shape, which has two dimensions at least."""
    return {f"{name}_row": (shape[:-1], dtype), f"{name}_col": (shape[:-2] + shape[-1:], dtype)}


def over_root(x: Tensor, square: Tensor, state: dict[str, Tensor], name: str, beta: float) -> Tensor:
    """Average `square` into the state `name` (factored, where x is no vector), and x / sqrt(average); `square` is used up."""
    if x.ndim < 2:
        return state[name].mul_(beta).add_(square, alpha=1.0 - beta).rsqrt().mul_(x)
    row = state[f"{name}_row"].mul_(beta).add_(square.mean(-1), alpha=1.0 - beta)
    column = state[f"{name}_col"].mul_(beta).add_(square.mean(-2), alpha=1.0 - beta)
    factor = (row / row.mean(-1, keepdim=True)).rsqrt_().unsqueeze(-1)
    return torch.mul(factor, column.rsqrt().unsqueeze(-2), out=square).mul_(x)
