"""A saved graft together with the base it was trained on, ready to be merged or converted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ..adapters.graft import Graft
from ..artifact import CARD, attach_saved, read_card
from ..errors import ArtifactError
from .peft import read_document


def open_saved(folder: str | Path, *, model: str | Path | None = None, dtype: Any = None) -> tuple[nn.Module, Any, Graft]:
    """(model, tokenizer, graft): loads the recorded base (or `model`) in the storage the graft was trained on, and attaches it.

    Reads our artifacts and PEFT's. Raises ArtifactError (damaged, another base, no base recorded) and ModelError."""
    from ..registry import make_config
    from ..storage.base import load_stored
    from ..training.build import recorded_data

    folder = Path(folder)
    if not (folder / CARD).exists() and (folder / "adapter_config.json").exists():
        document = read_document(folder)
        ref, storage, labels, recipe, names = document.get("base_model_name_or_path"), None, None, None, None
        task = {"SEQ_CLS": "classification", "FEATURE_EXTRACTION": "encoder"}.get(document.get("task_type"), "causal_lm")
    else:
        card = read_card(folder)
        ref, storage, recipe = card["base"].get("model"), card.get("storage"), card.get("provenance", {}).get("recipe")
        kind = card["base"].get("class") or ""
        task = "classification" if kind.endswith("ForSequenceClassification") else \
            "causal_lm" if kind.endswith(("ForCausalLM", "LMHeadModel")) else "encoder"
        heads = [shape[0] for key, (shape, _) in card["tensors"].items()
                 if key.startswith("modules_to_save.") and key.endswith(".weight")]
        labels = heads[-1] if heads and task == "classification" else None
        names = card.get("provenance", {}).get("labels")
        if labels == 1 and not names:
            task = "regression"
    ref = model or ref
    if not ref:
        raise ArtifactError(f"{folder} does not say which model it belongs to", remedy="name it: --model FOLDER")
    options = dict(storage or {})
    config = make_config("storage", options.pop("method"), **options) if options else None
    data = recorded_data(storage, recipe, ref)
    loaded, tokenizer = load_stored(ref, config, task=task, dtype=dtype, num_labels=labels, keep_codes=True, batches=lambda *_: data)
    if names and task == "classification" and len(names) == loaded.config.num_labels:
        loaded.config.id2label = dict(enumerate(names))
        loaded.config.label2id = {name: i for i, name in enumerate(names)}
    return loaded, tokenizer, attach_saved(loaded, folder)
