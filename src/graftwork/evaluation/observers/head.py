"""Rows with labels by a score head: fields label, label_predicted, prediction, references, correct, nll, terms; also the list `labels`.

All grafts in one pass; the loss is the cross-entropy of the label, in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ...data import from_examples
from ...errors import IncompatibleError, UsageError
from ...modeling.state import state_of
from ...objectives.base import forward_inputs
from ..tasks import label_names


def observe(view) -> None:
    check_head(view.model, "classification")
    if getattr(view.model.config, "problem_type", None) == "regression":
        raise IncompatibleError(f"the head gives one real number, and the labels are classes ({view.tasks[0].example.label!r} in "
                                f"{view.tasks[0].source})", remedy="format=regression reads whole numbers as real ones")
    known = tuple(view.settings.labels) if view.settings.labels is not None else _labels_of(view.model, view.tasks)
    for part, logits, labels in outputs(view, known):
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none").tolist()
        for (_, row), guess, wanted, loss in zip(part, logits.argmax(-1).tolist(), labels.tolist(), losses):
            name = known[guess] if guess < len(known) else str(guess)
            row.update(classified=True, prediction=name, references=[known[wanted]], correct=guess == wanted, label=known[wanted],
                       label_predicted=name, compared=name, compared_references=[known[wanted]], nll=loss, terms=1,
                       terms_right=int(guess == wanted))
    view.also["labels"] = list(known)


def check_head(model: Any, objective: str) -> None:
    """Raises IncompatibleError for a model without a score head."""
    if model.get_output_embeddings() is not None:
        raise IncompatibleError(f"{type(model).__name__} has no score head for rows with labels",
                                remedy=f"evaluate a run with objective: {objective}, or write the labels as completions")


def outputs(view: Any, known: tuple[str, ...] | None) -> Iterator[tuple[list[tuple[int, dict]], torch.Tensor, torch.Tensor]]:
    """([(task number, row to fill)], outputs of the head (N, C) float64, labels (N,)), a batch at a time. known: class names; None for
    real labels. Rows that the data set leaves out are no rows of the view any more."""
    model, config, settings = view.model, view.settings.config, view.settings
    dataset = from_examples(view.tokenizer, [task.example for task in view.tasks], max_length=config.max_length,
                            skip_bad=config.skip_bad, label_names=known)
    for note in dataset.statistics.notes:
        view.note(note)
    kept, k = {}, 0
    for i, task in enumerate(view.tasks):
        if k < len(dataset) and dataset.sources(k)[0] == task.source:
            kept[i], k = dataset[k], k + 1
    jobs = [job for job in view.jobs() if job[0] in kept]
    jobs.sort(key=lambda job: -len(kept[job[0]]["input_ids"]))
    collate, device, was_training, say = dataset.collator(), next(model.parameters()).device, model.training, view.say("loss")
    model.eval()
    if say:
        say(0, len(jobs))
    try:
        for start in range(0, len(jobs), settings.batch_size):
            part = jobs[start:start + settings.batch_size]
            batch = collate([{k: v for k, v in kept[i].items() if k not in ("adapter", "index")} for i, _, _ in part])
            batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            rows = view.names([graft for *_, graft in part])
            with torch.no_grad(), state_of(model).scope(rows=None if rows is None else tuple(rows), labels=batch["labels"]):
                logits = model(**forward_inputs(batch)).logits.double()
            yield [(i, row) for i, row, _ in part], logits, batch["labels"]
            if say:
                say(min(start + settings.batch_size, len(jobs)), len(jobs))
    finally:
        model.train(was_training)
    for name in view.rows:  # rows that the data set left out are no rows
        view.rows[name] = [row for i, row in enumerate(view.rows[name]) if i in kept]


def _labels_of(model, tasks) -> tuple[str, ...]:
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
