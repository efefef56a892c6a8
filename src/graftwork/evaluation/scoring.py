"""Scores of a model, or of its grafts, on evaluation rows.

Loss, perplexity and token accuracy come from the objective (training/evaluate.py). Exact match: each row's last answer
is written anew by greedy decoding from exactly the tokens that training put before it, and compared with every accepted
answer, white space around it aside. Rows to classify: accuracy and macro F1 of the score head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..data import DataConfig, Renderer, Statistics, from_examples
from ..errors import IncompatibleError, UsageError, nearest
from ..modeling.state import state_of
from ..registry import lookup
from ..serving.generate import generate
from ..training.evaluate import evaluate_loss
from .metrics import bootstrap_interval, macro_f1, matches, pattern
from .tasks import Task, label_names, prompt_and_answer, read_tasks

METRICS = ("loss", "exact_match")
Progress = Callable[[str, int, int], None]


@dataclass
class Evaluation:
    """metrics: the scores; rows: one mapping per row {source, adapter, prediction, references, correct, ...}; notes: what a
    reader should know."""

    metrics: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def evaluate(model: nn.Module, tokenizer: Any, data: Any, *, config: DataConfig | None = None, objective: Any = None,
             metrics: Sequence[str] = METRICS, adapters: Sequence[str | None] | str | None = None,
             labels: Sequence[str] | None = None, batch_size: int = 16, max_new_tokens: int | None = None,
             extract: str | None = None, stop: Sequence[str] = (), limit: int | None = None, seed: int = 0,
             progress: Progress | None = None) -> Evaluation:
    """Scores of a data file (or of Tasks that were read from one).

    config: options of the data section (format, train_on, columns, max_length ...). objective: of the loss (causal_lm).
    metrics: any of loss, exact_match. adapters: the graft of each row (None: the bare base) or one for all; left out, the
    model answers as it stands. labels: class names in the order of the head. max_new_tokens: by default what the longest
    accepted answer needs. extract: regular expression of what is compared. seed: of the bootstrap interval.
    progress(stage, done, total). Raises DataError, UsageError, IncompatibleError."""
    unknown = [m for m in metrics if m not in METRICS]
    if unknown or not metrics:
        raise UsageError(f"there is no metric '{', '.join(unknown)}'{nearest(unknown[0], METRICS) if unknown else ''}",
                         remedy=f"metrics: {', '.join(METRICS)}")
    config, finder, statistics = config or DataConfig(train="-"), pattern(extract), Statistics()
    given = isinstance(data, list) and bool(data) and isinstance(data[0], Task)
    tasks = data[:limit] if given else read_tasks(data, config, limit=limit, statistics=statistics)
    names = [adapters] * len(tasks) if isinstance(adapters, str) else adapters
    if names is not None and len(names) != len(tasks):
        raise UsageError(f"{len(names)} adapters are named for {len(tasks)} rows")
    if tasks[0].example.label is not None:
        out = _classify(model, tokenizer, tasks, names, config, objective, labels, batch_size, progress)
        score = "accuracy"
    else:
        if model.get_output_embeddings() is None:
            raise IncompatibleError(f"{type(model).__name__} classifies, and the rows have no label",
                                    remedy='give rows such as {"text": "...", "label": "..."}')
        out = _answer(model, tokenizer, tasks, names, config, objective, metrics, batch_size, max_new_tokens, finder, stop,
                      progress)
        score = "exact_match"
    out.notes += [note for note in statistics.notes if note not in out.notes]
    if statistics.skipped:
        out.metrics["skipped"] = statistics.skipped
        out.notes.append(f"{statistics.skipped} unusable rows are skipped, the first: {statistics.reasons[0]}")
    if score in out.metrics:
        out.metrics[f"{score}_interval"] = bootstrap_interval([row["correct"] for row in out.rows], seed=seed)
    return out


# -- rows that are answered ------------------------------------------------------------------------------------------------
def _answer(model, tokenizer, tasks, names, config, objective, metrics, batch_size, max_new_tokens, finder, stop,
            progress) -> Evaluation:
    out = Evaluation({"n": len(tasks)})
    if "loss" in metrics:
        means = _losses(model, tokenizer, tasks, names, config, objective, batch_size, out, progress)
        out.metrics.update(loss=means["loss"], perplexity=means["perplexity"], token_accuracy=means["accuracy"])
    if "exact_match" not in metrics:
        return out
    if not all(task.answers for task in tasks):
        out.notes.append("rows without a prompt and an answer have no exact match: only the loss is reported")
        return out
    renderer = Renderer(tokenizer, train_on="last_assistant", system=config.system, chat=config.chat)
    parts = [prompt_and_answer(renderer, task.example) for task in tasks]
    answers = [list(dict.fromkeys([*task.answers, _text(tokenizer, ids)])) for task, (_, ids) in zip(tasks, parts)]
    if max_new_tokens is None:
        longest = max(len(renderer.ids(answer)) for row in answers for answer in row)
        max_new_tokens = min(max(longest + 8, 256 if finder else 1), 1024)
    written = generate(model, tokenizer, [ids for ids, _ in parts], adapters=names, max_new_tokens=max_new_tokens, stop=stop,
                       batch_size=batch_size, progress=progress and (lambda done, total: progress("answers", done, total)))
    for i, (task, completion, accepted) in enumerate(zip(tasks, written, answers)):
        out.rows.append({"source": task.source, "adapter": names[i] if names else None, "prediction": completion.text,
                         "references": list(task.answers), "correct": matches(completion.text, accepted, finder),
                         "finish_reason": completion.finish_reason, "tokens": completion.tokens})
    out.metrics["exact_match"] = sum(row["correct"] for row in out.rows) / len(out.rows)
    out.metrics["finished"] = sum(row["finish_reason"] == "stop" for row in out.rows) / len(out.rows)
    out.metrics["max_new_tokens"] = max_new_tokens
    return out


def _text(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


# -- rows that are classified ----------------------------------------------------------------------------------------------
def _classify(model, tokenizer, tasks, names, config, objective, labels, batch_size, progress) -> Evaluation:
    if model.get_output_embeddings() is not None:
        raise IncompatibleError(f"{type(model).__name__} has no score head for rows with labels",
                                remedy="evaluate a run with objective: classification, or write the labels as completions")
    known = tuple(labels) if labels is not None else _labels_of(model, tasks)
    guessed: list[int] = []
    hook = model.register_forward_hook(lambda module, args, output: guessed.extend(output.logits.argmax(-1).tolist()))
    out = Evaluation({"n": len(tasks)})
    datasets: list[Any] = []
    try:
        means = _losses(model, tokenizer, tasks, names, config, objective or lookup("objective", "classification").cls(),
                        batch_size, out, progress, labels=known, keep=datasets)
    finally:
        hook.remove()
    wanted = [dataset[i]["labels"] for dataset in datasets for i in range(len(dataset))]
    sources = [dataset.sources(i)[0] for dataset in datasets for i in range(len(dataset))]
    owners = [name for dataset, name in zip(datasets, _groups(tasks, names)) for _ in range(len(dataset))]
    out.rows = [{"source": s, "adapter": owner, "prediction": known[g] if g < len(known) else str(g), "references": [known[w]],
                 "correct": g == w} for s, owner, g, w in zip(sources, owners, guessed, wanted)]
    accuracy = sum(row["correct"] for row in out.rows) / len(out.rows)
    out.metrics.update(n=len(out.rows), loss=means["loss"], accuracy=accuracy, exact_match=accuracy,
                       macro_f1=macro_f1(guessed, wanted), labels=list(known))
    return out


def _labels_of(model: nn.Module, tasks: Sequence[Task]) -> tuple[str, ...]:
    """The head's class names from the model's config where they are no placeholders, else those of the data."""
    config = model.config
    named = tuple(str(config.id2label[i]) for i in sorted(config.id2label)) if getattr(config, "id2label", None) else ()
    if named and not all(name == f"LABEL_{i}" for i, name in enumerate(named)):
        return named
    found = label_names(tasks) or ()
    if all(name.isdecimal() for name in found):
        return tuple(str(i) for i in range(config.num_labels))
    if len(found) != config.num_labels:
        raise UsageError(f"the head has {config.num_labels} classes, the rows have {len(found)} labels: their order is unknown",
                         remedy="name them in the head's order: --labels negative,positive")
    return found


# -- the loss --------------------------------------------------------------------------------------------------------------
def _groups(tasks: Sequence[Task], names: Sequence[str | None] | None) -> dict[str | None, list[Task]]:
    groups: dict[str | None, list[Task]] = {}
    for i, task in enumerate(tasks):
        groups.setdefault(names[i] if names else None, []).append(task)
    return groups


def _losses(model, tokenizer, tasks, names, config, objective, batch_size, out, progress, *, labels=None,
            keep=None) -> dict[str, float]:
    """Means of evaluate_loss over all rows, each group of rows under its own graft."""
    objective = objective or lookup("objective", "causal_lm").cls()
    total, done, results = len(tasks), 0, []
    for name, members in _groups(tasks, names).items():
        dataset = from_examples(tokenizer, [task.example for task in members], train_on=config.train_on,
                                max_length=config.max_length, system=config.system, chat=config.chat,
                                skip_bad=config.skip_bad, label_names=labels)
        if keep is not None:
            keep.append(dataset)
        shown = dataset if progress is None else _Counted(dataset, lambda k, done=done: progress("loss", done + k, total))
        off = frozenset(state_of(model).grafts) if names and name is None else state_of(model).current.disabled
        with state_of(model).scope(disabled=off):
            means = evaluate_loss(model, objective, shown, batch_size=batch_size, route=name)
        weight = len(dataset) if labels is not None else dataset.statistics.trained_tokens
        results.append((means, max(weight, 1)))
        out.notes += [note for note in dataset.statistics.notes if note not in out.notes]
        done += len(members)
    if len(results) == 1:
        return results[0][0]
    whole = sum(weight for _, weight in results)
    mean = {key: sum(means[key] * weight for means, weight in results) / whole for key in ("loss", "accuracy")}
    return {**mean, "perplexity": float(torch.tensor(min(mean["loss"], 50.0), dtype=torch.float64).exp())}


class _Counted:
    """A data set that says how far it has been read."""

    def __init__(self, data: Any, say: Callable[[int], None]):
        self.data, self.say = data, say

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> Any:
        self.say(i + 1)
        return self.data[i]

    def collator(self) -> Any:
        return self.data.collator()
