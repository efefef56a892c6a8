"""The contract of a selection: it acts before the step, between backward and the optimizer, and after the step.

State that a resume needs is in `state_dict` (tensors and plain JSON values). What changes the *structure* (ranks, which
parameters exist) is in `structure()` and is restored before the optimizer is built.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Sequence

import torch
from torch import nn

from ..registry import MethodConfig


@dataclass
class SelectionContext:
    """What a selection may act on. graft is None for full tuning. total_steps: length of the run, for schedules."""

    model: nn.Module
    graft: Any | None
    parameters: Sequence[tuple[str, nn.Parameter]]
    optimizer: torch.optim.Optimizer | None
    step: int
    total_steps: int
    seed: int


class Selection:
    """Base of all selections."""

    reads_gradients: ClassVar[bool] = False  # acts between backward and step: refuses fused per-layer updates
    full_tuning_only: ClassVar[bool] = False  # chooses among the model's own weights, not a graft's
    events_only: ClassVar[bool] = True  # works as a TrainerCallback in a foreign trainer

    def __init__(self, config: MethodConfig):
        self.config = config

    @classmethod
    def derived_traits(cls) -> dict[str, Any]:
        return {"reads_gradients": cls.reads_gradients, "full_tuning_only": cls.full_tuning_only, "events_only": cls.events_only}

    def begin(self, ctx: SelectionContext) -> None:
        """Once, after the optimizer exists (ctx.step is the step that comes next, also after a resume)."""

    def before_step(self, ctx: SelectionContext) -> None: ...

    def after_backward(self, ctx: SelectionContext) -> None: ...

    def after_step(self, ctx: SelectionContext) -> None: ...

    def structure(self) -> dict[str, Any]:
        """JSON description of structural changes made so far."""
        return {}

    def restore_structure(self, structure: dict[str, Any], model: nn.Module, graft: Any | None) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
