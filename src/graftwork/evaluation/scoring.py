"""Scores of a model, or of many of its grafts in one pass, on evaluation rows.

Observers look at the model (likelihoods, answers, choices, labels, programs), all targets in common batches; metrics make scores of what
they saw, with bootstrap intervals, and paired differences where there are several targets. Loss and perplexity are those of training on
the same rows; exact match: each row's last answer is written anew by greedy decoding from exactly the tokens that training put before it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..data import DataConfig, Statistics
from ..errors import DataError, IncompatibleError, UsageError
from . import bootstrap
from .families.base import Metric, Options, find, known
from .metrics import pattern
from .observers import observe
from .observers.base import Progress, Settings, View
from .tasks import Task, read_tasks

METRICS = ("loss", "exact_match")
#: of rows with real labels
OF_NUMBERS = ("loss", "mse", "pearson", "spearman")


@dataclass
class Evaluation:
    """metrics: the scores; rows: one mapping per row {source, adapter, prediction, references, correct, ...}; notes: what a
    reader should know."""

    metrics: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class Comparison:
    """targets: the scores of each. differences: {"a", "b", "metric", "difference", "interval", "above"} of the first target and each of
    the others on the same rows, a - b; above: the share of resamples in which a is larger."""

    targets: dict[str, Evaluation]
    differences: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def evaluate(model: nn.Module, tokenizer: Any, data: Any, *, config: DataConfig | None = None, objective: Any = None,
             metrics: Sequence[str] | None = METRICS, adapters: Sequence[str | None] | str | None = None, limit: int | None = None,
             extract: str | None = None, options: Options | None = None, resamples: int = 2000, progress: Progress | None = None,
             **settings: Any) -> Evaluation:
    """Scores of a data file (or of Tasks that were read from one).

    config: options of the data section (format, train_on, columns, max_length ...). objective: of the loss (causal_lm).
    metrics: names from `families`; None: what suits the rows. adapters: the graft of each row (None: the bare base) or one for all;
    left out, the model answers as it stands. extract: regular expression of what is compared. options: of the metrics (positive, k).
    resamples: of the bootstrap. settings: labels, batch_size, max_new_tokens, stop, seed, stride, window, code, journal, identity (see
    observers/base.py). progress(stage, done, total). Raises DataError, UsageError, IncompatibleError."""
    tasks, statistics = _tasks(data, config, limit)
    routes = [adapters] * len(tasks) if isinstance(adapters, str) else adapters
    found = compare(model, tokenizer, tasks, {"": routes}, config=config, objective=objective, metrics=metrics, extract=extract,
                    options=options, resamples=resamples, progress=progress, **settings)
    out = found.targets[""]
    if statistics.skipped:
        out.metrics["skipped"] = statistics.skipped
        out.notes.append(f"{statistics.skipped} unusable rows are skipped, the first: {statistics.reasons[0]}")
    out.notes += [note for note in statistics.notes if note not in out.notes]
    return out


def compare(model: nn.Module, tokenizer: Any, data: Any, targets: Mapping[str, Sequence[str | None] | None], *,
            config: DataConfig | None = None, objective: Any = None, metrics: Sequence[str] | None = METRICS, extract: str | None = None,
            options: Options | None = None, resamples: int = 2000, progress: Progress | None = None, **settings: Any) -> Comparison:
    """Scores of several targets on the same rows, in one pass: {name: the graft of each row}. See `evaluate`."""
    tasks, _ = _tasks(data, config, None)
    judges = find(for_rows(tasks, metrics), options)
    _check_real(judges, tasks)
    view = View(model, tokenizer, objective, tasks, dict(targets),
                Settings(config=config or DataConfig(train="-"), finder=pattern(extract), **settings), progress)
    if tasks[0].example.label is None and model.get_output_embeddings() is None:
        real = getattr(model.config, "problem_type", None) == "regression"
        raise IncompatibleError(f"{type(model).__name__} {'gives a number' if real else 'classifies'}, and the rows have no label",
                                remedy=f'give rows such as {{"text": "...", "label": {"3.8" if real else chr(34) + "..." + chr(34)}}}')
    for need in dict.fromkeys(need for judge in judges for need in judge.needs):
        observe(need, view)
    out = Comparison({name: Evaluation({"n": len(rows)}, rows) for name, rows in view.rows.items()}, notes=view.notes)
    for judge in judges:
        _score(judge, view, out, resamples)
    for one in out.targets.values():
        one.metrics.update(view.also)
        one.notes = list(dict.fromkeys([*view.notes, *one.notes]))
    return out


def for_rows(tasks: Sequence[Task], metrics: Sequence[str] | None) -> list[str]:
    """The metrics that are asked for; those that suit the rows where none are. A score head's rows get their accuracy, or their errors and
    correlations, in any case."""
    first = tasks[0]
    if first.example.is_real:
        return list(dict.fromkeys([*(metrics if metrics is not None and metrics is not METRICS else ()), *OF_NUMBERS]))
    if first.example.label is not None:
        return list(dict.fromkeys([*(metrics or METRICS), "loss", "accuracy", "exact_match", "macro_f1"]))
    if metrics is not None:
        return list(metrics)
    return ["multiple_choice"] if first.choices is not None else ["pass_at_k"] if first.tests is not None else list(METRICS)


def _check_real(judges: Sequence[Metric], tasks: Sequence[Task]) -> None:
    """Raises UsageError for metrics of texts or classes where the labels are real numbers."""
    first = tasks[0]
    odd = next((judge for judge in judges if not judge.real), None) if first.example.is_real else None
    if odd is not None:
        suited = ", ".join(name for name, each in known().items() if each.real)
        raise UsageError(f"metric '{odd.name}' does not suit the rows, whose labels are real numbers ({first.example.label!r} in "
                         f"{first.source})", remedy=f"metrics for them: {suited}")


def _tasks(data: Any, config: DataConfig | None, limit: int | None) -> tuple[list[Task], Statistics]:
    statistics = Statistics()
    if isinstance(data, list) and data and isinstance(data[0], Task):
        tasks = data[:limit]
    else:
        tasks = read_tasks(data, config or DataConfig(train="-"), limit=limit, statistics=statistics)
    kinds = [(t.example.label is not None, t.choices is not None, t.tests is not None) for t in tasks]
    odd = next((task for task, kind in zip(tasks, kinds) if kind != kinds[0]), None)
    if odd is not None:
        raise DataError(f"{odd.source}: rows of different kinds (label, choices, tests, or none of these) are mixed",
                        remedy="evaluate one kind of rows at a time")
    odd = next((task for task in tasks if task.example.is_real != tasks[0].example.is_real), None)
    if odd is not None:
        raise DataError(f"{odd.source}: labels that are classes and labels that are real numbers are mixed",
                        remedy="format=regression reads all labels as real numbers")
    return tasks, statistics


def _score(judge: Metric, view: View, out: Comparison, resamples: int) -> None:
    """Adds one metric's scores, intervals and differences."""
    judged = {name: [judge.usable(row) for row in rows] for name, rows in view.rows.items()}
    if "answers" in judge.needs and not all(task.answers or task.example.label is not None for task in view.tasks):
        return  # nothing is written for such rows; the observer has said so

    def seen(name: str) -> list[dict[str, Any]]:
        return [row for row, counts in zip(view.rows[name], judged[name]) if counts or judge.sees_all]

    judge.fit([row for name in view.rows for row in seen(name)])
    drawn: dict[str, dict] = {}
    for name, one in out.targets.items():
        rows = [row for row, counts in zip(one.rows, judged[name]) if counts]
        one.notes += [note for note in judge.notes(seen(name)) if note not in one.notes]
        if not rows:
            one.notes.append(f"{judge.name}: no row counts, so there is no score")
            continue
        statistics = judge.statistics(rows)
        values = judge.value(statistics)
        drawn[name] = bootstrap.resampled(judge, statistics, resamples, view.settings.seed)
        for key, value in values.items():
            one.metrics[key] = value if math.isfinite(value) else None
            one.metrics[f"{key}_interval"] = bootstrap.interval(drawn[name][key], len(rows))
        one.metrics.update(judge.also(seen(name)))
        if len(rows) < 2:
            one.notes.append("an interval needs two rows: it is null")
    first, *others = out.targets
    for other in others:
        if first in drawn and other in drawn:
            _difference(judge, view, out, judged, drawn, first, other, resamples)


def _difference(judge: Metric, view: View, out: Comparison, judged: dict, drawn: dict, a: str, b: str, resamples: int) -> None:
    """Of two targets on the rows that count for both."""
    both = [x and y for x, y in zip(judged[a], judged[b])]
    values, samples = {}, {}
    for name in (a, b):
        rows = [row for row, counts in zip(view.rows[name], both) if counts]
        if not rows:
            return
        statistics = judge.statistics(rows)
        values[name] = judge.value(statistics)
        samples[name] = drawn[name] if both == judged[name] else bootstrap.resampled(judge, statistics, resamples, view.settings.seed)
    for key in values[a]:
        gap = values[a][key] - values[b][key]
        out.differences.append({"a": a, "b": b, "metric": key, "difference": gap if math.isfinite(gap) else None, "n": sum(both),
                                **bootstrap.difference(samples[a][key], samples[b][key], sum(both))})
