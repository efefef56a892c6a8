"""Writing PEFT LoRA folders; the format and its two styles are described in peft.py."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.graft import Graft
from ..adapters.lora import LoRA
from ..errors import IncompatibleError
from ..files import atomic_folder
from ..modeling.experts import ATTRIBUTES
from ..modeling.protocols import is_conv1d
from ..modeling.sites import linear_modules
from .factors import Factors, LowRank, base_name, lora_factors

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
#: adapter_config.json of a LoRA, defaults of peft 0.21.2
TEMPLATE: dict[str, Any] = {
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None,
    "base_model_name_or_path": None, "bias": "none", "corda_config": None, "ensure_weight_tying": False, "eva_config": None,
    "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "kasa_config": None,
    "layer_replication": None, "layers_pattern": None, "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 8,
    "lora_bias": False, "lora_dropout": 0.0, "lora_ga_config": None, "megatron_config": None, "megatron_core": "megatron.core",
    "modules_to_save": None, "monteclora_config": None, "peft_type": "LORA", "peft_version": "0.21.2", "qalora_group_size": 16,
    "r": 8, "rank_pattern": {}, "revision": None, "target_modules": None, "target_parameters": None, "task_type": None,
    "trainable_token_indices": None, "use_bdlora": None, "use_dora": False, "use_qalora": False, "use_rslora": False,
    "velora_config": None}


def write_peft(graft: Graft, folder: str | Path, *, style: str = "exact", rank: int | None = None,
               overwrite: bool = False) -> dict[str, Any]:
    """Write a graft as a PEFT LoRA. style: 'exact' or 'baked'; rank: see `lora_factors`.

    Returns {"error", "rank", "notes"}. Raises IncompatibleError for what the target cannot hold."""
    factors = lora_factors(graft, rank)
    config = dict(TEMPLATE, base_model_name_or_path=base_name(graft), task_type=_task(graft))
    notes: list[str] = []
    if style == "baked":
        _refuse_extras(graft, factors)
        r = factors.rank
        factors.modules = {name: pair.folded(r) for name, pair in factors.modules.items()}
        factors.experts = {key: [p and p.folded(r) for p in pairs] for key, pairs in factors.experts.items()}
        if r > 16:
            notes.append(f"vLLM: start it with --max-lora-rank {next(m for m in (32, 64, 128, 256, 320, 512, r) if m >= r)}")
        config.update(r=r, lora_alpha=r)
    else:
        _exact_config(graft, factors, config)
    tensors = _tensors(factors, config)
    _bias_tensors(graft, factors, config, tensors)
    for name, module in graft.saved_modules.items():
        tensors[f"{PREFIX}{name}.weight"] = module.weight.detach().cpu()
        if module.bias is not None:
            tensors[f"{PREFIX}{name}.bias"] = module.bias.detach().cpu()
    if graft.saved_modules:
        config["modules_to_save"] = sorted(graft.saved_modules)
    config["target_modules"] = target_names(graft.model, set(factors.modules))
    config["fan_in_fan_out"] = any(is_conv1d(graft.model.get_submodule(name)) for name in factors.modules)
    if factors.experts:
        config["target_parameters"] = sorted(f"{module}.{attribute}" for module, attribute in factors.experts)
    if config["task_type"] == "SEQ_CLS" and not graft.saved_modules:
        config["task_type"] = None  # PEFT would expect a saved head
    write_folder(folder, TENSORS, tensors, CONFIG, config, overwrite=overwrite)
    return {"error": factors.error, "rank": factors.rank, "notes": notes}


def write_folder(folder: str | Path, tensor_file: str, tensors: dict[str, Tensor], config_file: str, config: dict[str, Any], *,
                 overwrite: bool) -> None:
    """Tensors and a JSON config, together or not at all."""
    from safetensors.torch import save_file

    with atomic_folder(folder, overwrite=overwrite) as target:
        save_file({k: tensors[k].contiguous() for k in sorted(tensors)}, target / tensor_file, metadata={"format": "pt"})
        (target / config_file).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def _task(graft: Graft) -> str | None:
    kind = type(graft.model).__name__
    tasks = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS"}
    return next((task for ending, task in tasks.items() if kind.endswith(ending)), "FEATURE_EXTRACTION")


def _refuse_extras(graft: Graft, factors: Factors) -> None:
    if graft.saved_modules:
        names = ", ".join(graft.saved_modules)
        raise IncompatibleError(f"this graft replaces whole modules ({names}): vLLM and LoRAX refuse that",
                                remedy="convert --to merged, or --to peft for readers that know modules_to_save")
    if any(bool(change.any()) for change in factors.biases.values()):
        raise IncompatibleError("this graft changes biases: vLLM and LoRAX refuse that",
                                remedy="convert --to merged or --to peft")
    factors.biases = {}


def _exact_config(graft: Graft, factors: Factors, config: dict[str, Any]) -> None:
    """r, lora_alpha and their patterns so that PEFT computes every module's own scale."""
    own = graft.config if isinstance(graft.config, LoRA) else None
    rs = bool(own and own.use_rslora)
    places = {**factors.modules, **{f"{m}.{a}": max((p for p in pairs if p), key=lambda p: p.r)
                                    for (m, a), pairs in factors.experts.items()}}
    for (module, attribute), pairs in factors.experts.items():  # one rank and one scale per parameter
        r = places[f"{module}.{attribute}"].r
        uniform = all(p and (p.r, p.scale) == (r, pairs[0].scale) for p in pairs)
        if not uniform:
            factors.experts[module, attribute] = [p and p.folded(r) for p in pairs]
            places[f"{module}.{attribute}"] = next(p for p in factors.experts[module, attribute] if p)
    ranks = {name: pair.r for name, pair in places.items()}
    alphas = {name: _alpha(pair, rs) for name, pair in places.items()}
    r = own.r if own and own.r in ranks.values() else max(ranks.values(), key=list(ranks.values()).count)
    alpha = max(alphas.values(), key=list(alphas.values()).count)
    config.update(r=r, lora_alpha=alpha, use_rslora=rs, lora_dropout=own.dropout if own and not factors.experts else 0.0)
    config["rank_pattern"] = _pattern(ranks, r, own.rank_pattern if own else {})
    config["alpha_pattern"] = _pattern(alphas, alpha, own.alpha_pattern if own else {})


