"""The library's front: load a model, plan a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import UsageError


def load(ref: str | Path, *, storage: Any = None, dtype: str | torch.dtype | None = None, task: str = "causal_lm",
         num_labels: int | None = None, calibration_data: Any = None, samples: int = 128,
         length: int = 512) -> tuple[nn.Module, Any]:
    """(model, tokenizer) of a packaged name, a Hugging Face folder, a .gguf file or a Hub id, its weights in a storage. A folder of
    `graft quantize` keeps its codes.

    storage: None or a name ("nf4") or a config object or {method, options}; "gguf" keeps the codes of a .gguf file. dtype: "bf16",
    "fp32" or a torch dtype (default: the checkpoint's). calibration_data: for a storage whose codes depend on data; a file that
    training reads or a list of texts, of which `samples` rows of `length` tokens (no more than the model's context) are taken, or a
    function that returns batches of model inputs. Raises ModelError (missing or damaged files), UsageError (unknown storage) and
    DataError."""
    from .modeling.arithmetic import widen
    from .registry import MethodConfig, make_config
    from .storage.base import load_stored

    if storage is None and calibration_data is not None:
        raise UsageError("calibration_data does nothing without a storage", remedy="storage={'method': 'int4', 'calibration': 'gptq'}")
    if storage is not None and not isinstance(storage, MethodConfig):
        options = {"method": storage} if isinstance(storage, str) else dict(storage)
        storage = make_config("storage", options.pop("method"), **options)
    model, tokenizer = load_stored(
        ref, storage, dtype=dtype, task=task, num_labels=num_labels,
        batches=lambda model, tokenizer: _batches(model, tokenizer, storage, calibration_data, samples, length))
    widen(model)
    return model, tokenizer


def _batches(model: nn.Module, tokenizer: Any, storage: Any, data: Any, samples: int, length: int) -> Any:
    """What the storage is calibrated on; None where it reads nothing."""
    from .data.calibration import calibration_rows
    from .registry import lookup

    if data is None or callable(data):
        return data
    if not lookup("storage", storage.method).cls.needs(storage):
        raise UsageError(f"storage {storage.method} with these options reads no data", remedy="leave calibration_data out")
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None) or length
    rows = calibration_rows(data, tokenizer, samples=samples, length=min(length, room))
    return rows.batches


def plan(recipe: Any, **options: Any):
    """The memory ledger of a recipe (a path, a mapping or a Recipe) at its simulated peak; see planning.simulate."""
    from .planning.simulate import plan as simulate

    return simulate(recipe, **options)
