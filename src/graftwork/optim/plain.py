"""Base of the rules that look at one whole tensor at a time: float32 arithmetic, decay first, then the method's `move`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import BaseOptimizer, work_dtype


class PlainOptimizer(BaseOptimizer):
    """A subclass defines `slots` and `move`. Weights and state narrower than float32 are widened for one tensor and rounded once;
    what `move` gets is contiguous."""

    def update_one(self, group: dict[str, Any], p: Tensor, grad: Tensor) -> None:
        state, clock = self.prepare(group, p)
        clock.step += 1
        state["step"].add_(1)
        work = work_dtype(p.dtype)
        weight, grad = p.to(work).contiguous(), grad.to(work).contiguous()
        names = [name for name in state if name not in ("step", "compensation")]
        wide = {name: state[name].to(work) if state[name].is_floating_point() else state[name] for name in names}
        self.move(weight, self.decay(weight, grad, group), wide, group, clock.step)
        for narrow, t in [(p, weight), *((state[name], wide[name]) for name in names)]:
            if narrow is not t:
                narrow.copy_(t)

    def decay(self, weight: Tensor, grad: Tensor, group: dict[str, Any]) -> Tensor:
        """W <- (1 - lr wd) W in place; returns the gradient the rule sees."""
        if group["weight_decay"]:
            weight.mul_(1.0 - group["lr"] * group["weight_decay"])
        return grad

    def move(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any], step: int) -> None:
        """Update `weight` and `state` (the method's slots) in place; all of one dtype. `step` counts from 1."""
        raise TypeError(f"{type(self).__name__} must define move")
