"""The adapters that PEFT has a format of its own for: one `Exchange` a method, read by peft.py and written by peft_export.py.

LoRA's own tensors (experts, biases) are read and written there; every other method is a row of `EXCHANGES`: which options of the
document mean which of ours, and under which name, in which shape and with which change of sign or origin each tensor is kept.
Methods with a random basis: peft_bases.py; virtual tokens: peft_prompts.py.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch

from ..adapters.base import Adapter, pattern_value
from ..adapters.graft import Graft
from ..errors import ArtifactError, IncompatibleError
from .peft_bases import RANDLORA, VERA
from .peft_exchange import (
    COMMON,
    LAYERS,
    PLAIN,
    TEMPLATE,
    Exchange,
    Names,
    Place,
    Shapes,
    most_common,
    named,
    one_rank,
    pattern,
    rank_options,
    ranked,
)
from .peft_prompts import PREFIX_TUNING, PROMPT_TUNING

_LYCORIS: dict[str, Any] = {
    **COMMON, **LAYERS, "alpha": 8, "alpha_pattern": {}, "init_weights": True, "module_dropout": 0.0, "r": 8, "rank_dropout": 0.0,
    "rank_pattern": {}, "use_effective_conv2d": False}


# -- LoRA and DoRA ------------------------------------------------------------------------------------------------------
def _lora_options(document: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    return {**rank_options(document, "lora_alpha"), "dropout": document.get("lora_dropout", 0.0),
            "use_rslora": document.get("use_rslora", False)}


def _lora_and_bias(document: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    options = _lora_options(document, shapes)
    if document.get("target_parameters"):  # our names go on with the expert
        for key in ("rank_pattern", "alpha_pattern"):
            options[key] = {**options[key], **{rf"(?:{k})\.\d+": v for k, v in options[key].items()}}
    biased = document.get("bias") == "lora_only" or document.get("lora_bias")
    return {**options, "bias": "lora_only" if biased else "none"}


def _dora_document(graft: Graft, names: Names) -> dict[str, Any]:
    return {**ranked(graft, "lora_alpha"), "lora_dropout": graft.config.dropout, "use_rslora": graft.config.use_rslora}


# -- (IA)^3 ---------------------------------------------------------------------------------------------------------------
def _ia3_options(document: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    """PEFT's words are ends of names, also within a part of a name."""
    words = document.get("feedforward_modules") or []
    return {"feedforward_modules": f".*(?:{'|'.join(map(re.escape, sorted(words)))})" if words and not isinstance(words, str) else words}


def _ia3_document(graft: Graft, names: Names) -> dict[str, Any]:
    """PEFT wants each word of feedforward_modules to be one of target_modules; a regular expression is free of that."""
    inner = {name for name, a in graft.adapters.items() if a.feedforward}
    if not inner:
        return {"feedforward_modules": []}
    words, targets = names(inner), names(set(graft.adapters))
    fits = isinstance(words, list) and isinstance(targets, list) and set(words) <= set(targets)
    return {"feedforward_modules": words if fits else "|".join(re.escape(name) for name in sorted(inner))}


def _ia3_tensors(adapter: Adapter, document: dict[str, Any], weight: float) -> dict[str, Place]:
    shape = (1, adapter.in_features) if adapter.feedforward else (adapter.out_features, 1)
    return {"ia3_l": Place(adapter.growth, shape, shift=1.0)}


