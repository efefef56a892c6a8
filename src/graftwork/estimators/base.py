"""The contract of an estimator: one call per optimizer step, with all micro-batches of that step.

An estimator fills `.grad` of the trained parameters (backprop), or moves the parameters itself and says so (MeZO).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ..modeling.state import StateHolder
from ..registry import MethodConfig


class Loss(Protocol):
    """What an estimator needs of an objective (graftwork.objectives.base.Objective)."""

    def loss(self, model: nn.Module, batch: dict[str, Any], row_scale: float | Tensor) -> Any: ...


@dataclass
class StepContext:
    """Everything one optimizer step may look at.

    parameters: stable, named list of the trained parameters (noise is keyed by these names).
    batches: the micro-batches; row_scales: per micro-batch the factor of each row's summed loss (a float, or (N,)), so
    that the scaled sum over all micro-batches is the loss of the step. forward(model): the model to call (a wrapper
    under DDP, else the model itself). lr: the learning rate of this step; None: the estimator's own."""

    model: nn.Module
    objective: Loss
    parameters: Sequence[tuple[str, nn.Parameter]]
    batches: Sequence[dict[str, Any]]
    row_scales: Sequence[float | Tensor]
    holder: StateHolder
    step: int
    seed: int
    lr: float | None = None
    optimizer: torch.optim.Optimizer | None = None
    graft_losses: Callable[[], Tensor | None] = lambda: None  # terms that the adapters of this step add to its loss


@dataclass
class StepResult:
    """loss: detached scalar, the step's mean loss. rows: per micro-batch (row_loss (N,), row_tokens (N,)).
    updated: True when the estimator moved the parameters itself (then clipping and optimizer.step are skipped)."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    rows: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    updated: bool = False


class Estimator:
    """Base of all estimators. State is tensors only."""

    gradients: ClassVar[bool] = True  # fills .grad (False: moves parameters itself)
    differentiates: ClassVar[bool] = True  # takes derivatives of the objective (False: compares its values)
    moves_some: ClassVar[bool] = False  # fills .grad of some parameters and moves the others itself
    heaviest_first: ClassVar[bool] = False  # needs the most memory in the first step of a run

    def __init__(self, config: MethodConfig):
        self.config = config

    @classmethod
    def derived_traits(cls) -> dict[str, Any]:
        return {"gradients": cls.gradients, "differentiates": cls.differentiates, "moves_some": cls.moves_some}

    def step(self, ctx: StepContext) -> StepResult:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state:
            raise ValueError(f"unexpected estimator state: {sorted(state)}")


@contextmanager
def micro_forward(ctx: StepContext, micro: int):
    """The objective's output on one micro-batch, inside the clock and the routing of that micro-batch."""
    batch = ctx.batches[micro]
    changes: dict[str, Any] = {"step": ctx.step, "micro": micro, "seed": ctx.seed, "labels": batch.get("labels"), "kept": {}}
    if batch.get("rows") is not None:
        changes["rows"] = tuple(batch["rows"])
    if "segment_ids" in batch:
        changes["real"] = batch["segment_ids"] > 0
    with ctx.holder.scope(**changes):
        tensors = {k: v for k, v in batch.items() if k != "rows"}
        yield ctx.objective.loss(ctx.model, tensors, ctx.row_scales[micro])
