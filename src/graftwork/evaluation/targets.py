"""What `graft eval` is asked to score: a run folder, a saved graft, a model; each to a loaded model and its grafts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data import DataConfig
from ..errors import DataError, UsageError, nearest
from ..recipe import Recipe, load_recipe
from ..serving.loading import attach_quietly


@dataclass
class Target:
    """model: reference of the base (or of a fully tuned model). grafts: {name: folder}; several for a fleet. recipe: of the
    run, where known. labels: class names in the head's order, per graft."""

    model: str
    grafts: dict[str, Path] = field(default_factory=dict)
    storage: dict[str, Any] | None = None
    dtype: str | None = None
    recipe: Recipe | None = None
    labels: dict[str, list[str]] = field(default_factory=dict)
    fleet: bool = False

    @property
    def data(self) -> DataConfig:
        if self.recipe is not None:
            return self.recipe.data
        return DataConfig(train="-", format="regression" if self.task == "regression" else "auto")

    @property
    def task(self) -> str:
        """The kind of model: what the run of a graft needed, else what the checkpoint is."""
        from ..training.build import task_of

        if self.grafts and self.recipe is not None:
            labels = next(iter(self.labels.values()), None)
            return task_of(self.recipe, len(labels) if labels else None)
        return task_of_checkpoint(self.model)

    @property
    def objective(self) -> Any:
        from ..registry import lookup

        return None if self.recipe is None else lookup("objective", self.recipe.objective.method).cls(self.recipe.objective)


def find_target(run: str | Path | None, *, model: str | None = None, storage: str | None = None, dtype: str | None = None,
                adapter: str | None = None) -> Target:
    """The target that a RUN names: a run folder, the folder of a graft, or a model. model, storage, dtype override what it
    says; adapter chooses a fleet's member. Raises UsageError when there is nothing to score."""
    if run is None:
        if model is None:
            raise UsageError("nothing to evaluate", remedy="name a run folder, a saved graft, or --model M for a bare base")
        found = Target(model)
    else:
        found = _target(Path(run), str(run))
        found.model = model or found.model
    if adapter is not None:
        if adapter not in found.grafts:
            raise UsageError(f"{run} has no adapter '{adapter}'{nearest(adapter, found.grafts)}",
                             remedy=f"adapters: {', '.join(found.grafts) or 'none'}")
        found.grafts, found.fleet = {adapter: found.grafts[adapter]}, False
    if storage is not None:
        found.storage = {"method": storage}
    found.dtype = dtype or found.dtype
    return found