def _alpha(pair: LowRank, rs: bool) -> float:
    root = math.sqrt(pair.r) if rs else pair.r
    alpha = pair.scale * root
    near = round(alpha)
    alpha = near if near and near / root == pair.scale else alpha
    return int(alpha) if float(alpha).is_integer() else alpha


def _pattern(values: dict[str, Any], default: Any, own: dict[str, Any]) -> dict[str, Any]:
    """PEFT's pattern for {module: value}: the graft's own where it says just that, else one entry per module."""
    from ..adapters.base import pattern_value

    if all(pattern_value(own, name, default) == value for name, value in values.items()):
        return dict(own)
    return {f"^{re.escape(name)}": value for name, value in sorted(values.items()) if value != default}


def _tensors(factors: Factors, config: dict[str, Any]) -> dict[str, Tensor]:
    tensors = {}
    for name, pair in factors.modules.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"] = pair.A, pair.B
    for module in {m for m, _ in factors.experts}:
        wrapped = [a for a in ATTRIBUTES if (module, a) in factors.experts]  # PEFT wraps in this order, the first innermost
        for depth, attribute in enumerate(reversed(wrapped)):
            pairs = factors.experts[module, attribute]
            some = next(p for p in pairs if p)
            A = torch.stack([torch.zeros_like(some.A) if p is None else p.A for p in pairs])
            B = torch.stack([torch.zeros_like(some.B) if p is None else p.B for p in pairs], 2)
            key = f"{PREFIX}{module}{'.base_layer' * depth}"
            tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = A.flatten(0, 1), B.flatten(1, 2)
    return tensors


def _bias_tensors(graft: Graft, factors: Factors, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Changes of biases: as new biases (bias='lora_only'), or beside lora_B where some module has no bias to change."""
    changed = {name: change for name, change in factors.biases.items() if bool(change.any())}
    if not changed:
        return
    products = {name: product for name, _, product in linear_modules(graft.model)}
    if all(products[name].bias is not None for name in changed):
        config["bias"] = "lora_only"
        for name in factors.modules:
            old = products[name].bias
            if old is not None:
                tensors[f"{PREFIX}{name}.base_layer.bias"] = old.detach().float().cpu() + changed.get(name, 0)
        return
    if factors.experts:
        raise IncompatibleError("PEFT holds no bias beside expert parameters", remedy="convert --to merged")
    config["lora_bias"] = True
    for name, pair in factors.modules.items():
        tensors[f"{PREFIX}{name}.lora_B.bias"] = changed.get(name, torch.zeros(pair.B.shape[0])) / pair.scale


def target_names(model: nn.Module, wanted: set[str]) -> list[str] | str:
    """target_modules with which PEFT matches exactly the modules `wanted`: sorted suffixes where they match nothing else,
    full names otherwise, a regular expression if even a full name is the end of another one."""
    known = [name for name, module in model.named_modules() if name and ".graft" not in f".{name}"]
    chosen = set()
    for name in wanted:
        last = name.rpartition(".")[2]
        matched = {k for k in known if k == last or k.endswith("." + last)}
        chosen.add(last if matched <= wanted else name)
    if any(k not in wanted and k.endswith(tuple("." + c for c in chosen)) for k in known):
        return "|".join(re.escape(name) for name in sorted(wanted))
    return sorted(chosen)
