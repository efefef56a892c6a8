"""Learning rates as a function of (group, step). LambdaLR holds one function per group that existed when it was made and
fails when groups are added later; this reads the groups that are there."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch


def factor(step: int, total: int, warmup: float, kind: str) -> float:
    """Share of the base rate at optimizer step `step` (from 0) of `total`. warmup below 1 is a share of total, else steps.

    Linear from 1/(w+1) over the w warm-up steps (a first step with rate 0 would do nothing), then constant, linear to 0, or
    half a cosine to 0."""
    steps = math.ceil(warmup * total) if warmup < 1 else int(warmup)
    if step < steps:
        return (step + 1) / (steps + 1)
    if kind == "constant":
        return 1.0
    progress = (step - steps) / max(total - steps, 1)
    return max(0.0, 1.0 - progress) if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


class GroupSchedule:
    """What the Trainer calls a scheduler. `of_group(group, step)` gives the factor of a group; its rate is
    base_lr * lr_scale * factor."""

    def __init__(self, optimizer: torch.optim.Optimizer, of_group: Callable[[dict[str, Any], int], float]):
        self.optimizer, self.of_group, self.last_step = optimizer, of_group, 0
        self.apply()

    def apply(self) -> None:
        for group in self.optimizer.param_groups:
            base = group.setdefault("base_lr", group["lr"])
            group["lr"] = base * group.get("lr_scale", 1.0) * self.of_group(group, self.last_step)

    def step(self) -> None:
        self.last_step += 1
        self.apply()

    def get_last_lr(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, int]:
        return {"last_step": self.last_step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.last_step = int(state["last_step"])
        self.apply()


class NoOptimizer(torch.optim.Optimizer):
    """Stands where the Trainer wants an optimizer while the estimator moves the parameters itself; carries the rate."""

    def __init__(self, params, lr: float):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        return None
