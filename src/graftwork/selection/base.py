"""The contract of a selection: it acts before the step, between backward and the optimizer, and after the step.

State that a resume needs is in `state_dict` (tensors and plain JSON values). What changes the *structure* (ranks, which
parameters exist) is in `structure()` and is restored before the optimizer is built.

In one's own Transformers Trainer: `trainer.add_callback(LISASelection(LISA(layers=2)).as_callback(model))`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ..errors import IncompatibleError, UsageError
from ..modeling.blocks import block_list
from ..registry import MethodConfig


@dataclass
class SelectionContext:
    """What a selection may act on. graft is None for full tuning. total_steps: length of the run, for schedules. batches(): inputs
    of the model for statistics, in the order of training (those of the step where the run offers no others); None: there are none."""

    model: nn.Module
    graft: Any | None
    parameters: Sequence[tuple[str, nn.Parameter]]
    optimizer: torch.optim.Optimizer | None
    step: int
    total_steps: int
    seed: int
    batches: Callable[[], Iterable[dict[str, Any]]] | None = None


class Selection:
    """Base of all selections."""

    reads_gradients: ClassVar[bool] = False  # acts between backward and step: refuses fused per-layer updates
    full_tuning_only: ClassVar[bool] = False  # chooses among the model's own weights, not a graft's
    events_only: ClassVar[bool] = True  # works as a TrainerCallback in a foreign trainer
    adapters: ClassVar[tuple[str, ...]] = ()  # the adapter methods it acts on, one graft at a time; empty: any, or none
    shows: ClassVar[str | None] = None  # what `site_map` gives, for reports; None: nothing

    def __init__(self, config: MethodConfig):
        self.config = config

    @classmethod
    def derived_traits(cls) -> dict[str, Any]:
        return {"reads_gradients": cls.reads_gradients, "full_tuning_only": cls.full_tuning_only, "events_only": cls.events_only,
                "adapters": list(cls.adapters)}

    def check_graft(self, ctx: SelectionContext) -> None:
        """Raises IncompatibleError when what is trained is not a graft of the methods that this selection acts on."""
        found = "full tuning" if ctx.graft is None else f"'{ctx.graft.method}'"
        if ctx.graft is None or ctx.graft.method not in self.adapters:
            raise IncompatibleError(f"selection '{self.method}' acts on adapter {', '.join(self.adapters)}, not on {found}",
                                    remedy=f"adapter: {self.adapters[0]}, or remove this selection")

    def heaviest_steps(self, ctx: SelectionContext) -> range:
        """The steps of the run in which most trains: the planner simulates the first two (one alone
        after that before it), a run's peak is measured in one of them."""
        return range(ctx.total_steps)

    def begin(self, ctx: SelectionContext) -> None:
        """Once, after the optimizer exists (ctx.step is the step that comes next, also after a resume)."""

    def before_step(self, ctx: SelectionContext) -> None: ...

    def after_backward(self, ctx: SelectionContext) -> None: ...

    def after_step(self, ctx: SelectionContext) -> None: ...

    def site_map(self, ctx: SelectionContext) -> dict[str, float]:
        """One number a site or layer as it is after a step (`shows` says of what); unless overridden the share of each layer's
        trained values that a step moves."""
        return {} if self.shows is None else trained_shares(ctx)

    def structure(self) -> dict[str, Any]:
        """JSON description of structural changes made so far."""
        return {}

    def restore_structure(self, structure: dict[str, Any], model: nn.Module, graft: Any | None) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def as_callback(self, model: nn.Module, graft: Any | None = None):
        """A TrainerCallback that lets this selection act in a foreign Transformers Trainer; add it before `train()`. The
        trainer must have built its optimizer over all parameters that may ever train. Draws are functions of the trainer's
        seed and step, so they repeat after a resume.

        Raises UsageError for a selection that needs more than events."""
        if not self.events_only:
            raise UsageError(f"selection '{type(self).method}' reads the gradients of single sites, which foreign trainers do not "
                             "offer them",
                             remedy="train with graftwork.GraftTrainer or `graft train`")
        from transformers import TrainerCallback

        selection = self

        class Acts(TrainerCallback):
            """Events of the foreign trainer as turns of the selection."""

            parameters: list[tuple[str, nn.Parameter]] = []

            def _context(self, args, state, optimizer) -> SelectionContext:
                plain = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it
                return SelectionContext(model, graft, self.parameters, plain, state.global_step, state.max_steps, args.seed)

            def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
                if not self.parameters:  # a second train() finds some of them frozen
                    named = model.named_parameters() if graft is None else graft.named_parameters()
                    self.parameters = [(n, p) for n, p in named if p.requires_grad]
                selection.begin(self._context(args, state, optimizer))

            def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
                selection.before_step(self._context(args, state, optimizer))

            def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
                selection.after_backward(self._context(args, state, optimizer))

            def on_step_end(self, args, state, control, optimizer=None, **kwargs):
                ctx = self._context(args, state, optimizer)
                ctx.step -= 1  # the trainer has counted already
                selection.after_step(ctx)

        return Acts()


def drop_state(optimizer: torch.optim.Optimizer | None, parameter: nn.Parameter) -> None:
    """Free an optimizer's state of one parameter: by `drop` where the optimizer has it (ours), else by taking it out."""
    if optimizer is None:
        return
    if hasattr(optimizer, "drop"):
        optimizer.drop(parameter)
    else:
        optimizer.state.pop(parameter, None)


def train_only(ctx: SelectionContext, chosen: Collection[int]) -> None:
    """Let the parameters with these ids train and no other; what is frozen loses its gradient and optimizer state."""
    for _, parameter in ctx.parameters:
        parameter.requires_grad_(id(parameter) in chosen)
        if id(parameter) not in chosen:
            parameter.grad = None
            drop_state(ctx.optimizer, parameter)


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """The model's repeated blocks. Raises UsageError where it has none."""
    blocks = block_list(model)
    if not blocks:
        raise UsageError(f"{type(model).__name__} has no list of layers to choose from", remedy="remove this selection")
    return blocks


def parts_of_model(ctx: SelectionContext) -> tuple[set[int], list[set[int]], set[int]]:
    """(ids of what comes before the layers, of each layer, of what comes after them) among the model's parameters, in its order; a
    tied head is with the embeddings."""
    layers = [{id(p) for p in layer.parameters()} for layer in decoder_blocks(ctx.model)]
    inside, before, after, passed = set().union(*layers), set(), set(), False
    for parameter in ctx.model.parameters():
        passed = passed or id(parameter) in inside
        if id(parameter) not in inside:
            (after if passed else before).add(id(parameter))
    return before, layers, after


#: what `trained_shares` gives
SHARE = "share of the layer that trains"


def trained_shares(ctx: SelectionContext) -> dict[str, float]:
    """{layer: share of the run's parameters in it that are not frozen now}; layers without any are left out."""
    if not block_list(ctx.model):
        return {}
    before, layers, after = parts_of_model(ctx)
    groups = {"before the layers": before, **{f"layer {i}": ids for i, ids in enumerate(layers)}, "after the layers": after}
    sizes = {id(p): (p.numel(), p.numel() * p.requires_grad) for _, p in ctx.parameters}
    found = {}
    for name, ids in groups.items():
        whole, moving = (sum(sizes[key][i] for key in ids if key in sizes) for i in (0, 1))
        if whole:
            found[name] = moving / whole
    return found


def live_ranks(ctx: SelectionContext) -> dict[str, float]:
    """{site: gates that are not zero} of a gated adapter."""
    return {name: int(adapter.gate.detach().count_nonzero()) for name, adapter in ctx.graft.adapters.items()}
