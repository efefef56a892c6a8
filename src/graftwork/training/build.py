"""From a recipe to the parts of a run: model, grafts, data, objective, optimizer, step. Used by training and by the planner.

With `fake=True` nothing is read but the config: the caller is inside a FakeTensorMode and gets the same objects on fake
tensors, so what is planned is what is run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..adapters.attach import attach
from ..adapters.graft import Graft
from ..errors import DataError, GraftworkError, IncompatibleError, TrainingError, UsageError
from ..modeling.arithmetic import widen
from ..modeling.protocols import has_values
from ..recipe import Recipe
from ..registry import MethodConfig, lookup
from ..storage.base import load_stored, train_weights
from .step import TrainStep

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class Parts:
    """What a run consists of. grafts is empty for full tuning; a fleet has one graft a file."""

    recipe: Recipe
    model: nn.Module
    tokenizer: Any
    grafts: list[Graft]
    objective: Any
    step: TrainStep
    optimizer: torch.optim.Optimizer | None
    train_data: Any = None
    eval_data: Any = None
    new_weights: list[str] = field(default_factory=list)


def task_of(recipe: Recipe, labels: int | None = 1) -> str:
    """causal_lm | classification | regression: the kind of model that the run needs. Classification without label names in the data
    (labels None) is done by a causal model that writes the label; regression by the format of the data."""
    from ..data.formats import FORMATS

    if lookup("objective", recipe.objective.method).traits.get("task", "causal_lm") != "sequence_classification":
        return "causal_lm"
    if recipe.data.format in FORMATS and FORMATS[recipe.data.format].task == "regression":
        return "regression"
    return "causal_lm" if labels is None else "classification"


def check_rows(recipe: Recipe, data: Any) -> None:
    """Raises DataError where the objective cannot learn from rows of this kind. data: a TokenDataset."""
    objective, task = lookup("objective", recipe.objective.method), task_of(recipe)
    if data.real and task != "regression":
        learns = "predicts tokens" if task == "causal_lm" else "learns classes"
        raise DataError(f"the labels are real numbers, and objective {objective.name} {learns}",
                        remedy="data.format: regression" if objective.traits.get("real") else
                        "objective: regression; or write classes as whole numbers (1, not 1.0) or names")
    if data.label_names is not None and task == "causal_lm":
        raise DataError(f"the rows are classification rows, and objective {objective.name} predicts tokens",
                        remedy="objective: classification")


def build_model(recipe: Recipe, *, num_labels: int | None = None, fake: bool = False,
                progress: Callable[[str], None] | None = None, data: Sequence[Any] | None = None,
                notes: list[str] | None = None) -> tuple[nn.Module, Any]:
    """(model in its storage, frozen state as loaded, tokenizer). data: the training sets, where they are read already; a storage
    whose codes depend on data is calibrated on them. notes: gets what there is to say of that."""
    def batches(model: nn.Module, tokenizer: Any) -> Callable[[], Iterable[dict[str, Any]]]:
        return lambda: calibration_batches(recipe, tokenizer, data)

    model, tokenizer = load_stored(recipe.model, recipe.storage, on_site=progress, notes=notes, batches=batches,
                                   task=task_of(recipe, num_labels), num_labels=num_labels, fake=fake,
                                   dtype=DTYPES[recipe.train.precision], trust_remote_code=recipe.trust_remote_code,
                                   seed=recipe.train.seed)
    if tokenizer is not None:
        model.graft_tokenizer = tokenizer
    widen(model)
    if recipe.train.gradient_checkpointing:
        from ..modeling.state import state_of

        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=state_of(model).checkpoint_kwargs())
        model.config.use_cache = False
    return model, tokenizer


#: rows of a calibration batch
CALIBRATION_BATCH = 4


def reads_data(config: MethodConfig) -> bool:
    """Whether the codes of a storage depend on calibration data."""
    return bool(lookup("storage", config.method).cls.needs(config))


def training_sets(recipe: Recipe, tokenizer: Any) -> list[Any]:
    """The training data of a recipe, one set; for a fleet one a file that can be used."""
    from ..data import build_splits, find_files

    if not recipe.is_fleet:
        return [build_splits(recipe.data, tokenizer, seed=recipe.train.seed)[0]]
    found = []
    for path in find_files(recipe.data.train):
        try:
            own = recipe.data.model_copy(update={"train": str(path)})
            found.append(build_splits(own, tokenizer, seed=recipe.train.seed, adapter=path.name.split(".")[0])[0])
        except GraftworkError:  # the run leaves it out, and says so
            continue
    return found


def calibration_batches(recipe: Recipe, tokenizer: Any, data: Sequence[Any] | None = None) -> Iterator[dict[str, Any]]:
    """The first `data.calibration_rows` rows of the training data as model inputs; of a fleet's files as many each. A function of the
    recipe and its files, so that a saved adapter finds the base that it was trained on again."""
    from ..data import model_inputs
    from ..data.collate import real_tokens

    try:
        sets = training_sets(recipe, tokenizer) if data is None else data
    except GraftworkError as error:
        raise UsageError(f"storage {recipe.storage.method} was calibrated on the training data, which cannot be read: {error.message}",
                         remedy="put it back; or train on a folder of `graft quantize`, which keeps its codes") from error
    share = -(-recipe.data.calibration_rows // max(1, len(sets)))
    rows = [{k: v for k, v in each[i].items() if k != "adapter"} for each in sets for i in range(min(share, len(each)))]
    collate = sets[0].collator() if sets else None
    for start in range(0, len(rows[:recipe.data.calibration_rows]), CALIBRATION_BATCH):
        batch = collate(rows[start:start + CALIBRATION_BATCH])
        yield {**model_inputs(batch), "real_tokens": real_tokens(batch)}


def recorded_data(storage: dict[str, Any] | None, recipe: Recipe | dict[str, Any] | None, model: Any) -> Callable | None:
    """For loading a base as an adapter was trained on it: a function that gives the batches its storage was calibrated on, from the
    recipe that the run recorded; None where the storage needs none or no recipe is known."""
    from ..modeling.models import load_tokenizer
    from ..recipe import load_recipe
    from ..registry import make_config

    if storage is None or recipe is None or storage.get("method", "dense") == "dense":
        return None
    options = dict(storage)
    if not reads_data(make_config("storage", options.pop("method"), **options)):
        return None
    known = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, check=False)
    return lambda: calibration_batches(known, load_tokenizer(model))


def adapter_config(recipe: Recipe, model: nn.Module) -> MethodConfig | None:
    """The adapter's options; heads that the checkpoint lacks (a new classifier) are trained and saved with it."""
    config = recipe.adapter
    new = sorted({name.rpartition(".")[0] for name in getattr(model, "graft_new_weights", [])})
    if config is None or not new:
        return config
    return config.model_copy(update={"modules_to_save": list(dict.fromkeys([*config.modules_to_save, *new]))})


