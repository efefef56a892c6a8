"""The composition: subspace -> rule -> residual -> apply, one parameter at a time.

    basis = refresh(G) if due;  R = transform(project(G));  N = rule(R);  U = residual(G, R, N);  W -= lr c_t U;  W -= lr wd W

A limiter is part of the residual stage it limits. `transform` is there for methods that precondition R (else R itself).

A method is a config class and a function from it to `Stages`. Weights narrower than float32 are updated in a float32 copy of
that one tensor and rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .base import BaseOptimizer, Clock, OptimizerConfig, Slots, kept_dtype, work_dtype
from .residuals import Update
from .rules import Adam, Moments
from .subspace import Basis, Subspace, project


class Residual(Protocol):
    """From N back to an update of the whole weight."""

    def slots(self) -> Slots: ...

    def update(self, grad: Tensor, low: Tensor, direction: Tensor, basis: Basis, state: dict[str, Tensor],
               step: int) -> tuple[Update, float]: ...


class Transform(Protocol):
    """From R to a preconditioned R. `restart` is told of a refresh, with the maps of `Adam.change_basis` or None."""

    def slots(self, shape: tuple[int, ...], dtype: torch.dtype) -> Slots: ...

    def apply(self, low: Tensor, state: dict[str, Tensor], step: int) -> Tensor: ...

    def restart(self, state: dict[str, Tensor], maps: tuple[Tensor | None, Tensor | None] | None) -> None: ...


@dataclass
class Stages:
    """One choice per stage. `moments`: what a refresh does to the rule's moments. `decay_first`: W -= lr wd W before the update."""

    subspace: Subspace
    rule: Adam
    residual: Residual
    moments: Moments = "keep"
    transform: Transform | None = None
    decay_first: bool = False


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
        low = stages.subspace.low_shape(shape)
        return {**stages.subspace.slots(shape, kept), **stages.rule.slots(low, kept),
                **(stages.transform.slots(low, kept) if stages.transform else {}), **stages.residual.slots()}

    @classmethod
    def elementwise(cls, config: OptimizerConfig, shape: tuple[int, ...], role: str) -> bool:
        return not cls.build(config).subspace.accepts(shape, role)

    def update_one(self, group: dict[str, Any], p: Tensor, grad: Tensor) -> None:
        state, clock = self.prepare(group, p)
        work = work_dtype(p.dtype)
        weight, grad = p.to(work), grad.to(work)
        decay = 1.0 - group["lr"] * group["weight_decay"]
        if self.stages.decay_first and decay != 1.0:
            weight.mul_(decay)  # `weight` is p itself or its copy in the working type, written back below
        if self.stages.subspace.accepts(tuple(p.shape), group["role"]):
            self._update_projected(group, weight, grad, state, clock)
        else:
            clock.step += 1
            self.stages.rule.update_plain(weight, grad, state, group["lr"], clock.step)
        if not self.stages.decay_first and decay != 1.0:
            weight.add_(weight, alpha=-group["lr"] * group["weight_decay"])
        if weight is not p:
            p.copy_(weight)

    def _update_projected(self, group: dict[str, Any], weight: Tensor, grad: Tensor, state: dict[str, Tensor],
                          clock: Clock) -> None:
        subspace, rule, residual = self.stages.subspace, self.stages.rule, self.stages.residual
        if subspace.due(clock, state):
            self._refresh(grad, state, clock)
        basis = subspace.basis(grad, state, clock)
        low = project(grad, basis)
        clock.step += 1
        state["step"].add_(1)
        if self.stages.transform:
            low = self.stages.transform.apply(low, state, clock.step)
        # Moments that start again at a refresh start their bias correction again.
        age = clock.step if self.stages.moments != "reset" else (clock.step - 1) % subspace.gap + 1
        direction = rule.direction(low, state, age)
        update, factor = residual.update(grad, low, direction, basis, state, clock.step)
        update.add_to(weight, -group["lr"] * rule.correction(age) * factor)

    def _refresh(self, grad: Tensor, state: dict[str, Tensor], clock: Clock) -> None:
        subspace, moments, transform = self.stages.subspace, self.stages.moments, self.stages.transform
        rotate = moments == "rotate" and clock.step > 0
        old = [None if q is None else q.clone() for q in subspace.basis(grad, state, clock)] if rotate else []
        subspace.refresh(grad, state, clock)
        if clock.step == 0:
            return
        maps = None
        if rotate:
            new = subspace.basis(grad, state, clock)
            maps = tuple(None if q is None else q @ fresh.T for q, fresh in zip(old, new))
        if moments != "keep":
            self.stages.rule.change_basis(state, moments, maps)
        if transform:
            transform.restart(state, maps)
