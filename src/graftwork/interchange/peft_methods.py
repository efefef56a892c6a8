"""The adapters that PEFT has a format of its own for: one `Exchange` a method, read by peft.py and written by peft_export.py.

LoRA's own tensors (experts, biases) are read and written there; every other method is a row of `EXCHANGES`: which options of the
document mean which of ours, and under which name, in which shape and with which change of sign or origin each tensor is kept.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..adapters.base import Adapter, pattern_value
from ..adapters.graft import Graft
from ..errors import ArtifactError, IncompatibleError

_COMMON: dict[str, Any] = {
    "auto_mapping": None, "base_model_name_or_path": None, "exclude_modules": None, "inference_mode": True, "modules_to_save": None,
    "peft_version": "0.21.2", "revision": None, "target_modules": None, "task_type": None}
_LAYERS: dict[str, Any] = {"layers_pattern": None, "layers_to_transform": None}
#: adapter_config.json of a LoRA, defaults of peft 0.21.2
TEMPLATE: dict[str, Any] = {
    **_COMMON, **_LAYERS, "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "bias": "none", "corda_config": None,
    "ensure_weight_tying": False, "eva_config": None, "fan_in_fan_out": False, "init_lora_weights": True, "kasa_config": None,
    "layer_replication": None, "loftq_config": {}, "lora_alpha": 8, "lora_bias": False, "lora_dropout": 0.0, "lora_ga_config": None,
    "megatron_config": None, "megatron_core": "megatron.core", "monteclora_config": None, "peft_type": "LORA", "qalora_group_size": 16,
    "r": 8, "rank_pattern": {}, "target_parameters": None, "trainable_token_indices": None, "use_bdlora": None, "use_dora": False,
    "use_qalora": False, "use_rslora": False, "velora_config": None}
_LYCORIS: dict[str, Any] = {
    **_COMMON, **_LAYERS, "alpha": 8, "alpha_pattern": {}, "init_weights": True, "module_dropout": 0.0, "r": 8, "rank_dropout": 0.0,
    "rank_pattern": {}, "use_effective_conv2d": False}

#: {key in the file: shape}, read when an option is only to be seen there
Shapes = Callable[[], dict[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Place:
    """One tensor in the file: parameter * factor + shift, in that shape (default: the parameter's own)."""

    parameter: Tensor
    shape: tuple[int, ...] | None = None
    factor: float = 1.0
    shift: float = 0.0

    @property
    def file_shape(self) -> tuple[int, ...]:
        return tuple(self.parameter.shape) if self.shape is None else self.shape

    def put(self, value: Tensor) -> None:
        """Take the value of the file."""
        self.parameter.copy_(((value.float() - self.shift) / self.factor).view(self.parameter.shape))

    def file_value(self) -> Tensor:
        return (self.parameter.detach().float().cpu() * self.factor + self.shift).view(self.file_shape)


@dataclass(frozen=True)
class Exchange:
    """How a method looks in PEFT.

    template: its adapter_config.json by default. options(document, shapes): our options, without targets. document(graft, names): what
    to write over the template; names(modules) gives target_modules for a set of modules. tensors(adapter, document): {end of the key:
    Place}. only: options whose other values change the result. transposed: PEFT has it for GPT-2's Conv1D too."""

    method: str
    template: dict[str, Any]
    options: Callable[[dict[str, Any], Shapes], dict[str, Any]]
    document: Callable[[Graft, Callable[[set[str]], Any]], dict[str, Any]] | None = None
    tensors: Callable[[Adapter, dict[str, Any]], dict[str, Place]] | None = None
    only: dict[str, tuple] = field(default_factory=dict)
    transposed: bool = False


# -- ranks and scales ---------------------------------------------------------------------------------------------------
def alpha_of(scale: float, r: int, rs: bool) -> float:
    """The alpha with which PEFT computes exactly this scale, an integer where there is one."""
    root = math.sqrt(r) if rs else r
    alpha = scale * root
    near = round(alpha)
    alpha = near if near and near / root == scale else alpha
    return int(alpha) if float(alpha).is_integer() else alpha


def pattern(values: dict[str, Any], default: Any, own: dict[str, Any]) -> dict[str, Any]:
    """PEFT's pattern for {module: value}: the graft's own where it says just that, else one entry per module."""
    if all(pattern_value(own, name, default) == value for name, value in values.items()):
        return dict(own)
    return {f"^{re.escape(name)}": value for name, value in sorted(values.items()) if value != default}


def _common(values) -> Any:
    return Counter(values).most_common(1)[0][0]


def _ranked(graft: Graft, alpha_key: str) -> dict[str, Any]:
    config, rs = graft.config, getattr(graft.config, "use_rslora", False)
    ranks = {name: a.r for name, a in graft.adapters.items()}
    alphas = {name: alpha_of(a.scale * graft.weight, a.r, rs) for name, a in graft.adapters.items()}
    r, alpha = _common(ranks.values()), _common(alphas.values())
    return {"r": r, alpha_key: alpha, "rank_pattern": pattern(ranks, r, config.rank_pattern),
            "alpha_pattern": pattern(alphas, alpha, config.alpha_pattern)}


def _rank_options(document: dict[str, Any], alpha_key: str) -> dict[str, Any]:
    return {"r": document.get("r", 8), "alpha": document.get(alpha_key, 8), "rank_pattern": document.get("rank_pattern") or {},
            "alpha_pattern": document.get("alpha_pattern") or {}}


def _named(names: dict[str, str]) -> Callable[[Adapter, dict[str, Any]], dict[str, Place]]:
    """Tensors that are the same in both: {our parameter: end of PEFT's key}; a parameter that a form does not have is left out."""
    def places(adapter: Adapter, document: dict[str, Any]) -> dict[str, Place]:
        return {key: Place(adapter._parameters[own]) for own, key in names.items() if adapter._parameters.get(own) is not None}

    return places


# -- LoRA and DoRA ------------------------------------------------------------------------------------------------------
def _lora_options(document: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    return {**_rank_options(document, "lora_alpha"), "dropout": document.get("lora_dropout", 0.0),
            "use_rslora": document.get("use_rslora", False)}


def _lora_and_bias(document: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    options = _lora_options(document, shapes)
    if document.get("target_parameters"):  # our names go on with the expert
        for key in ("rank_pattern", "alpha_pattern"):
            options[key] = {**options[key], **{rf"(?:{k})\.\d+": v for k, v in options[key].items()}}
    biased = document.get("bias") == "lora_only" or document.get("lora_bias")
    return {**options, "bias": "lora_only" if biased else "none"}


def _dora_document(graft: Graft, names) -> dict[str, Any]:
    return {**_ranked(graft, "lora_alpha"), "lora_dropout": graft.config.dropout, "use_rslora": graft.config.use_rslora}


# -- (IA)^3 ---------------------------------------------------------------------------------------------------------------
def _ia3_options(document: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    """PEFT's words are ends of names, also within a part of a name."""
    words = document.get("feedforward_modules") or []
    return {"feedforward_modules": f".*(?:{'|'.join(map(re.escape, sorted(words)))})" if words and not isinstance(words, str) else words}


def _ia3_document(graft: Graft, names) -> dict[str, Any]:
    """PEFT wants each word of feedforward_modules to be one of target_modules; a regular expression is free of that."""
    inner = {name for name, a in graft.adapters.items() if a.feedforward}
    if not inner:
        return {"feedforward_modules": []}
    words, targets = names(inner), names(set(graft.adapters))
    fits = isinstance(words, list) and isinstance(targets, list) and set(words) <= set(targets)
    return {"feedforward_modules": words if fits else "|".join(re.escape(name) for name in sorted(inner))}


def _ia3_tensors(adapter: Adapter, document: dict[str, Any]) -> dict[str, Place]:
    shape = (1, adapter.in_features) if adapter.feedforward else (adapter.out_features, 1)
    return {"ia3_l": Place(adapter.growth, shape, shift=1.0)}


# -- LoKr -----------------------------------------------------------------------------------------------------------------
def _lokr_options(document: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    return {**_rank_options(document, "alpha"), "decompose_both": document.get("decompose_both", False),
            "decompose_factor": document.get("decompose_factor", -1)}


def _lokr_document(graft: Graft, names) -> dict[str, Any]:
    return {**_ranked(graft, "alpha"), "decompose_both": graft.config.decompose_both, "decompose_factor": graft.config.decompose_factor}


# -- OFT ------------------------------------------------------------------------------------------------------------------
def _oft_options(document: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    """The block sizes are taken from the tensors: PEFT changes those that do not divide a map."""
    sizes = {key.removesuffix(".oft_R.weight"): (1 + math.isqrt(1 + 8 * shape[1])) // 2 for key, shape in shapes().items()
             if key.endswith(".oft_R.weight") and len(shape) == 2}
    if not sizes:
        raise ArtifactError("this OFT folder holds no rotation", remedy="the file is not complete; get it again")
    size, terms = _common(sizes.values()), None
    if document.get("use_cayley_neumann", True):
        terms = document.get("num_cayley_neumann_terms", 5)
        if terms < 3:
            raise ArtifactError(f"num_cayley_neumann_terms={terms} is not read here", remedy="merge it with PEFT (merge_and_unload)")
        terms = max(terms, 4)  # PEFT's code takes the same terms for 3 as for 4
    return {"block_size": size, "block_size_pattern": pattern(sizes, size, {}), "block_share": document.get("block_share", False),
            "neumann_terms": terms}


def _oft_document(graft: Graft, names) -> dict[str, Any]:
    sizes, counts = {a.size for a in graft.adapters.values()}, {a.blocks for a in graft.adapters.values()}
    if len(sizes) > 1 and len(counts) > 1:
        raise IncompatibleError(f"PEFT holds one block size or one number of blocks; this graft has blocks of {sorted(sizes)}",
                                remedy="convert --to merged, or --to lora with a rank")
    terms = graft.config.neumann_terms
    shape = {"oft_block_size": min(sizes), "r": 0} if len(sizes) == 1 else {"oft_block_size": 0, "r": min(counts)}
    return {**shape, "block_share": graft.config.block_share, "use_cayley_neumann": terms is not None,
            "num_cayley_neumann_terms": terms or 5}


def _oft_tensors(adapter: Adapter, document: dict[str, Any]) -> dict[str, Place]:
    series = document.get("use_cayley_neumann", True)  # PEFT's exact form is the inverse rotation of its series
    return {"oft_R.weight": Place(adapter.upper, factor=1.0 if series else -1.0)}


#: every method that PEFT has too
EXCHANGES: dict[str, Exchange] = {exchange.method: exchange for exchange in (
    Exchange("lora", TEMPLATE, _lora_and_bias, transposed=True),
    Exchange("dora", {**TEMPLATE, "use_dora": True}, _lora_options, _dora_document,
             _named({"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}),
             only={"bias": ("none",), "lora_bias": (False,), "target_parameters": (None, [])}, transposed=True),
    Exchange("ia3", {**_COMMON, "peft_type": "IA3", "fan_in_fan_out": False, "feedforward_modules": None, "init_ia3_weights": True},
             _ia3_options, _ia3_document, _ia3_tensors, transposed=True),
    Exchange("loha", {**_LYCORIS, "peft_type": "LOHA"}, lambda document, shapes: _rank_options(document, "alpha"),
             lambda graft, names: _ranked(graft, "alpha"),
             _named({"B1": "hada_w1_a", "A1": "hada_w1_b", "B2": "hada_w2_a", "A2": "hada_w2_b"})),
    Exchange("lokr", {**_LYCORIS, "peft_type": "LOKR", "decompose_both": False, "decompose_factor": -1, "rank_dropout_scale": False},
             _lokr_options, _lokr_document,
             _named({"W1": "lokr_w1", "W1a": "lokr_w1_a", "W1b": "lokr_w1_b", "W2": "lokr_w2", "W2a": "lokr_w2_a", "W2b": "lokr_w2_b"})),
    Exchange("oft", {**_COMMON, **_LAYERS, "peft_type": "OFT", "bias": "none", "block_share": False, "coft": False, "eps": 6e-05,
                     "fan_in_fan_out": False, "init_weights": True, "module_dropout": 0.0, "num_cayley_neumann_terms": 5,
                     "oft_block_size": 32, "r": 0, "use_cayley_neumann": True},
             _oft_options, _oft_document, _oft_tensors, only={"coft": (False,), "bias": ("none",)}),
)}


def exchange_of(document: dict[str, Any]) -> Exchange | None:
    """The row for an adapter_config.json, or None for a type that is not read."""
    kind, split = document["peft_type"], bool(document.get("use_dora"))
    return next((e for e in EXCHANGES.values() if e.template["peft_type"] == kind and bool(e.template.get("use_dora")) == split), None)
