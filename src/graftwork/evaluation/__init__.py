"""Evaluation: metrics of likelihoods, answers, choices, labels and programs, of many grafts in one pass, with intervals."""

from __future__ import annotations

import importlib

_HOME = {"Comparison": "scoring", "Evaluation": "scoring", "compare": "scoring", "evaluate": "scoring", "Options": "families.base",
         "Code": "observers.base", "Task": "tasks", "read_tasks": "tasks", "Target": "targets",
         "find_target": "targets", "load_target": "targets", "bootstrap_interval": "metrics", "extract": "metrics",
         "macro_f1": "metrics", "matches": "metrics"}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
