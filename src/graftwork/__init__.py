"""Graftwork: adapt a foundation model within a memory budget and serve thousands of the results from one machine."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

#: public name -> module that defines it; imported on first use, so that `graft --help` does not load torch
_PUBLIC = {
    "load": "graftwork.api", "attach_saved": "graftwork.artifact", "plan": "graftwork.api", "optimizer": "graftwork.optim",
    "attach": "graftwork.adapters", "routing": "graftwork.adapters", "Graft": "graftwork.adapters",
    "methods": "graftwork.registry", "register": "graftwork.registry", "MethodInfo": "graftwork.registry",
    "GraftworkError": "graftwork.errors", "TrainerMixin": "graftwork.training", "GraftTrainer": "graftwork.training",
    "Recipe": "graftwork.recipe", "load_recipe": "graftwork.recipe",
    "LoRA": "graftwork.adapters.lora", "NOLA": "graftwork.adapters.nola", "FLoRA": "graftwork.adapters.flora",
    "PaCA": "graftwork.adapters.paca", "LoPA": "graftwork.adapters.lopa", "NF4": "graftwork.storage.nf4",
}
__all__ = [*_PUBLIC, "__version__"]

if TYPE_CHECKING:
    from .adapters import Graft, attach, routing
    from .api import load, plan
    from .artifact import attach_saved
    from .optim import optimizer
    from .registry import methods


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'graftwork' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
