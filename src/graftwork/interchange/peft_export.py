"""Writing PEFT's folders; the format and its two styles are described in peft.py."""

from __future__ import annotations

import json
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
from .factors import Factors, base_name, check_exportable, lora_factors, token_rows, whole_modules
from .peft_exchange import TEMPLATE, Exchange, alpha_of, pattern
from .peft_methods import EXCHANGES

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def write_peft(graft: Graft, folder: str | Path, *, style: str = "exact", rank: int | None = None,
               overwrite: bool = False) -> dict[str, Any]:
    """Write a graft in PEFT's format of its method, where PEFT has one, or as a PEFT LoRA. style: 'exact' or 'baked' (always a LoRA);
    rank: see `lora_factors`; with a rank the result is a LoRA.

    Returns {"error", "rank" (None for a method without one), "notes"}. Raises IncompatibleError for what the target cannot hold."""
    exchange = EXCHANGES.get(graft.method)
    if exchange is not None and exchange.tensors and style == "exact" and rank is None and _holds(exchange, graft):
        return _write_own(exchange, graft, folder, overwrite=overwrite)
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
    _modules(graft, set(factors.modules), config, tensors)
    if factors.experts:
        config["target_parameters"] = sorted(f"{module}.{attribute}" for module, attribute in factors.experts)
    write_folder(folder, TENSORS, tensors, CONFIG, config, overwrite=overwrite)
    return {"error": factors.error, "rank": factors.rank, "notes": notes}


def _modules(graft: Graft, modules: set[str], config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """What every method's folder says of its modules, and the modules that are saved whole."""
    for name, values in whole_modules(graft).items():
        tensors.update({f"{PREFIX}{name}.{key}": value.cpu() for key, value in values.items()})
    if graft.saved_modules:
        config["modules_to_save"] = sorted(graft.saved_modules)
    _tokens(graft, config, tensors)
    config["target_modules"] = target_names(graft.model, modules)
    if "fan_in_fan_out" in config:
        config["fan_in_fan_out"] = any(is_conv1d(graft.model.get_submodule(name)) for name in modules)
    if config["task_type"] == "SEQ_CLS" and not graft.saved_modules:
        config["task_type"] = None  # PEFT would expect a saved head


def _tokens(graft: Graft, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Rows of trained tokens. PEFT ties a head to the embedding by itself, and then takes nothing else at the head."""
    if not graft.trainable_tokens:
        return
    if "trainable_token_indices" not in config:
        raise IncompatibleError(f"PEFT's {config['peft_type']} holds no rows of trained tokens",
                                remedy="name a rank (--rank 16) to write it as a LoRA, or convert --to merged")
    using = {name for tokens in graft.trainable_tokens.values() for name in tokens.modules_using}
    weights = [graft.model.get_submodule(name).weight for name in using]
    tied = {name for name, module in graft.model.named_modules() if any(module._parameters.get("weight") is w for w in weights)}
    clash = sorted(tied & {site.module_name for site in graft.sites.values()} | tied & set(graft.saved_modules))
    if clash:
        raise IncompatibleError(f"PEFT holds no rows of trained tokens beside another change of '{clash[0]}', which uses them too",
                                remedy="convert --to merged")
    config["trainable_token_indices"] = graft.config.trainable_tokens
    tensors.update({f"{PREFIX}{name}.token_adapter.trainable_tokens_delta": rows for name, rows in token_rows(graft).items()})


def _holds(exchange: Exchange, graft: Graft) -> bool:
    """True where PEFT has this method at every site: no slice of a fused map, no expert, no Conv1D for some methods."""
    return exchange.holds(graft) and all(
        site.rows is None and site.expert is None and (exchange.transposed or not is_conv1d(site.module)) for site in graft.sites.values())


def _write_own(exchange: Exchange, graft: Graft, folder: str | Path, *, overwrite: bool) -> dict[str, Any]:
    virtual = graft.info.traits["scope"] == "model"
    if not virtual:
        check_exportable(graft)
    elif graft.saved_modules or graft.trainable_tokens:
        what = f"replaces whole modules ({', '.join(graft.saved_modules)})" if graft.saved_modules else "holds rows of trained tokens"
        raise IncompatibleError(f"this graft {what}: PEFT's folders of '{graft.method}' have no place for them that is read here",
                                remedy="serve it with graftwork")
    config = dict(exchange.template, base_model_name_or_path=base_name(graft), task_type=_task(graft))
    config.update(exchange.document(graft, lambda modules: target_names(graft.model, modules)))
    tensors = {f"{PREFIX}{name}.{key}": place.file_value() for name, adapter in graft.adapters.items()
               for key, place in exchange.tensors(adapter, config, graft.weight).items()}
    tensors |= {key: place.file_value() for key, place in (exchange.shared(graft, config) if exchange.shared else {}).items()}
    if not virtual:
        _modules(graft, set(graft.adapters), config, tensors)
    write_folder(folder, TENSORS, tensors, CONFIG, config, overwrite=overwrite)
    return {"error": 0.0, "rank": getattr(graft.config, "r", None), "notes": list(exchange.notes)}


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
    if graft.trainable_tokens:
        names = ", ".join(graft.trainable_tokens)
        raise IncompatibleError(f"this graft holds rows of trained tokens ({names}): vLLM and LoRAX refuse that",
                                remedy="convert --to merged, or --to peft for readers that know trainable_token_indices")
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
    alphas = {name: alpha_of(pair.scale, pair.r, rs) for name, pair in places.items()}
    r = own.r if own and own.r in ranks.values() else max(ranks.values(), key=list(ranks.values()).count)
    alpha = max(alphas.values(), key=list(alphas.values()).count)
    config.update(r=r, lora_alpha=alpha, use_rslora=rs, lora_dropout=own.dropout if own and not factors.experts else 0.0)
    config["rank_pattern"] = pattern(ranks, r, own.rank_pattern if own else {})
    config["alpha_pattern"] = pattern(alphas, alpha, own.alpha_pattern if own else {})


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
    if all(name in products and products[name].bias is not None for name in changed):
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
