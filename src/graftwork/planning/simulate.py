"""The plan of a recipe: its real step, run twice on fake tensors, counted by the ledger.

Model (from its config alone), storage, grafts, optimizer and batch are built by the code that a run uses
(training.build), inside FakeTensorMode: shapes and dtypes are exact, no memory is touched, nothing is computed. The second
step runs with optimizer state in place, so the peak of both is the peak of a run whose shapes do not change. Where a first step
would leave nothing but that state (grafts under backpropagation), the state is allocated without it, and a first micro-batch of the
shape of the other one gives way to gradients in place; where it leaves nothing (MeZO), it is left out.

The batch: where the data and the tokenizer can be read, the heaviest step of the run as it will be collated (of its
micro-batches the first and the heaviest other one); else batch_size rows of max_length tokens, all trained. Upper bounds
instead of exact figures: initializers that choose ranks from data (their largest rank), routed experts (the rows of all
experts are counted, not how they are split). The pass of an initializer over weights or data, evaluation and checkpoint
writing happen outside the step and are not in the figure. Where Transformers decides by values whether a mask is needed,
the plan decides by the real batch.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ..artifact import stored_tensors
from ..errors import GraftworkError
from ..estimators.base import Estimator
from ..modeling import arithmetic
from ..recipe import Recipe, load_recipe
from ..training.batches import FleetBatches, StepBatches, heaviest_step, total_steps
from ..training.build import build_grafts, build_model, build_step, reads_data
from .decodings import alike, shapes_alone
from .few import few_for_all
from .ledger import CATEGORIES, POOLS, Ledger
from .measure import expected_device_bytes
from .repeat import Recorder, Trace
from .work import Work


@dataclass
class Plan:
    """peak_bytes and categories at the peak (tensor bytes); device: expected use with its basis; trained: parameters;
    batch: (rows, tokens, trained tokens) of the simulated micro-batch; flops of one step; steps: of the run, None where neither
    data nor max_steps tell; seconds_per_step: (low, high) on this machine, None for a device that it does not have; saved_bytes: of
    the tensors that the run saves at its end (a graft's, or the model's); work: [dtype, flops, bytes, count] of a step's operations."""

    peak_bytes: int
    categories: dict[str, int]
    device: dict[str, Any]
    trained: int
    batch: dict[str, Any]
    flops: int
    steps: int | None
    seconds_per_step: tuple[float, float] | None
    notes: list[str] = field(default_factory=list)
    timeline: list[Any] = field(default_factory=list, repr=False)
    fits: bool | None = None
    budget: int | None = None
    simulated_in: float = 0.0
    saved_bytes: int = 0
    work: list[list[Any]] = field(default_factory=list, repr=False)

    @property
    def hours(self) -> tuple[float, float] | None:
        """(low, high) hours of the whole run, evaluation not counted."""
        if self.seconds_per_step is None or self.steps is None:
            return None
        return self.seconds_per_step[0] * self.steps / 3600, self.seconds_per_step[1] * self.steps / 3600

    def to_json(self) -> dict[str, Any]:
        return {**{k: v for k, v in self.__dict__.items() if k not in ("timeline", "work")}, "hours": self.hours}


