"""A run of a recipe: checks, lock, build, train, save. What `graft train` does, as a function."""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..adapters.graft import NAME
from ..errors import DataError, GraftworkError, TrainingError, UsageError
from ..files import FileLock, atomic_folder, atomic_write_text, disk_errors, safe_name
from ..modeling.state import state_of
from ..recipe import Recipe, load_recipe
from ..storage.base import dense_state
from . import checkpoint as ckpt
from .batches import FleetBatches, StepBatches, heaviest_step, total_steps
from .build import build_grafts, build_model, build_step, check_rows, task_of
from .callbacks import AfterStep, Interrupt, PeakOfStep, Progress
from .schedule import factor
from .trainer import GraftTrainer


class Interrupted(GraftworkError):
    """The run was stopped by the user and can be resumed."""

    exit_code = 130


@dataclass
class RunResult:
    """What a finished run left behind. graft: folder of the artifact (or of the model, for full tuning)."""

    steps: int
    loss: float
    peak_bytes: int | None
    seconds: float
    graft: str
    metrics: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    model: Any = field(default=None, repr=False)
    tokenizer: Any = field(default=None, repr=False)
    grafts: list[Any] = field(default_factory=list, repr=False)

    def to_json(self) -> dict[str, Any]:
        kept = ("steps", "loss", "peak_bytes", "seconds", "graft", "metrics", "failed")
        return {k: getattr(self, k) for k in kept if k not in ("metrics", "failed") or getattr(self, k)}


def train_recipe(recipe: Recipe | str | Path | dict[str, Any], *, overrides: list[str] | None = None, resume: bool = False,
                 overwrite: bool = False, quiet: bool = False, model: Any = None, tokenizer: Any = None, label: str = "train",
                 say: Callable[[str], None] | None = None, measure: bool = True) -> RunResult:
    """Train a recipe into its output_dir. `resume` continues from the newest checkpoint (or starts, when there is none).
    model, tokenizer: an already loaded base in the recipe's storage, so that several runs share it.

    Raises UsageError (folder not empty, changed recipe), DataError, TrainingError (NaN loss), Interrupted (exit 130)."""
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    say = say or (lambda text: None if quiet else print(text, file=sys.stderr))
    folder = Path(recipe.output_dir or _required("output_dir"))
    start = time.monotonic()
    _check_folder(folder, recipe, resume, overwrite)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock", what=f"the run in {folder}"):
        if overwrite:
            _clear(folder)
        atomic_write_text(folder / "config.yaml", recipe.yaml())
        with disk_errors(folder):
            return _Run(recipe, folder, quiet, say, label, measure, model, tokenizer).train(resume, start)


def _required(key: str):
    raise UsageError(f"the recipe has no {key}", remedy=f"add {key}: runs/NAME, or pass {key}=runs/NAME")


def _check_folder(folder: Path, recipe: Recipe, resume: bool, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"output_dir {folder} is a file", remedy="choose another folder")
    if resume and overwrite:
        raise UsageError("--resume continues what is there and --overwrite removes it", remedy="choose one of the two")
    left = [p for p in folder.iterdir() if p.name != ".lock"] if folder.is_dir() else []
    if left and not (resume or overwrite):
        raise UsageError(f"output_dir {folder} is not empty", remedy="--resume continues the run there, --overwrite starts anew")
    known = folder / "config.yaml"
    if resume and known.exists():
        differences = recipe_differences(load_recipe(known, check=False).document(), recipe.document())
        if differences:
            raise UsageError(f"{folder} was started with another recipe:\n  " + "\n  ".join(differences),
                             remedy="resume with the same recipe, or start anew with --overwrite or another output_dir")


def recipe_differences(old: Any, new: Any, path: str = "") -> list[str]:
    """`path: old -> new` for every difference of two documents; where the run lives does not count."""
    if path in ("output_dir", "train.report_to"):
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        return [line for key in dict.fromkeys([*old, *new])
                for line in recipe_differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)]
    return [] if old == new else [f"{path}: {old!r} -> {new!r}"]


