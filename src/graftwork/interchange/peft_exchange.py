"""What the rows of the exchange with PEFT are made of: where a tensor lies in the file, and what a method's folder says."""

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

#: entries of every adapter_config.json
BASIC: dict[str, Any] = {
    "auto_mapping": None, "base_model_name_or_path": None, "inference_mode": True, "peft_version": "0.21.2", "revision": None,
    "task_type": None}
#: and of those that name modules
TARGETED: dict[str, Any] = {**BASIC, "modules_to_save": None, "target_modules": None}
COMMON: dict[str, Any] = {**TARGETED, "exclude_modules": None}
LAYERS: dict[str, Any] = {"layers_pattern": None, "layers_to_transform": None}
#: adapter_config.json of a LoRA, defaults of peft 0.21.2
TEMPLATE: dict[str, Any] = {
    **COMMON, **LAYERS, "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "bias": "none", "corda_config": None,
    "ensure_weight_tying": False, "eva_config": None, "fan_in_fan_out": False, "init_lora_weights": True, "kasa_config": None,
    "layer_replication": None, "loftq_config": {}, "lora_alpha": 8, "lora_bias": False, "lora_dropout": 0.0, "lora_ga_config": None,
    "megatron_config": None, "megatron_core": "megatron.core", "monteclora_config": None, "peft_type": "LORA", "qalora_group_size": 16,
    "r": 8, "rank_pattern": {}, "target_parameters": None, "trainable_token_indices": None, "use_bdlora": None, "use_dora": False,
    "use_qalora": False, "use_rslora": False, "velora_config": None}
#: what no variant of LoRA but LoRA itself may have
PLAIN: dict[str, tuple] = {"bias": ("none",), "lora_bias": (False,), "target_parameters": (None, [])}

#: {key in the file: shape}, read when an option is only to be seen there
Shapes = Callable[[], dict[str, tuple[int, ...]]]
#: names of modules -> target_modules
Names = Callable[[set[str]], Any]


@dataclass(frozen=True)
class Place:
    """One tensor in the file: parameter * factor + shift, its dimensions in `order`, in that shape (default: what the order gives).
    leading: the file may hold more, of which the first entries of each dimension count."""

    parameter: Tensor
    shape: tuple[int, ...] | None = None
    factor: float = 1.0
    shift: float = 0.0
    order: tuple[int, ...] | None = None
    leading: bool = False

    @property
    def _ordered(self) -> tuple[int, ...]:
        own = tuple(self.parameter.shape)
        return own if self.order is None else tuple(own[i] for i in self.order)

    @property
    def file_shape(self) -> tuple[int, ...]:
        return self._ordered if self.shape is None else self.shape

    def put(self, value: Tensor) -> None:
        """Take the value of the file."""
        value = ((value.float() - self.shift) / self.factor).reshape(self._ordered)
        if self.order is not None:
            value = value.permute([self.order.index(i) for i in range(value.dim())])
        self.parameter.copy_(value)

    def file_value(self) -> Tensor:
        value = self.parameter.detach().float().cpu() * self.factor + self.shift
        return (value if self.order is None else value.permute(self.order)).reshape(self.file_shape)


@dataclass(frozen=True)
class Exchange:
    """How a method looks in PEFT.

    template: its adapter_config.json by default. options(document, shapes): our options, without targets. document(graft, names): what
    to write over the template; names(modules) gives target_modules for a set of modules. tensors(adapter, document, weight): {end of
    the key: Place}, with the graft's weight folded in. shared(graft, document): {whole key: Place} of what all sites share.
    only: options whose other values change the result. transposed: PEFT has it for GPT-2's Conv1D too. chosen(document): this row,
    where one peft_type has several. holds(graft): PEFT can say it; else it is written as a LoRA. seed: where the seed stands.
    notes: what a user of the written folder should know."""

    method: str
    template: dict[str, Any]
    options: Callable[[dict[str, Any], Shapes], dict[str, Any]]
    document: Callable[[Graft, Names], dict[str, Any]] | None = None
    tensors: Callable[[Adapter, dict[str, Any], float], dict[str, Place]] | None = None
    shared: Callable[[Graft, dict[str, Any]], dict[str, Place]] | None = None
    only: dict[str, tuple] = field(default_factory=dict)
    transposed: bool = False
    chosen: Callable[[dict[str, Any]], bool] = lambda document: True
    holds: Callable[[Graft], bool] = lambda graft: True
    seed: str | None = None
    notes: tuple[str, ...] = ()


def named(names: dict[str, str]) -> Callable[[Adapter, dict[str, Any], float], dict[str, Place]]:
    """Tensors that are the same in both: {our parameter: end of PEFT's key}; a parameter that a form does not have is left out."""
    def places(adapter: Adapter, document: dict[str, Any], weight: float) -> dict[str, Place]:
        return {key: Place(adapter._parameters[own]) for own, key in names.items() if adapter._parameters.get(own) is not None}

    return places


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


def most_common(values) -> Any:
    return Counter(values).most_common(1)[0][0]


def ranked(graft: Graft, alpha_key: str) -> dict[str, Any]:
    """Ranks and alphas of the sites, with the graft's weight in the alphas."""
    config, rs = graft.config, getattr(graft.config, "use_rslora", False)
    ranks = {name: a.r for name, a in graft.adapters.items()}
    alphas = {name: alpha_of(a.scale * graft.weight, a.r, rs) for name, a in graft.adapters.items()}
    r, alpha = most_common(ranks.values()), most_common(alphas.values())
    return {"r": r, alpha_key: alpha, "rank_pattern": pattern(ranks, r, config.rank_pattern),
            "alpha_pattern": pattern(alphas, alpha, getattr(config, "alpha_pattern", {}))}


def rank_options(document: dict[str, Any], alpha_key: str) -> dict[str, Any]:
    return {"r": document.get("r", 8), "alpha": document.get(alpha_key, 8), "rank_pattern": document.get("rank_pattern") or {},
            "alpha_pattern": document.get("alpha_pattern") or {}}


def one_rank(graft: Graft) -> bool:
    """True where all sites have one rank, for methods of which PEFT knows no pattern of ranks."""
    return len({adapter.r for adapter in graft.adapters.values()}) == 1
