"""One optimizer step, as the trainer runs it and as the planner simulates it: the same code.

    selections.before_step -> estimator (all micro-batches) -> selections.after_backward -> clip -> optimizer.step
    -> zero_grad -> selections.after_step
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..estimators.base import Estimator, StepContext, StepResult
from ..modeling.protocols import has_values
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
    calibration: Callable[[], Iterable[dict[str, Any]]] | None = None  # see SelectionContext.batches
    stopped: dict[str, str] = field(default_factory=dict)
    """Members of a fleet that have diverged, with the reason: they keep the values of their last finite step."""
    _begun: bool = field(default=False, repr=False)

    def context(self, step: int) -> SelectionContext:
        graft = self.grafts[0] if self.grafts else None
        return SelectionContext(self.model, graft, self.parameters, self.optimizer, step, self.total_steps, self.seed)

    def heaviest_steps(self) -> range:
        """Those of the selection whose heaviest ones begin last."""
        return max((s.heaviest_steps(self.context(0)) for s in self.selections), key=lambda steps: steps.start,
                   default=range(self.total_steps))

    def compute(self, batches: Sequence[dict[str, Any]], step: int, lr: float | None = None) -> StepResult:
        """Up to and with clipping: gradients are ready, the optimizer has not moved."""
        ctx, first = self.context(step), not self._begun
        ctx.batches = self.calibration or (lambda: batches)
        if first:
            for selection in self.selections:
                selection.begin(ctx)
            self._begun = True
        for selection in self.selections:
            selection.before_step(ctx)
        holder = state_of(self.model)
        present = {name for batch in batches for name in batch.get("rows") or ()}
        result = self.estimator.step(StepContext(
            self.forward_model or self.model, self.objective, self.parameters, batches, self.row_scales(batches), holder,
            step, self.seed, lr, self.optimizer, lambda: self.auxiliary_loss(present)))
        fused = getattr(getattr(self.optimizer, "config", None), "fused", False)
        if first and not (fused or result.updated or self.estimator.moves_some or self.selections) and has_values(result.loss):
            self._warn_of_silent_sites(present)
        if present:
            self._by_adapter(batches, result, step)
        for selection in self.selections:
            selection.after_backward(ctx)
        if not result.updated and self.max_grad_norm > 0 and not fused:
            norms = [nn.utils.clip_grad_norm_(group, self.max_grad_norm) for group in self.clip_groups or [
                [p for _, p in self.parameters]]]
            result.metrics = {**result.metrics, "grad_norm": torch.stack([n.detach() for n in norms]).max()}
        return result

    def _warn_of_silent_sites(self, present: set[str]) -> None:
        """After the first backward pass: sites that no gradient has reached. Experts may have had no token."""
        silent = [name for graft in self.grafts if not present or graft.name in present for name, adapter in graft.adapters.items()
                  if name in graft.sites and graft.sites[name].expert is None
                  and (trained := [p for p in adapter.parameters() if p.requires_grad]) and all(p.grad is None for p in trained)]
        if silent:
            shown = ", ".join(silent[:4]) + ", ..." * (len(silent) > 4)
            warnings.warn(f"no gradient reached {len(silent)} sites in the first step ({shown}): the model does not call these maps, or "
                          "not for this data; leave them out with exclude_modules", stacklevel=3)

    def finish(self, step: int) -> None:
        """After the optimizer moved and gradients were dropped."""
        ctx = self.context(step)
        for selection in self.selections:
            selection.after_step(ctx)

    def site_maps(self, step: int) -> dict[str, dict[str, float]]:
        """{what a selection shows: {site or layer: number}} after a step; empty without such a selection."""
        ctx = self.context(step)
        return {s.shows: found for s in self.selections if s.shows is not None and (found := s.site_map(ctx))}

    def run(self, batches: Sequence[dict[str, Any]], step: int, lr: float | None = None) -> StepResult:
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

    def _by_adapter(self, batches: Sequence[dict[str, Any]], result: StepResult, step: int) -> None:
        """The mean loss of each adapter of a fleet as a metric; the step's loss becomes their mean. Those that have diverged get no
        gradient and do not count; when none is left the loss is NaN."""
        sums: dict[str, list[Tensor]] = {}
        for batch, scales, (row_loss, _) in zip(batches, self.row_scales(batches), result.rows):
            scaled = row_loss * scales.to(row_loss.device)
            for name in dict.fromkeys(batch["rows"]):
                own = torch.tensor([i for i, row in enumerate(batch["rows"]) if row == name], device=scaled.device)
                sums.setdefault(str(name), []).append(scaled.index_select(0, own).sum())
        losses = {name: torch.stack(parts).sum() for name, parts in sums.items()}
        if has_values(result.loss):
            self._stop_diverged(losses, step)
        live = {name: loss for name, loss in losses.items() if name not in self.stopped}
        result.metrics = {**result.metrics, **{f"loss/{name}": loss for name, loss in live.items()}}
        if len(live) == len(losses):
            result.loss = result.loss / len(losses)
        else:
            result.loss = torch.stack(list(live.values())).mean() if live else torch.full_like(result.loss, torch.nan)

    @torch.no_grad()
    def _stop_diverged(self, losses: dict[str, Tensor], step: int) -> None:
        """Stops the members whose loss or gradient is not finite, and drops the gradients of all that are stopped. A row's values
        reach no adapter but its own, so the others are as if they trained alone."""
        members = [graft for graft in self.grafts if graft.name in losses]
        new = [graft for graft in members if graft.name not in self.stopped]
        if new:
            norms = [torch.stack([n.float() for n in torch._foreach_norm(grads)]).sum() if grads else losses[graft.name].new_zeros(())
                     for graft in new for grads in [[p.grad for p in graft.parameters() if p.grad is not None]]]
            values = torch.stack([torch.stack([losses[g.name].float(), n.to(losses[g.name].device)]) for g, n in zip(new, norms)])
            for graft, (loss, norm) in zip(new, values.tolist()):
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    what = f"its loss became {loss}" if not math.isfinite(loss) else "its gradient is not finite"
                    self.stopped[graft.name] = f"{what} at step {step + 1}"
        for graft in members:
            if graft.name in self.stopped:
                for parameter in graft.parameters():
                    parameter.grad = None

    def auxiliary_loss(self, present: set[str] | None = None) -> Tensor | None:
        """Sum of the terms that adapters add to the loss, or None. present: only grafts of these names (a fleet's members
        that have rows in the step); empty or None: all."""
        terms = [t for graft in self.grafts if not present or graft.name in present for adapter in graft.adapters.values()
                 if (t := adapter.auxiliary_loss()) is not None]
        return torch.stack(terms).sum() if terms else None