def _target(folder: Path, text: str) -> Target:
    if (folder / "config.yaml").is_file():
        return _run(folder)
    if _is_graft(folder):
        return _grafts({_name(folder): folder})
    members = _members(folder)
    if members:
        return _grafts(members, fleet=True)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UsageError(f"{folder} holds neither a run nor a saved graft nor a model",
                         remedy="name a folder written by `graft train` or graft.save")
    if not folder.exists() and (text.count("/") != 1 or text.startswith((".", "/"))) and _unknown_model(text):
        around = [str(p) for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise UsageError(f"there is no run folder {text}{nearest(text, around)}", remedy="name a run, a saved graft or a model")
    return Target(text)


def _unknown_model(text: str) -> bool:
    from ..modeling.models import PACKAGED

    return text not in PACKAGED and not text.endswith(".gguf")


def _is_graft(folder: Path) -> bool:
    return (folder / "graft.json").is_file() or (folder / "adapter_config.json").is_file()


def _members(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in sorted(folder.iterdir()) if _is_graft(path)} if folder.is_dir() else {}


def _name(folder: Path) -> str:
    """A name under which a graft can be attached."""
    from ..adapters.graft import NAME

    return folder.name if NAME.fullmatch(folder.name) else "default"


def _run(folder: Path) -> Target:
    recipe = load_recipe(folder / "config.yaml", check=False)
    storage = {"method": recipe.storage.method, **recipe.storage.model_dump(mode="json")}
    common = {"recipe": recipe, "storage": None if recipe.storage.method == "dense" else storage, "dtype": recipe.train.precision}
    if (folder / "model" / "config.json").is_file():
        return Target(str(folder / "model"), **common)
    grafts = {"default": folder / "graft"} if _is_graft(folder / "graft") else _members(folder / "graft")
    if not grafts:
        raise UsageError(f"the run in {folder} has no result yet",
                         remedy=f"finish it first: graft train {folder}/config.yaml --resume")
    return Target(recipe.model, grafts, labels=_labels(grafts), fleet=not _is_graft(folder / "graft"), **common)


def _grafts(grafts: dict[str, Path], fleet: bool = False) -> Target:
    """Saved grafts alone: base, storage and recipe from what their first artifact says."""
    from ..artifact import read_card

    first = next(iter(grafts.values()))
    if not (first / "graft.json").is_file():
        import json

        try:
            base = json.loads((first / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
        except (OSError, ValueError) as error:
            raise UsageError(f"{first}/adapter_config.json cannot be read ({error})", remedy="restore it from a copy") from None
        return Target(base or "", grafts, fleet=fleet)
    card = read_card(first)
    document = card.get("provenance", {}).get("recipe")
    recipe = load_recipe(document, check=False) if document else None
    storage = card.get("storage")
    return Target(card["base"].get("model") or "", grafts, storage if storage and storage["method"] != "dense" else None,
                  recipe.train.precision if recipe else None, recipe, _labels(grafts), fleet)


def _labels(grafts: dict[str, Path]) -> dict[str, list[str]]:
    from ..artifact import read_card

    found = {name: read_card(folder).get("provenance", {}).get("labels") for name, folder in grafts.items()
             if (folder / "graft.json").is_file()}
    return {name: list(labels) for name, labels in found.items() if labels}


def load_target(target: Target, *, say: Callable[[str], None] = lambda text: None) -> tuple[Any, Any]:
    """(model in its storage with the target's grafts attached, tokenizer)."""
    from ..api import load
    from ..training.build import recorded_data

    if not target.model:
        raise UsageError("the artifact does not say which base it belongs to", remedy="add --model M")
    task, labels = target.task, next(iter(target.labels.values()), None)
    model, tokenizer = load(target.model, storage=target.storage, dtype=target.dtype, task=task,
                            calibration_data=recorded_data(target.storage, target.recipe, target.model),
                            num_labels=len(labels) if labels and task == "classification" else None)
    if tokenizer is None:
        raise UsageError(f"{target.model} has no tokenizer", remedy="add the tokenizer files to the model folder")
    for name, folder in target.grafts.items():
        attach_quietly(model, folder, name, say)
    return model, tokenizer


def task_of_checkpoint(ref: str) -> str:
    """The kind of model that a folder's config names: classification, regression (one output) or causal_lm, also where it names none."""
    from ..errors import ModelError
    from ..modeling.models import load_config

    try:
        config = load_config(ref)
    except (ModelError, UsageError):  # loading says it better
        return "causal_lm"
    if not any(str(name).endswith("ForSequenceClassification") for name in getattr(config, "architectures", None) or ()):
        return "causal_lm"
    one = getattr(config, "problem_type", None) == "regression" or config.num_labels == 1
    return "regression" if one else "classification"


def route_rows(target: Target, tasks: list) -> list[str | None] | None:
    """The graft of each row: None where one graft (or none) answers all; for a fleet by the row's `adapter`, else by the
    name of its file. Raises DataError with the first row that names none."""
    if not target.fleet:
        return None
    names: list[str | None] = []
    for task in tasks:
        source = task.example.source
        name = task.example.adapter or Path(source.file).name.split(".")[0]
        if name not in target.grafts:
            raise DataError(f"{source}: which of the {len(target.grafts)} adapters answers this row? '{name}' is none of them"
                            f"{nearest(name, target.grafts)}",
                            remedy="add an 'adapter' field to the rows, name the files after the adapters, or say --adapter NAME")
        names.append(name)
    return names
