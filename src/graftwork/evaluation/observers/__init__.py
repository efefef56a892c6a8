"""What is looked at in a model: one file an observer, each with `observe(view)`, which writes fields into the view's rows.

A metric names the observers that it needs (families/base.py); each runs once, for all metrics and all targets together. Rows that a score
head classifies have one observer for everything.
"""

from __future__ import annotations

import importlib
from typing import Any

from ...errors import UsageError

#: what the observer of a score head stands for, by what rows have for a label
_OF_A_HEAD = {"head": ("likelihood", "answers", "labels"), "regression": ("likelihood", "answers")}


def observe(name: str, view: Any) -> None:
    """Runs the observer of that name, unless it has run. Raises UsageError where the rows are of another kind."""
    example = view.tasks[0].example
    if example.label is not None:
        head = "regression" if example.is_real else "head"
        if name not in _OF_A_HEAD[head]:
            raise UsageError(f"rows with a label are classified by a score head, which has no {name}",
                             remedy="metrics for them: loss, exact_match, accuracy, macro_f1, micro_f1, f1, mcc")
        name = head
    if name not in view.seen:
        view.seen.add(name)
        importlib.import_module(f"{__name__}.{name}").observe(view)