def plan(recipe: Recipe | str | Path | dict[str, Any], *, overrides: list[str] | None = None, budget: int | None = None,
         device: str | None = None, use_data: bool = True, estimate_time: bool = True, every_block: bool = True) -> Plan:
    """Simulate a recipe. budget in bytes: sets `fits` (device bytes with their reserve against it). device: 'cpu' or 'cuda',
    for the bytes beside the tensors (default: what this machine has). every_block: False takes the step of a model of many equal blocks
    from those of three shallow ones where that gives the same figures (planning.repeat); such a plan has no timeline.

    Raises what building the recipe raises; nothing is downloaded and no weight is read."""
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    elif overrides:
        recipe = load_recipe(recipe.document(), overrides)
    start, here = time.monotonic(), "cuda" if torch.cuda.is_available() else "cpu"
    device = device or here
    batches, steps, names, labels, notes = _batches(recipe, use_data)
    timed = estimate_time and device == here
    chosen = [(batch, has_no_padding(batch)) for batch in (batches if recipe.is_fleet else telling(batches))]
    share = sum(map(_padded, batches)) / sum(_padded(batch) for batch, _ in chosen)
    found = None if every_block else _few_blocks(recipe, device, chosen, steps or 1, names, labels, notes)
    if found is None:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, products_of(device):
            ledger, work, trained, saved = _simulate(recipe, mode, device, chosen, steps or 1, names, labels, notes)
        found = Whole(ledger.peak_bytes, ledger.peak_categories, ledger.peak_pools, ledger.peak_blocks, trained, saved, work,
                      ledger.timeline)
    flops, operations = round(found.work.flops * share), round(found.work.operations * len(batches) / len(chosen))
    expected = expected_device_bytes(found.peak, device, pools=found.pools, blocks=found.blocks)
    made = Plan(found.peak, found.categories, expected, found.trained, _shape(batches), flops, steps,
                step_seconds(flops, operations, recipe.train.precision) if timed else None, notes, found.timeline,
                simulated_in=round(time.monotonic() - start, 3), saved_bytes=found.saved, work=found.work.step(share))
    if budget is not None:
        made.budget, made.fits = budget, expected["total_bytes"] <= budget
    return made


@dataclass
class Whole:
    """What a plan takes from a simulated step."""

    peak: int
    categories: dict[str, int]
    pools: dict[str, int]
    blocks: int
    trained: int
    saved: int
    work: Work
    timeline: list[Any] = field(default_factory=list)


def _few_blocks(recipe: Recipe, device: str, batches: list[tuple[dict[str, Any], bool]], steps: int, names: list[str],
                labels: int | None, notes: list[str]) -> Whole | None:
    """The figures of a model of many equal blocks from its shallow ones; None where every block has to be simulated."""
    from . import repeat
    from .screen import shallow

    traces: list[repeat.Trace] = []
    try:
        layers = repeat.blocks_of(recipe)
        models = [shallow(recipe.model, depth) for depth in repeat.DEPTHS] if layers else [None]
        if None in models:
            return None
        for depth, model in zip(repeat.DEPTHS, models):
            said: list[str] = []
            with FakeTensorMode(allow_non_fake_inputs=True) as mode, products_of(device):
                cut = recipe.model_copy(update={"model": model})
                traces.append(_simulate(cut, mode, device, batches, steps, names, labels, said, (depth, layers)))
        found = repeat.grown(traces, layers)
    except (GraftworkError, RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError):
        return None  # the whole model says what is wrong, if anything is
    if found is None:
        return None
    notes += [*said, f"figures of {layers} equal blocks from simulated steps of {', '.join(map(str, repeat.DEPTHS))}, by whose "
              "differences each grows"]
    work = Work()
    work.cells, work.update, work.operations = found.cells, found.update, found.operations
    return Whole(found.peak, dict(zip(CATEGORIES, found.categories)), dict(zip(POOLS, found.pools)), found.blocks, found.trained,
                 found.saved, work)


def count_parameters(recipe: Recipe, names: list[str] | None = None, labels: int | None = None) -> tuple[int, int, int]:
    """(trained parameters, all parameters of the base, sites with an adapter) from the config alone. Raises what building
    raises: no site matched, an unknown architecture."""
    from ..modeling.models import load_model
    from ..training.build import task_of, trained_parameters

    with FakeTensorMode(allow_non_fake_inputs=True):
        plain, _ = load_model(recipe.model, task=task_of(recipe, labels), num_labels=labels, fake=True,
                              trust_remote_code=recipe.trust_remote_code)
        total = sum(p.numel() for p in plain.parameters())
        model, _ = build_model(recipe, num_labels=labels, fake=True)
        _mark_new_heads(recipe, model)
        grafts = _grafts(recipe, model, names or ["default"], [])
        return sum(p.numel() for _, p in trained_parameters(model, grafts)), total, sum(len(g.adapters) for g in grafts)


@contextmanager
def _unpacked(yes: bool) -> Iterator[None]:
    """Transformers tells packed rows by the values of the positions, which fake ones do not have; here it is known."""
    from transformers import masking_utils

    kept = masking_utils.find_packed_sequence_indices
    if yes:
        masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = kept