def build_grafts(recipe: Recipe, model: nn.Module, names: Sequence[str] = ("default",),
                 batches: Callable[[str], Iterable[dict[str, Any]]] | None = None,
                 first_rate: Callable[[str], float] | None = None) -> list[Graft]:
    """Attach the recipe's adapter once per name; for full tuning make the model's own weights trainable instead.

    For initializers: batches(name) gives model inputs, first_rate(name) the learning rate of the first step."""
    config = adapter_config(recipe, model)
    if config is None:
        train_weights(model)
        return []
    if recipe.adapter_from:
        from ..artifact import attach_saved

        return [attach_saved(model, recipe.adapter_from, name=name, trainable=True) for name in names]
    start = None if recipe.initializer is None else {"method": recipe.initializer.method, **recipe.initializer.model_dump()}
    by_rate = start is not None and "eta" in start and start["eta"] is None and first_rate is not None
    return [attach(model, config, name=name, initializer={**start, "eta": first_rate(name)} if by_rate else start,
                   batches=batches(name) if batches else None, seed=recipe.train.seed) for name in names]


def trained_parameters(model: nn.Module, grafts: Sequence[Graft]) -> list[tuple[str, nn.Parameter]]:
    """Stable, named list of what is trained."""
    if not grafts:
        return [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    prefix = len(grafts) > 1
    return [(f"{g.name}/{n}" if prefix else n, p) for g in grafts for n, p in g.named_parameters()]


def build_optimizer(recipe: Recipe, model: nn.Module, grafts: Sequence[Graft]) -> torch.optim.Optimizer | None:
    """The recipe's optimizer over the grafts' groups, or over the model's own weights; None when the estimator moves them."""
    from ..optim import optimizer

    if recipe.optimizer is None:
        return None
    decay = recipe.optimizer.weight_decay
    if not grafts:
        source: Any = model
    else:
        source = [{"weight_decay": decay, **{k: v for k, v in group.items() if k != "names"}, "graft": graft.name}
                  for graft in grafts for group in graft.parameter_groups()]
    return optimizer(recipe.optimizer, source)


def check_groups(recipe: Recipe, grafts: Sequence[Graft]) -> None:
    """Raises IncompatibleError where an adapter asks for rates of its own and the estimator has one for all tensors."""
    decay = recipe.estimator.weight_decay
    for graft in grafts:
        if any(g["lr_scale"] != 1 or g.get("weight_decay", decay) != decay or g.get("update_gain") for g in graft.parameter_groups()):
            raise IncompatibleError(f"{graft.method} gives its tensors rates or decays of their own, as it is set up here, and "
                                    f"{recipe.estimator.method} moves all tensors at one rate",
                                    remedy="estimator: backprop, or equal rates (lora: loraplus_lr_ratio: 1)")


def build_teacher(recipe: Recipe, model: nn.Module) -> nn.Module:
    """The frozen model that the objective learns from, as its files have it, in the precision and on the device of the student."""
    here = next(model.parameters())
    teacher, tokenizer = load_stored(recipe.objective.teacher or recipe.model, None, dtype=DTYPES[recipe.train.precision],
                                     fake=not has_values(here), trust_remote_code=recipe.trust_remote_code)
    if tokenizer is not None:
        teacher.graft_tokenizer = tokenizer
    widen(teacher)
    return teacher.to(here.device) if has_values(here) else teacher


def build_step(recipe: Recipe, model: nn.Module, grafts: Sequence[Graft], total_steps: int) -> TrainStep:
    """Objective, estimator, selections and optimizer of a recipe as one step."""
    parameters = trained_parameters(model, grafts)
    if not parameters:
        raise TrainingError("nothing to train: every parameter is frozen",
                            remedy="add an adapter, or adapter: null for full tuning")
    objective = lookup("objective", recipe.objective.method).cls(recipe.objective)
    if lookup("objective", recipe.objective.method).traits.get("teacher"):
        objective.teach(build_teacher(recipe, model), model)
    estimator = lookup("estimator", recipe.estimator.method).cls(recipe.estimator)
    selections = [lookup("selection", s.method).cls(s) for s in recipe.selection]
    if not estimator.gradients or estimator.moves_some:
        check_groups(recipe, grafts)
    clip = [[p for p in g.parameters()] for g in grafts] if len(grafts) > 1 else []
    return TrainStep(model, objective, estimator, parameters, grafts, selections, build_optimizer(recipe, model, grafts),
                     recipe.train.max_grad_norm, clip, total_steps, recipe.train.seed)