# -- LoKr -----------------------------------------------------------------------------------------------------------------
def _lokr_options(document: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    return {**rank_options(document, "alpha"), "decompose_both": document.get("decompose_both", False),
            "decompose_factor": document.get("decompose_factor", -1)}


def _lokr_document(graft: Graft, names: Names) -> dict[str, Any]:
    return {**ranked(graft, "alpha"), "decompose_both": graft.config.decompose_both, "decompose_factor": graft.config.decompose_factor}


# -- OFT ------------------------------------------------------------------------------------------------------------------
def _oft_options(document: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    """The block sizes are taken from the tensors: PEFT changes those that do not divide a map."""
    sizes = {key.removesuffix(".oft_R.weight"): (1 + math.isqrt(1 + 8 * shape[1])) // 2 for key, shape in shapes().items()
             if key.endswith(".oft_R.weight") and len(shape) == 2}
    if not sizes:
        raise ArtifactError("this OFT folder holds no rotation", remedy="the file is not complete; get it again")
    size, terms = most_common(sizes.values()), None
    if document.get("use_cayley_neumann", True):
        terms = document.get("num_cayley_neumann_terms", 5)
        if terms < 3:
            raise ArtifactError(f"num_cayley_neumann_terms={terms} is not read here", remedy="merge it with PEFT (merge_and_unload)")
        terms = max(terms, 4)  # PEFT's code takes the same terms for 3 as for 4
    return {"block_size": size, "block_size_pattern": pattern(sizes, size, {}), "block_share": document.get("block_share", False),
            "neumann_terms": terms}


def _oft_document(graft: Graft, names: Names) -> dict[str, Any]:
    sizes, counts = {a.size for a in graft.adapters.values()}, {a.blocks for a in graft.adapters.values()}
    if len(sizes) > 1 and len(counts) > 1:
        raise IncompatibleError(f"PEFT holds one block size or one number of blocks; this graft has blocks of {sorted(sizes)}",
                                remedy="convert --to merged, or --to lora with a rank")
    terms = graft.config.neumann_terms
    shape = {"oft_block_size": min(sizes), "r": 0} if len(sizes) == 1 else {"oft_block_size": 0, "r": min(counts)}
    return {**shape, "block_share": graft.config.block_share, "use_cayley_neumann": terms is not None,
            "num_cayley_neumann_terms": terms or 5}


def _oft_tensors(adapter: Adapter, document: dict[str, Any], weight: float) -> dict[str, Place]:
    series = document.get("use_cayley_neumann", True)  # PEFT's exact form is the inverse rotation of its series
    return {"oft_R.weight": Place(adapter.upper, factor=1.0 if series else -1.0)}


# -- MiSS and BAT -----------------------------------------------------------------------------------------------------------
def _miss_options(document: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    """PEFT reads mini_r in its mini form only."""
    mini = document.get("mini_r", 1) if document.get("init_weights", True) == "mini" else None
    return {"r": document.get("r", 64), "dropout": document.get("miss_dropout", 0.0), "mini_r": mini}


def _miss_document(graft: Graft, names: Names) -> dict[str, Any]:
    mini = graft.config.mini_r
    return {"r": next(iter(graft.adapters.values())).r, "miss_dropout": graft.config.dropout, "mini_r": mini or 1,
            "init_weights": "mini" if mini else True}


def _bat_document(graft: Graft, names: Names) -> dict[str, Any]:
    if not one_rank(graft):
        raise IncompatibleError(f"PEFT holds one r of 'bat'; this graft has {sorted({a.r for a in graft.adapters.values()})}",
                                remedy="convert --to merged, or --to lora with a rank")
    return {"r": next(iter(graft.adapters.values())).r, "miss_dropout": graft.config.dropout, "init_weights": "bat"}


# -- AdaLoRA ----------------------------------------------------------------------------------------------------------------
def _adalora_options(document: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    r = document.get("init_r", 12)
    alpha = document.get("lora_alpha", 8)
    return {"r": r, "alpha": (alpha if alpha > 0 else r) * r / (r + 1e-5), "dropout": document.get("lora_dropout", 0.0),
            "orth": document.get("orth_reg_weight", 0.5)}


def _adalora_document(graft: Graft, names: Names) -> dict[str, Any]:
    """PEFT's scale is that of the rank before pruning; sites with fewer ranks are named with the ranks that stayed."""
    rows = {name: a.artifact_state()["gate"].shape[0] for name, a in graft.adapters.items()}
    r, scale = max(graft.config.r, *rows.values()), next(iter(graft.adapters.values())).scale
    stayed = {f"{name}.lora_E": [i < n for i in range(r)] for name, n in rows.items() if n < r}
    return {"init_r": r, "target_r": max(1, round(sum(rows.values()) / len(rows))), "lora_alpha": scale * graft.weight * (r + 1e-5),
            "lora_dropout": graft.config.dropout, "orth_reg_weight": graft.config.orth, "total_step": 1,
            "rank_pattern": stayed or None}


def _adalora_tensors(adapter: Adapter, document: dict[str, Any], weight: float) -> dict[str, Place]:
    stayed = (document.get("rank_pattern") or {}).get(f"{adapter.site_name}.lora_E")
    rows = document.get("init_r", 12) if stayed is None else sum(stayed)
    state = adapter.artifact_state()
    if rows != state["gate"].shape[0]:  # read: the adapter has all its ranks yet
        adapter.resize(max(rows, 1), max(rows, 1))
        state = {name: tensor.zero_() for name, tensor in adapter.named_parameters()}
        if not rows:  # a site without ranks keeps one of zeros; the file has empty tensors
            state = {"gate": torch.empty(0), "lora_A": torch.empty(0, adapter.in_features), "lora_B": torch.empty(adapter.out_features, 0)}
    return {"lora_A": Place(state["lora_A"]), "lora_E": Place(state["gate"], (rows, 1)), "lora_B": Place(state["lora_B"])}


# -- KaSA -------------------------------------------------------------------------------------------------------------------
def _kasa_options(document: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    terms = document.get("kasa_config") or {}
    return {"r": document.get("r", 8), "alpha": document.get("lora_alpha", 8), "rank_pattern": document.get("rank_pattern") or {},
            "beta": terms.get("beta", 1e-4), "gamma": terms.get("gamma", 1e-3)}


def _kasa_document(graft: Graft, names: Names) -> dict[str, Any]:
    return {**ranked(graft, "lora_alpha"), "kasa_config": {"beta": graft.config.beta, "gamma": graft.config.gamma}}


def _kasa_tensors(adapter: Adapter, document: dict[str, Any], weight: float) -> dict[str, Place]:
    """Scales that one alpha does not give (alpha_pattern, rsLoRA) go into sigma."""
    alpha = pattern_value(document.get("alpha_pattern") or {}, adapter.site_name, document.get("lora_alpha", 8))
    scale = alpha / (math.sqrt(adapter.r) if document.get("use_rslora") else adapter.r)
    return {"lora_A.weight": Place(adapter.A), "lora_B.weight": Place(adapter.B),
            "lora_diag": Place(adapter.sigma, factor=adapter.scale * weight / scale)}


_MISS: dict[str, Any] = {**COMMON, **LAYERS, "peft_type": "MISS", "bias": "none", "init_weights": True, "mini_r": 1, "miss_dropout": 0.0,
                         "r": 64}
#: every method that PEFT has too
EXCHANGES: dict[str, Exchange] = {exchange.method: exchange for exchange in (
    Exchange("lora", TEMPLATE, _lora_and_bias, transposed=True,
             chosen=lambda document: not document.get("use_dora") and document.get("kasa_config") is None),
    Exchange("dora", {**TEMPLATE, "use_dora": True}, _lora_options, _dora_document,
             named({"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}),
             only={**PLAIN, "kasa_config": (None,)}, transposed=True, chosen=lambda document: bool(document.get("use_dora"))),
    Exchange("kasa", {**TEMPLATE, "kasa_config": {"beta": 1e-4, "gamma": 1e-3}}, _kasa_options, _kasa_document, _kasa_tensors,
             only=PLAIN, chosen=lambda document: document.get("kasa_config") is not None and not document.get("use_dora"),
             holds=lambda graft: graft.config.truncate and graft.weight == 1.0),  # the tail is dropped whole
    Exchange("adalora", {**TEMPLATE, "peft_type": "ADALORA", "beta1": 0.85, "beta2": 0.85, "deltaT": 1, "init_r": 12,
                         "orth_reg_weight": 0.5, "rank_pattern": None, "target_r": 8, "tfinal": 0, "tinit": 0, "total_step": None},
             _adalora_options, _adalora_document, _adalora_tensors, only={**PLAIN, "kasa_config": (None,), "use_dora": (False,)},
             transposed=True),
    Exchange("ia3", {**COMMON, "peft_type": "IA3", "fan_in_fan_out": False, "feedforward_modules": None, "init_ia3_weights": True},
             _ia3_options, _ia3_document, _ia3_tensors, transposed=True),
    Exchange("loha", {**_LYCORIS, "peft_type": "LOHA"}, lambda document, shapes: rank_options(document, "alpha"),
             lambda graft, names: ranked(graft, "alpha"),
             named({"B1": "hada_w1_a", "A1": "hada_w1_b", "B2": "hada_w2_a", "A2": "hada_w2_b"})),
    Exchange("lokr", {**_LYCORIS, "peft_type": "LOKR", "decompose_both": False, "decompose_factor": -1, "rank_dropout_scale": False},
             _lokr_options, _lokr_document,
             named({"W1": "lokr_w1", "W1a": "lokr_w1_a", "W1b": "lokr_w1_b", "W2": "lokr_w2", "W2a": "lokr_w2_a", "W2b": "lokr_w2_b"})),
    Exchange("oft", {**COMMON, **LAYERS, "peft_type": "OFT", "bias": "none", "block_share": False, "coft": False, "eps": 6e-05,
                     "fan_in_fan_out": False, "init_weights": True, "module_dropout": 0.0, "num_cayley_neumann_terms": 5,
                     "oft_block_size": 32, "r": 0, "use_cayley_neumann": True},
             _oft_options, _oft_document, _oft_tensors, only={"coft": (False,), "bias": ("none",)}),
    Exchange("miss", _MISS, _miss_options, _miss_document,
             lambda adapter, document, weight: {"miss_block": Place(adapter.miss_D, factor=weight)}, only={"bias": ("none",)},
             chosen=lambda document: document.get("init_weights") != "bat", holds=one_rank),
    Exchange("bat", {**_MISS, "init_weights": "bat"},
             lambda document, shapes: {"r": document.get("r", 64), "dropout": document.get("miss_dropout", 0.0)}, _bat_document,
             lambda adapter, document, weight: {"miss_block": Place(adapter.bat_D, factor=weight)}, only={"bias": ("none",)},
             chosen=lambda document: document.get("init_weights") == "bat"),
    VERA, RANDLORA, PROMPT_TUNING, PREFIX_TUNING,
)}


def exchange_of(document: dict[str, Any]) -> Exchange | None:
    """The row for an adapter_config.json, or None for a type that is not read."""
    return next((e for e in EXCHANGES.values() if e.template["peft_type"] == document["peft_type"] and e.chosen(document)), None)