@contextmanager
def products_of(device: str) -> Iterator[None]:
    """Everything as `device` computes it: others need none of the wide copies of a slow processor, and take larger pieces."""
    kept, arithmetic.planned_for = arithmetic.planned_for, device
    try:
        yield
    finally:
        arithmetic.planned_for = kept


def _mark_new_heads(recipe: Recipe, model: Any) -> None:
    """Names the head weights that a run would draw anew (and so train and save); all of them where no file tells."""
    from ..modeling.checkpoint import stored_tensors
    from ..modeling.models import resolve

    if not type(model).__name__.endswith("ForSequenceClassification"):
        return
    trunk, ref = f"{model.base_model_prefix}.", resolve(recipe.model)
    stored = stored_tensors(ref.path) if ref.kind == "folder" else {}
    model.graft_new_weights = sorted(
        name for name, _ in model.named_parameters() if name not in stored and (
            not name.startswith(trunk) or (name.startswith(f"{trunk}pooler.") and stored and name.removeprefix(trunk) not in stored)))


def _simulate(recipe: Recipe, mode: FakeTensorMode, device: str, batches: list[tuple[dict[str, Any], bool]], steps: int,
              names: list[str], labels: int | None, notes: list[str], grows: tuple[int, int] | None = None):
    """(ledger, work of the second step, trained parameters, bytes of what is saved at the end), or all of that as a
    repeat.Trace. batches: (batch, whether it has no padding). grows: (layers of this model, layers of the one that is planned)."""
    from ..objectives import base as objectives

    model, _ = build_model(recipe, num_labels=labels, fake=True)
    if reads_data(recipe.storage):
        notes.append("calibrating the weights comes before the steps and is not in the peak: hidden states of "
                     f"{recipe.data.calibration_rows} rows and the statistics of one block")
    _mark_new_heads(recipe, model)
    ledger = Ledger(logits_width=getattr(model.config.get_text_config(), "vocab_size", None),
                    **({"timeline_points": sys.maxsize} if grows else {}))
    recorder = Recorder(ledger) if grows else None
    with shapes_alone(model), few_for_all(Work()):  # what attaching takes is not in the figures
        grafts = _grafts(recipe, model, names, notes)
    step, saved = build_step(recipe, model, grafts, steps), _saved_bytes(model, grafts)
    work = Work(lambda: ledger._stepping > 0)
    ledger.on_operation = recorder
    with ledger, few_for_all(work, *(grows or ())), _unpacked(not any("position_ids" in batch for batch, _ in batches)):
        ledger.track(model, "weights")
        for graft in grafts:
            for _, module in graft.named_modules():
                ledger.track(module, "adapters")
            for replaced in graft.edited_storage.values() if device == "cpu" else ():  # elsewhere it waits in the host's memory
                ledger.track(replaced, "weights")
        if step.optimizer is not None:
            ledger.track(step.optimizer)
        for other in step.objective.modules():
            ledger.track(other, "weights")
            own = sum(p.numel() * p.itemsize for p in other.parameters())
            notes.append(f"weights include {own / 2**20:.2f} MiB of the teacher's, beside the model that is trained")
        model.train()
        fake, unread = [], []
        for batch, unpadded in batches:
            here = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in batch.items()}
            if unpadded:  # the models look at the mask's values and go on without it; a fake one has none
                unread.append(here.pop("attention_mask"))
            fake.append(here)
        ledger.track([fake, unread], "other")
        scope, objectives.logits_scope = objectives.logits_scope, lambda: ledger.category("logits")
        try:
            heaviest = step.heaviest_steps()  # the second of the two steps has the optimizer's state from the start
            first = heaviest.start if len(heaviest) > 1 else max(heaviest.start - 1, 0)
            taken, stands_for = fake, 1
            if _state_alone(step):
                _allocate_state(step)
                if len(batches) == 2 and _no_heavier(*batches):
                    taken, stands_for = fake[1:], 2
                    for _, parameter in step.parameters:
                        parameter.grad = torch.empty_like(parameter)
            elif not _leaves_nothing(step):
                step.run(fake, first)
            ledger.track(step.estimator.state_dict(), "optimizer_state")
            ledger.refresh()
            if recorder is None:
                ledger.on_operation = work
            else:
                recorder.inner = work
            with nullcontext() if grows else alike(model, ledger, work):  # growing compares operation by operation
                step.run(taken, first + 1)
            work.repeat(stands_for)
        finally:
            objectives.logits_scope = scope
    trained = sum(p.numel() for _, p in step.parameters)
    if recorder is not None:
        return Trace(ledger.points, recorder.kinds, work, trained, saved)
    return ledger, work, trained, saved


