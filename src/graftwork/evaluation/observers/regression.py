"""Rows with real labels by a score head with one output: fields prediction, label, references, compared, squared_error, terms.

All grafts in one pass; predictions in float64 of what the head gives.
"""

from __future__ import annotations

from ...errors import IncompatibleError
from .head import check_head, outputs


def observe(view) -> None:
    check_head(view.model, "regression")
    width, first = view.model.config.num_labels, view.tasks[0]
    if width != 1:
        raise IncompatibleError(f"{first.source}: the label {first.example.label!r} is a real number, and the head has {width} classes",
                                remedy="evaluate a run with objective: regression, or write classes as whole numbers or names")
    for part, logits, _ in outputs(view, None):
        for (i, row), value in zip(part, logits[:, 0].tolist()):
            wanted = view.tasks[i].example.label  # not the batch's, which is rounded to single precision
            row.update(classified=True, prediction=value, label=wanted, references=[wanted], compared=value,
                       squared_error=(value - wanted) ** 2, terms=1)
