"""Any graft as a graft of method `lora`: exact where the method is low-rank, else by truncated SVD with its error reported.

The result is an artifact like any other: smaller or faster to serve than what it came from, and free of whatever the first
method needs (a random generator, another base edit). PiSSA becomes rank 2r on the pristine base.
"""

from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from ..adapters.graft import Graft, site_generator
from ..adapters.lora import LoRA, LoRAAdapter
from ..artifact import save_graft
from ..modeling.sites import Site, all_sites
from ..registry import lookup
from .factors import Factors, lora_factors, token_rows, whole_modules


def as_lora(graft: Graft, rank: int | None = None) -> tuple[Graft, float]:
    """(a `lora` graft with the same change, relative Frobenius error). It is not attached: it can be saved, not run.

    Raises UsageError for a method that is not low-rank and no rank, IncompatibleError for one that is no change of weights."""
    factors = lora_factors(graft, rank)
    return lora_of(graft, factors), factors.error


def lora_of(graft: Graft, factors: Factors) -> Graft:
    """A `lora` graft with these changes on the model of `graft`, whose saved modules it takes over."""
    pairs = {name: pair.folded() for name, pair in factors.modules.items()}
    for (module, attribute), entries in factors.experts.items():
        pairs |= {f"{module}.{attribute}.{expert}": pair.folded() for expert, pair in enumerate(entries) if pair is not None}
    config = _config(graft, factors, {name: pair.r for name, pair in pairs.items()})
    made = Graft(graft.model, graft.name, lookup("adapter", "lora"), config, graft.seed)
    sites: dict[str, Site] = {site.name: site for site in all_sites(graft.model)}
    for name in (s.name for s in sites.values() if s.name in pairs):
        adapter = LoRAAdapter(sites[name], config, shared=None, generator=site_generator(graft.seed, name))
        with torch.no_grad():
            adapter.lora_A.copy_(pairs[name].A)
            adapter.lora_B.copy_(pairs[name].B)
            if adapter.bias_change is not None and name in factors.biases:
                adapter.bias_change.copy_(factors.biases[name])
        made.sites[name], made.adapters[name] = sites[name], adapter
    made.saved_modules, made.trainable_tokens = _scaled_copies(graft)
    made.provenance = {**graft.provenance, "converted_from": graft.method}
    return made


def _scaled_copies(graft: Graft) -> tuple[dict[str, Any], dict[str, Any]]:
    """(saved modules, rows of tokens) of a graft as they act: the new graft has weight 1."""
    if graft.weight == 1.0:
        return graft.saved_modules, graft.trainable_tokens
    whole, tokens = deepcopy(graft.saved_modules), deepcopy(graft.trainable_tokens)
    with torch.no_grad():
        for name, values in whole_modules(graft).items():
            for key, value in values.items():
                getattr(whole[name], key).copy_(value)
        for name, rows in token_rows(graft).items():
            tokens[name].rows.copy_(rows)
    return whole, tokens


def _config(graft: Graft, factors: Factors, ranks: dict[str, int]) -> LoRA:
    r = factors.rank
    biased = any(bool(change.any()) for change in factors.biases.values())
    return LoRA(r=r, rank_pattern={f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != r},
                target_modules=sorted(ranks), bias="lora_only" if biased else "none",
                dropout=getattr(graft.config, "dropout", 0.0), modules_to_save=list(graft.config.modules_to_save),
                trainable_tokens=graft.config.trainable_tokens)


def write_lora(graft: Graft, folder: str | Path, *, rank: int | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Write the artifact. Returns {"error", "rank", "notes"}."""
    made, error = as_lora(graft, rank)
    save_graft(made, folder, overwrite=overwrite)
    return {"error": error, "rank": made.config.r, "notes": []}