@torch.no_grad()
def _saved_bytes(model: Any, grafts: list[Any]) -> int:
    """Bytes of the tensors of the artifacts; without a graft of the dense model (weights that train as codes are saved dense)."""
    if grafts:
        return sum(t.numel() * t.itemsize for graft in grafts for _, t in stored_tensors(graft))
    dense = [p for p in model.parameters() if p.dtype != torch.uint8]
    return sum(p.numel() * p.itemsize for p in dense)


def _state_alone(step: Any) -> bool:
    """True where the first step leaves nothing behind but optimizer state: it need not be simulated."""
    return bool(step.grafts) and step.optimizer is not None and not step.selections and step.estimator.gradients \
        and not (step.optimizer.config.fused or step.estimator.moves_some)


def _no_heavier(first: tuple[dict[str, Any], bool], other: tuple[dict[str, Any], bool]) -> bool:
    """Whether the first micro-batch is of the shape of the other one, so that the other, which begins with gradients in place, needs as
    much at every moment or more."""
    (one, no_padding), (two, neither) = first, other
    return one["input_ids"].shape == two["input_ids"].shape and no_padding == neither and (one.get("n_targets") or 0) <= (
        two.get("n_targets") or 0) and one.keys() == two.keys()


def _leaves_nothing(step: Any) -> bool:
    """True where one step is as the other: the estimator moves the weights and takes no state back, so it keeps none."""
    return step.optimizer is None and not step.selections and type(step.estimator).load_state_dict is Estimator.load_state_dict


def _allocate_state(step: Any) -> None:
    """Optimizer state as after a first step, from gradients without values."""
    for _, parameter in step.parameters:
        parameter.grad = torch.empty_like(parameter)
    step.optimizer.step()
    for _, parameter in step.parameters:
        parameter.grad = None


def _shape(batches: list[dict[str, Any]]) -> dict[str, Any]:
    heaviest = max(batches, key=_padded)
    return {"micro_batches": len(batches), "rows": heaviest["input_ids"].shape[0], "tokens": heaviest["input_ids"].shape[1],
            "trained_tokens": heaviest.get("n_targets")}


def heaviest_shape(recipe: Recipe) -> tuple[int, int]:
    """(rows, tokens) of the heaviest micro-batch of a recipe's data. Raises GraftworkError where the data cannot be read."""
    made = _shape(_from_data(recipe)[0])
    return made["rows"], made["tokens"]


def has_no_padding(batch: dict[str, Any]) -> bool:
    """Whether attention runs without a mask: no row is padded (and none is packed, which needs its own mask)."""
    mask = batch.get("attention_mask")
    return mask is not None and "position_ids" not in batch and bool(mask.all())


def _padded(batch: dict[str, Any]) -> int:
    return batch["input_ids"].numel()


