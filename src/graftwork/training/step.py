"""One optimizer step, as the trainer runs it and as the planner simulates it: the same code.

    selections.before_step -> estimator (all micro-batches) -> selections.after_backward -> clip -> optimizer.step
    -> zero_grad -> selections.after_step
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Sequence

import torch
from torch import Tensor, nn

from ..estimators.base import Estimator, StepContext, StepResult
from ..modeling.state import state_of
from ..selection.base import Selection, SelectionContext


@dataclass
class TrainStep:
    """The parts of a recipe that act in a step. `grafts`: the grafts being trained (several for a fleet, none for full
    tuning); `clip_groups`: parameters that are clipped together (one list, or one per adapter of a fleet)."""

    model: nn.Module
    objective: Any
    estimator: Estimator
    parameters: Sequence[tuple[str, nn.Parameter]]
    grafts: Sequence[Any] = ()
    selections: Sequence[Selection] = ()
    optimizer: torch.optim.Optimizer | None = None
    max_grad_norm: float = 0.0
    clip_groups: Sequence[Sequence[nn.Parameter]] = ()
    total_steps: int = 0
    seed: int = 0
    forward_model: nn.Module | None = None
    _begun: bool = field(default=False, repr=False)

    def context(self, step: int) -> SelectionContext:
        graft = self.grafts[0] if self.grafts else None
        return SelectionContext(self.model, graft, self.parameters, self.optimizer, step, self.total_steps, self.seed)

    def compute(self, batches: Sequence[dict[str, Any]], step: int, lr: float = 0.0) -> StepResult:
        """Up to and with clipping: gradients are ready, the optimizer has not moved."""
        ctx = self.context(step)
        if not self._begun:
            for selection in self.selections:
                selection.begin(ctx)
            self._begun = True
        for selection in self.selections:
            selection.before_step(ctx)
        holder = state_of(self.model)
        result = self.estimator.step(StepContext(
            self.forward_model or self.model, self.objective, self.parameters, batches, self.row_scales(batches), holder,
            step, self.seed, lr, self.optimizer, self.auxiliary_loss))
        for selection in self.selections:
            selection.after_backward(ctx)
        if not result.updated and self.max_grad_norm > 0 and not getattr(self.optimizer, "is_fused", False):
            norms = [nn.utils.clip_grad_norm_(group, self.max_grad_norm) for group in self.clip_groups or [
                [p for _, p in self.parameters]]]
            result.metrics = {**result.metrics, "grad_norm": torch.stack([n.detach() for n in norms]).max()}
        return result

    def finish(self, step: int) -> None:
        """After the optimizer moved and gradients were dropped."""
        ctx = self.context(step)
        for selection in self.selections:
            selection.after_step(ctx)

    def run(self, batches: Sequence[dict[str, Any]], step: int, lr: float = 0.0) -> StepResult:
        """A whole step, for callers without a Trainer (the planner, tests)."""
        result = self.compute(batches, step, lr)
        if not result.updated:
            assert self.optimizer is not None
            self.optimizer.step()
        for _, parameter in self.parameters:
            parameter.grad = None
        self.finish(step)
        return result

    def row_scales(self, batches: Sequence[dict[str, Any]]) -> list[float | Tensor]:
        """One over the step's loss terms; for a fleet, per row one over the terms of its own adapter in this step."""
        if not any(batch.get("rows") is not None for batch in batches):
            total = sum(self.objective.targets(batch) for batch in batches)
            return [1.0 / max(total, 1)] * len(batches)
        totals: dict[str | None, int] = {}
        for batch in batches:
            for name, count in zip(batch["rows"], self.objective.targets_by_row(batch)):
                totals[name] = totals.get(name, 0) + count
        return [torch.tensor([1.0 / max(totals[name], 1) for name in batch["rows"]]) for batch in batches]

    def auxiliary_loss(self) -> Tensor | None:
        """Sum of the terms that adapters add to the loss, or None."""
        terms = [t for graft in self.grafts for adapter in graft.adapters.values()
                 if (t := adapter.auxiliary_loss()) is not None]
        return torch.stack(terms).sum() if terms else None
