"""The library's front: load a model, plan a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn


def load(ref: str | Path, *, storage: Any = None, dtype: str | torch.dtype | None = None, task: str = "causal_lm",
         num_labels: int | None = None) -> tuple[nn.Module, Any]:
    """(model, tokenizer) of a packaged name, a Hugging Face folder, a .gguf file or a Hub id, its weights in a storage.

    storage: None or a name ("nf4") or a config object or {method, options}; "gguf" keeps the codes of a .gguf file.
    dtype: "bf16", "fp32" or a torch dtype (default: the checkpoint's). Raises ModelError (missing or damaged files) and
    UsageError (unknown storage)."""
    from .modeling.arithmetic import widen
    from .registry import MethodConfig, make_config
    from .storage.base import load_stored

    if storage is not None and not isinstance(storage, MethodConfig):
        options = {"method": storage} if isinstance(storage, str) else dict(storage)
        storage = make_config("storage", options.pop("method"), **options)
    model, tokenizer = load_stored(ref, storage, dtype=dtype, task=task, num_labels=num_labels)
    widen(model)
    return model, tokenizer


def plan(recipe: Any, **options: Any):
    """The memory ledger of a recipe (a path, a mapping or a Recipe) at its simulated peak; see planning.simulate."""
    from .planning.simulate import plan as simulate

    return simulate(recipe, **options)