def telling(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The micro-batches of a step that decide its peak: the first, before which there is no gradient, and the heaviest of the
    others, which all begin with gradients in place. A batch is heavier with more padded, then with more trained tokens."""
    return [*batches[:1], *sorted(batches[1:], key=lambda b: (_padded(b), b.get("n_targets") or 0))[-1:]]


def _grafts(recipe: Recipe, model: Any, names: list[str], notes: list[str]) -> list[Any]:
    """The recipe's grafts with the ranks that an initializer may choose at most; no statistics are taken."""
    if recipe.adapter is None:
        return build_grafts(recipe, model, names)
    from ..adapters.attach import attach
    from ..registry import lookup
    from ..training.build import adapter_config

    config, ranks = adapter_config(recipe, model), None
    if recipe.initializer is not None:
        from ..modeling.sites import find_sites

        start = lookup("initializer", recipe.initializer.method).cls(recipe.initializer)
        sites = find_sites(model, config.target_modules, exclude_modules=config.exclude_modules, layers=config.layers_to_transform)
        ranks = start.plan(sites, config)
        if ranks:
            notes.append(f"upper bound: {start.method} chooses ranks from data, counted with its largest")
    grafts = [attach(model, config, name=name, seed=recipe.train.seed, ranks=ranks) for name in names]
    if recipe.initializer is not None:
        for graft in grafts:
            start.plan_extra(graft)
    return grafts


def _batches(recipe: Recipe, use_data: bool) -> tuple[list[dict[str, Any]], int | None, list[str], int | None, list[str]]:
    """(micro-batches of the heaviest step, total steps, graft names, number of labels, notes)."""
    notes: list[str] = []
    if use_data:
        try:
            return (*_from_data(recipe), notes)
        except GraftworkError as error:
            notes.append(f"batch shape from max_length, not from the data ({error.message})")
    return (*_from_shape(recipe), notes)


def _from_data(recipe: Recipe) -> tuple[list[dict[str, Any]], int, list[str], int | None]:
    from ..data import build_splits, find_files
    from ..modeling.models import load_tokenizer

    tokenizer, train = load_tokenizer(recipe.model), recipe.train
    if tokenizer is None:
        raise GraftworkError("the model has no tokenizer")
    sets = {}
    for path in find_files(recipe.data.train) if recipe.is_fleet else [None]:
        name = "default" if path is None else path.name.split(".")[0]
        data = recipe.data if path is None else recipe.data.model_copy(update={"train": str(path)})
        try:
            sets[name] = build_splits(data, tokenizer, seed=train.seed, adapter=None if path is None else name)[0]
        except GraftworkError:
            if path is None:
                raise
    if not sets:
        raise GraftworkError("no usable data file")
    collate = next(iter(sets.values())).collator()
    members = {name: StepBatches(data, collate, train.batch_size, train.grad_accumulation,
                                 total_steps(len(data), epochs=train.epochs, max_steps=train.max_steps, batch_size=train.batch_size,
                                             accumulation=train.grad_accumulation), train.seed) for name, data in sets.items()}
    batches = FleetBatches(members, collate) if recipe.is_fleet else members["default"]
    labels = next(iter(sets.values())).label_names
    return batches[heaviest_step(batches)], len(batches), list(members), len(labels) if labels else None


def _from_shape(recipe: Recipe) -> tuple[list[dict[str, Any]], int | None, list[str], int | None]:
    from ..data.collate import ClassificationCollator, Collator
    from ..training.build import task_of

    rows, length, train = recipe.train.batch_size, recipe.data.max_length, recipe.train
    task = task_of(recipe)
    collate = (Collator if task == "causal_lm" else ClassificationCollator)(0)
    one = {"input_ids": [1] * length, "labels": {"classification": 0, "regression": 0.0}.get(task, [-100] + [1] * (length - 1))}
    if recipe.data.packing:
        one["position_ids"] = list(range(length))
    steps = train.max_steps if train.max_steps > 0 else None
    labels = 2 if task == "classification" else None
    return [collate([dict(one) for _ in range(rows)]) for _ in range(train.grad_accumulation)], steps, ["default"], labels


_RATES: dict[torch.dtype, float] = {}
#: seconds that one operation of a step costs beside its arithmetic, (low, high)
PER_OPERATION = (2e-6, 20e-6)


def step_seconds(flops: int, operations: int, precision: str) -> tuple[float, float]:
    """(low, high) seconds of one step on this machine: the counted flops at the matmul rate measured here and at a quarter of
    it, which is where element-wise work leaves a step, plus the dispatch of its operations."""
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = arithmetic.product_dtype(torch.bfloat16 if precision == "bf16" else torch.float32, where)
    if dtype not in _RATES:
        a, b = (torch.ones(1024, 1024, dtype=dtype, device=where) for _ in range(2))
        with torch.no_grad():
            a @ b
            start = time.perf_counter()
            for _ in range(4):
                a @ b
            if where.type == "cuda":
                torch.cuda.synchronize()
        _RATES[dtype] = 4 * 2 * 1024**3 / (time.perf_counter() - start)
    quick = flops / _RATES[dtype]
    return quick + PER_OPERATION[0] * operations, 4 * quick + PER_OPERATION[1] * operations