def _clear(folder: Path) -> None:
    for name in ("graft", "diverged", "model", "checkpoints", "tensorboard", "eval"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("metrics.jsonl", "report.html", "config.yaml", "run.json", "plan.json", "spectra.json", "samples.json"):
        (folder / name).unlink(missing_ok=True)


class _Run:
    def __init__(self, recipe: Recipe, folder: Path, quiet: bool, say, label: str, measure: bool, model: Any, tokenizer: Any):
        self.recipe, self.folder, self.quiet, self.say, self.label, self.measure = recipe, folder, quiet, say, label, measure
        self.model, self.tokenizer = model, tokenizer
        self.failed: dict[str, str] = {}

    def train(self, resume: bool, start: float) -> RunResult:
        train = self.recipe.train
        self._data()
        self._build()
        factors = {name: (lambda step, total=m.total_steps: factor(step, total, train.warmup, train.schedule))
                   for name, m in self.members.items()}
        only = next(iter(factors.values()))
        step = build_step(self.recipe, self.model, self.grafts, len(self.batches))
        step.calibration = lambda: self._statistics_batches(next(iter(self.members)))
        self.stopped = step.stopped
        if self.recipe.is_fleet:
            self.batches.stopped = step.stopped
        trainer = GraftTrainer(
            step, self.batches, self.folder, factor=lambda group, s: factors.get(group.get("graft"), only)(s),
            save_steps=train.save_steps, save_total_limit=train.save_total_limit, eval_steps=train.eval_steps,
            logging_steps=train.logging_steps, early_stopping=train.early_stopping, restore_best=train.restore_best,
            evaluate_with=self._evaluate if any(e is not None for _, e in self.data.values()) else None,
            tensorboard="tensorboard" in train.report_to, seed=train.seed, describe_batch=self._describe, on_stopped=self._stopped)
        interrupt = Interrupt(self.say)
        peak = self._peak_meter(step)
        progress = Progress(self.label, trainer, quiet=self.quiet)
        for callback in [AfterStep(step), interrupt, *([peak] if peak else []), progress]:
            trainer.add_callback(callback)
        found = ckpt.complete(self.folder) if resume else []
        if found:
            self.say(f"resuming from {found[-1].name}")
        elif (self.folder / "metrics.jsonl").exists():
            (self.folder / "metrics.jsonl").unlink()
        self._check_fused(step)
        with interrupt, closing(trainer), closing(progress), closing(peak) if peak else nullcontext():
            if found and ckpt.read_progress(found[-1])["stopped"]:
                trainer.load_finished(found[-1])
            else:
                trainer.train(resume_from_checkpoint=str(found[-1]) if found else None)
        done = trainer.state.global_step
        if interrupt.asked and done < len(self.batches):
            raise Interrupted(f"stopped at step {done} of {len(self.batches)}; checkpoint written",
                              remedy=f"graft train {self.folder}/config.yaml --resume")
        best = trainer.load_best() if train.restore_best else None
        if best is not None:
            self.say(f"restored the weights of step {best}, which had the lowest eval loss")
        metrics = {}
        if trainer.evaluate_with is not None:
            self.model.eval()
            metrics = {f"eval_{k}": v for k, v in self._evaluate().items()}
            if best is None and trainer.best["at"] != done:
                trainer.record({"step": done, **metrics})
        self.model.eval()
        measured = peak.result.peak_bytes if peak and peak.result else None
        loss = self._final_loss(trainer)
        self.failed |= {name: f"diverged: {why}" for name, why in self.stopped.items()}
        if self.stopped and len(self.stopped) == len(self.grafts):
            raise TrainingError("; ".join(f"'{name}' {why}" for name, why in self.failed.items()), remedy="lower the learning rate")
        target = self._save(metrics, done)
        result = RunResult(done, loss, measured, round(time.monotonic() - start, 3), str(target), metrics, self.failed,
                           self.model, self.tokenizer, self.grafts)
        atomic_write_text(self.folder / "run.json", json.dumps(
            {**result.to_json(), "measured": {**peak.result.to_dict(), "step": peak.step} if measured else None}, indent=1))
        return result

    # -- data and parts ---------------------------------------------------------------------------------------------------
    def _data(self) -> None:
        from ..data import build_splits, find_files
        from ..modeling.models import load_tokenizer

        recipe, seed = self.recipe, self.recipe.train.seed
        if self.tokenizer is None:
            self.tokenizer = load_tokenizer(recipe.model)
        if self.tokenizer is None:
            raise TrainingError(f"{recipe.model} has no tokenizer", remedy="add the tokenizer files to the model folder")
        self.data: dict[str, tuple[Any, Any]] = {}
        if recipe.is_fleet:
            for path in find_files(recipe.data.train):
                name = path.name.split(".")[0]
                try:
                    safe_name(name, "adapter name")
                    if not NAME.fullmatch(name):
                        raise UsageError(f"'{name}' is no name for a graft",
                                         remedy="rename the file: letters, digits, '_', '-', '@'")
                    if name in self.data:
                        raise DataError(f"two files give the adapter name '{name}'", remedy="rename one of them")
                    own = recipe.data.model_copy(update={"train": str(path)})
                    made = build_splits(own, self.tokenizer, seed=seed, adapter=name)
                    self._check_kind(made[0], next(iter(self.data.values()))[0] if self.data else None)
                    self.data[name] = made
                except GraftworkError as error:
                    self.failed[name] = str(error)
                    self.say(f"'{name}' is left out: {error}")
            if not self.data:
                raise DataError(f"no file of {recipe.data.train} is usable",
                                remedy=next(iter(self.failed.values()), "check the pattern"))
        else:
            self.data["default"] = build_splits(recipe.data, self.tokenizer, seed=seed)
            self._check_kind(self.data["default"][0], None)
        for name, (data, _) in self.data.items():
            self._report_data(name, data)
        train = recipe.train
        collate = next(iter(self.data.values()))[0].collator()
        self.members = {}
        for name, (data, _) in self.data.items():
            steps = total_steps(len(data), epochs=train.epochs, max_steps=train.max_steps, batch_size=train.batch_size,
                                accumulation=train.grad_accumulation)
            self.members[name] = StepBatches(data, collate, train.batch_size, train.grad_accumulation, steps, seed)
        self.batches = FleetBatches(self.members, collate) if recipe.is_fleet else self.members["default"]

    def _check_kind(self, data: Any, first: Any) -> None:
        """Rows that the objective can score and, in a fleet, of the kind of the first file."""
        check_rows(self.recipe, data)
        if first is not None and data.label_names != first.label_names:
            raise DataError(f"its labels are {data.label_names}, those of the first file {first.label_names}",
                            remedy="a fleet shares one head: give all files the same labels, or train this one alone")

    def _report_data(self, name: str, data: Any) -> None:
        stats = data.statistics
        text = f"{stats.examples} examples in {stats.rows} rows, {stats.trained_tokens} of {stats.tokens} tokens trained"
        if stats.truncated:
            text += f", {stats.share_truncated:.1%} truncated at {self.recipe.data.max_length}"
        if stats.skipped or stats.dropped:
            text += f", {stats.skipped} skipped, {stats.dropped} dropped ({'; '.join(stats.reasons[:2])})"
        self.say(f"data{'' if name == 'default' else ' ' + name}: {text}")
        for note in stats.notes:
            self.say(f"note: {note}")

    def _build(self) -> None:
        recipe = self.recipe
        if self.model is None:
            labels = next(iter(self.data.values()))[0].label_names
            notes: list[str] = []
            self.model, _ = build_model(recipe, num_labels=len(labels) if labels else None, notes=notes,
                                        data=[data for data, _ in self.data.values()])
            for note in notes:
                self.say(f"note: {note}")
            if labels and task_of(recipe, len(labels)) == "classification":
                self.model.config.id2label = {i: str(name) for i, name in enumerate(labels)}
                self.model.config.label2id = {str(name): i for i, name in enumerate(labels)}
            if torch.cuda.is_available():
                self.model.cuda()
        elif getattr(self.model, "graft_tokenizer", None) is None:
            self.model.graft_tokenizer = self.tokenizer
        if recipe.data.packing:
            from ..data import assert_packable

            assert_packable(self.model)
        self.grafts = build_grafts(recipe, self.model, list(self.data), self._statistics_batches, self._first_rate)

    def _first_rate(self, name: str) -> float:
        """The learning rate of a graft's first step."""
        train = self.recipe.train
        return (self.recipe.optimizer or self.recipe.estimator).lr * factor(0, self.members[name].total_steps, train.warmup,
                                                                            train.schedule)

    def _statistics_batches(self, name: str):
        """Model inputs in the order of training, for what looks at data; of the initializer's own file if it has one."""
        from ..data import build_splits, model_inputs

        steps, other = self.members[name], getattr(self.recipe.initializer, "data", None)
        if other is not None:
            own = self.recipe.data.model_copy(update={"train": other, "eval": None, "eval_fraction": 0.0})
            data = build_splits(own, self.tokenizer, seed=self.recipe.train.seed)[0]
            epoch = StepBatches.steps_per_epoch(len(data), steps.batch_size, 1)
            steps = StepBatches(data, data.collator(), steps.batch_size, 1, epoch, self.recipe.train.seed)
        for step in range(len(steps)):
            for batch in steps[step]:
                yield {**model_inputs(batch), "labels": batch["labels"]}

    def _peak_meter(self, step: Any) -> PeakOfStep | None:
        if not self.measure:
            return None
        from ..planning.measure import PeakMeter

        within = range(1) if step.estimator.heaviest_first else step.heaviest_steps()
        return PeakOfStep(PeakMeter, heaviest_step(self.batches, within))

    def _check_fused(self, step: Any) -> None:
        if getattr(self.recipe.optimizer, "fused", False):
            train = self.recipe.train
            conflicts = step.optimizer.fused_conflicts(train.grad_accumulation, train.max_grad_norm or None,
                                                       any(s.reads_gradients for s in step.selections))
            if conflicts:
                raise UsageError("; ".join(conflicts), remedy="optimizer.fused: false")

    def _stopped(self, name: str) -> None:
        text = f"'{name}' of the fleet has diverged and stops: {self.stopped[name]}; the others go on"
        warnings.warn(text, stacklevel=2)
        self.say(f"warning: {text}")

    def _describe(self, batches: Any, losses: Any, member: str | None = None) -> str:
        """Where the rows with a bad loss come from (all rows of the step, when no single one is to blame; of one member only)."""
        rows = [(name, index, bool(torch.isfinite(loss))) for b, (row_loss, _) in zip(batches, losses)
                for name, index, loss in zip(b.get("rows") or ["default"] * len(b["index"]), b["index"], row_loss)
                if member in (None, name)]
        bad = [(name, index) for name, index, good in rows if not good] or [(name, index) for name, index, _ in rows]
        places = [place for name, index in bad for place in self.data[name][0].sources(index)]
        return f", rows {', '.join(places[:4])}" + (f" and {len(places) - 4} more" if len(places) > 4 else "")

    # -- evaluation and saving -------------------------------------------------------------------------------------------
    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        """Loss and the objective's other means over the eval data; for a fleet, the means over its members and each one's loss."""
        from ..registry import lookup
        from .evaluate import evaluate_loss

        objective = lookup("objective", self.recipe.objective.method).cls(self.recipe.objective)
        results = {}
        for name, (_, data) in self.data.items():
            if data is not None and name not in self.stopped:
                results[name] = evaluate_loss(self.model, objective, data, batch_size=self.recipe.train.batch_size,
                                              route=name if self.recipe.is_fleet else None)
        if not self.recipe.is_fleet:
            return results["default"]
        for name in [name for name, r in results.items() if not math.isfinite(r["loss"])]:
            self.stopped[name] = f"its eval loss became {results.pop(name)['loss']}"
            self._stopped(name)
        if not results:
            return {"loss": math.nan}
        mean = sum(r["loss"] for r in results.values()) / len(results)
        return {"loss": mean, **{f"loss/{name}": r["loss"] for name, r in results.items()}}

    def _final_loss(self, trainer: GraftTrainer) -> float:
        if trainer.last_loss == trainer.last_loss:
            return trainer.last_loss
        lines = (self.folder / "metrics.jsonl").read_text().splitlines() if (self.folder / "metrics.jsonl").exists() else []
        losses = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
        return losses[-1] if losses else float("nan")

    def _save(self, metrics: dict[str, float], steps: int) -> Path:
        recipe = self.recipe
        provenance = {"recipe": recipe.document(), "metrics": metrics, "steps": steps}
        if self.grafts:
            target = self.folder / "graft"
            for graft, (name, (data, _)) in zip(self.grafts, self.data.items()):
                own, told = target / name if recipe.is_fleet else target, provenance
                if name in self.stopped:  # beside the others it would be served with them
                    own, told = self.folder / "diverged" / name, {**provenance, "diverged": self.stopped[name]}
                    if not all(bool(torch.isfinite(p).all()) for p in graft.parameters()):
                        continue  # a fused optimizer had moved it
                graft.save(own, provenance={**told, "data_digest": data.digest, "labels": data.label_names,
                                            "steps": self.members[name].total_steps if recipe.is_fleet else steps})
            return target
        target = self.folder / "model"
        with atomic_folder(target, overwrite=True) as new:
            self.model.save_pretrained(new, state_dict=dense_state(self.model))
            self.tokenizer.save_pretrained(new)
            source = getattr(self.model, "graft_source", None)
            for path in source.license_files() if source else []:
                shutil.copy(path, new / path.name)
        return target


__all__ = ["Interrupted", "RunResult", "recipe_differences", "state_of", "task_of", "train_recipe"]
