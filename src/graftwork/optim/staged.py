"""The composition: subspace -> rule -> residual -> apply, one parameter at a time.

    basis = refresh(G) if due;  R = project(G);  N = rule(R);  U = residual(G, R, N);  W -= lr c_t U;  W -= lr wd W

A method is a config class and a function from it to `Stages`. Weights narrower than float32 are updated in a float32 copy of
that one tensor and rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .base import BaseOptimizer, Clock, OptimizerConfig, Slots, kept_dtype, work_dtype
from .residuals import Dropped, NormScaled
from .rules import Adam, Moments
from .subspace import RandomSubspace, SVDSubspace, project


@dataclass
class Stages:
    """One choice per stage. `moments`: what a refresh does to the rule's moments."""

    subspace: SVDSubspace | RandomSubspace
    rule: Adam
    residual: Dropped | NormScaled
    moments: Moments = "keep"


class StagedOptimizer(BaseOptimizer):
    """Base of the projecting optimizers: a subclass gives `build(config) -> Stages`."""

    def __init__(self, params, config: OptimizerConfig | None = None, **options: Any):
        super().__init__(params, config, **options)
        self.stages = self.build(self.config)
        self.uses_seed = self.stages.subspace.seeded

    @classmethod
    def build(cls, config: OptimizerConfig) -> Stages:
        raise TypeError(f"{cls.__name__} must define build")

    @classmethod
    def slots(cls, config: OptimizerConfig, shape: tuple[int, ...], dtype: torch.dtype, role: str) -> Slots:
        stages = cls.build(config)
        kept = kept_dtype(dtype, config)
        if not stages.subspace.accepts(shape, role):
            return stages.rule.slots(shape, kept)
        return {**stages.subspace.slots(shape, kept), **stages.rule.slots(stages.subspace.low_shape(shape), kept),
                **stages.residual.slots()}

    def update_one(self, group: dict[str, Any], p: Tensor, grad: Tensor) -> None:
        state, clock = self.prepare(group, p)
        work = work_dtype(p.dtype)
        weight, grad = p.to(work), grad.to(work)
        if self.stages.subspace.accepts(tuple(p.shape), group["role"]):
            self._update_projected(group, weight, grad, state, clock)
        else:
            clock.step += 1
            self.stages.rule.update_plain(weight, grad, state, group["lr"], clock.step)
        if group["weight_decay"]:
            weight.add_(weight, alpha=-group["lr"] * group["weight_decay"])
        if weight is not p:
            p.copy_(weight)

    def _update_projected(self, group: dict[str, Any], weight: Tensor, grad: Tensor, state: dict[str, Tensor],
                          clock: Clock) -> None:
        subspace, rule, residual = self.stages.subspace, self.stages.rule, self.stages.residual
        if subspace.due(clock):
            self._refresh(grad, state, clock)
        basis = subspace.basis(grad, state, clock)
        low = project(grad, basis)
        direction = rule.direction(low, state)
        clock.step += 1
        state["step"].add_(1)
        # Moments that start again at a refresh start their bias correction again.
        age = clock.step if self.stages.moments != "reset" else (clock.step - 1) % subspace.gap + 1
        update, factor = residual.update(grad, low, direction, basis, state, clock.step)
        update.add_to(weight, -group["lr"] * rule.correction(age) * factor)

    def _refresh(self, grad: Tensor, state: dict[str, Tensor], clock: Clock) -> None:
        subspace, moments = self.stages.subspace, self.stages.moments
        if clock.step == 0 or moments == "keep":
            subspace.refresh(grad, state, clock)
            return
        old = [None if q is None else q.clone() for q in subspace.basis(grad, state, clock)]
        subspace.refresh(grad, state, clock)
        new = subspace.basis(grad, state, clock)
        maps = tuple(None if q is None else q @ fresh.T for q, fresh in zip(old, new))
        self.stages.rule.change_basis(state, moments, maps)
