"""PEFT's adapter folders (LoRA), written and read: adapter_config.json and adapter_model.safetensors as peft 0.21.2 has them.

Keys: `base_model.model.` + module + `.lora_A.weight` (r, in), `.lora_B.weight` (out, r); scale of a module = alpha / r, with
use_rslora alpha / sqrt(r); rank_pattern and alpha_pattern give other values per module. Expert parameters (3-D) come as
`target_parameters`: per module nested, lora_A (E r, in) expert by expert, lora_B (out, r E) with the expert as the fast index.

Two styles. `exact` keeps a LoRA's own tensors and scale, bit for bit. `baked` is what readers that ignore patterns and rsLoRA
(vLLM, LoRAX, S-LoRA) need: one rank, scale 1, the scale folded into B, zeros as padding.
PEFT loads with strict=False and only warns about missing keys; here missing and unexpected keys are errors, and options that
would change the result (DoRA, aLoRA, an initialization that rewrote the base, ...) are refused by name.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.graft import Graft, attach
from ..adapters.lora import LoRA
from ..artifact import settle
from ..errors import ArtifactError, GraftworkError, IncompatibleError
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
#: options that change what the tensors mean and that a graft cannot express
REFUSED = ("use_dora", "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "monteclora_config",
           "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config", "megatron_config")
#: options that say how training started or ran, and leave the saved tensors' meaning alone
IGNORED = ("auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "fan_in_fan_out",
           "inference_mode", "loftq_config", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision",
           "task_type", "runtime_config")
#: initializations under which PEFT leaves the base as it is
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


# -- writing ----------------------------------------------------------------------------------------------------------------
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
        raise IncompatibleError(f"this graft replaces whole modules ({', '.join(graft.saved_modules)}): vLLM and LoRAX refuse that",
                                remedy="convert --to merged, or --to peft for readers that know modules_to_save")
    if any(bool(change.any()) for change in factors.biases.values()):
        raise IncompatibleError("this graft changes biases: vLLM and LoRAX refuse that", remedy="convert --to merged or --to peft")
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


# -- reading ----------------------------------------------------------------------------------------------------------------
def _document(folder: str | Path) -> dict[str, Any]:
    path = Path(folder) / CONFIG
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        document["peft_type"]
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror})", remedy="name a folder written by PEFT") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged ({error})", remedy="restore the folder from a copy") from None
    return document


def read_config(folder: str | Path) -> LoRA:
    """The options of a PEFT LoRA folder. Raises ArtifactError naming what a graft cannot express."""
    document = _document(folder)
    if document["peft_type"] != "LORA":
        raise ArtifactError(f"{folder} is a PEFT {document['peft_type']} adapter; only LORA is read",
                            remedy="convert it with PEFT's convert_to_lora where that exists, or train it here")
    for key, value in document.items():
        if key in REFUSED and value or key not in TEMPLATE and key not in IGNORED and value:
            raise ArtifactError(f"{folder} uses PEFT's '{key}' ({value!r}), which is not read here",
                                remedy="merge it with PEFT (merge_and_unload) and use the merged model")
    start = document.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        raise ArtifactError(f"{folder} was started with init_lora_weights={start!r}, which rewrote its base: on the original model "
                            "it computes something else", remedy="save it from PEFT with path_initial_model_for_weight_conversion")
    bias = document.get("bias", "none")
    if bias == "all":
        raise ArtifactError(f"{folder} trained bias='all', also of modules without LoRA, which is not read here",
                            remedy="merge it with PEFT (merge_and_unload) and use the merged model")
    layers = document.get("layers_to_transform")
    try:
        ranks, alphas = document.get("rank_pattern") or {}, document.get("alpha_pattern") or {}
        if document.get("target_parameters"):  # our names go on with the expert
            ranks = {**ranks, **{rf"(?:{k})\.\d+": v for k, v in ranks.items()}}
            alphas = {**alphas, **{rf"(?:{k})\.\d+": v for k, v in alphas.items()}}
        target, excluded = _targets(document, folder)
        return LoRA(r=document.get("r", 8), alpha=document.get("lora_alpha", 8), dropout=document.get("lora_dropout", 0.0),
                    use_rslora=document.get("use_rslora", False), rank_pattern=ranks, alpha_pattern=alphas,
                    bias="lora_only" if bias == "lora_only" or document.get("lora_bias") else "none", target_modules=target,
                    exclude_modules=excluded, layers_to_transform=[layers] if isinstance(layers, int) else layers or None,
                    modules_to_save=sorted(document.get("modules_to_save") or []))
    except (ValueError, TypeError) as error:
        if isinstance(error, GraftworkError):
            raise
        raise ArtifactError(f"{folder}/{CONFIG} is damaged: {str(error).splitlines()[0]}",
                            remedy="restore the folder from a copy") from None


def _targets(document: dict[str, Any], folder: str | Path) -> tuple[str | list[str], list[str]]:
    """(target_modules, exclude_modules) in our words: a string is a regular expression on the whole name."""
    target, excluded = document.get("target_modules"), document.get("exclude_modules") or []
    parameters, saved = document.get("target_parameters") or [], document.get("modules_to_save") or []
    if document.get("layers_pattern") and document.get("layers_to_transform") is not None:
        known = {"layers", "layer", "h", "blocks", "block"}
        given = document["layers_pattern"]
        if not set([given] if isinstance(given, str) else given) <= known:
            raise ArtifactError(f"{folder} uses PEFT's layers_pattern {given!r}", remedy=f"known layer lists: {sorted(known)}")
    if not target and not parameters:
        raise ArtifactError(f"{folder} names no target_modules", remedy="save it again with PEFT 0.10 or newer")
    if target == "all-linear" and not isinstance(excluded, str):
        return target, [*excluded, *saved]
    if isinstance(target, str) or isinstance(excluded, str):
        words = target if isinstance(target, str) else _suffixes(target or [])
        if parameters:
            words = rf"{words}|{_suffixes(parameters)}\.\d+" if words else rf"{_suffixes(parameters)}\.\d+"
        not_these = f"(?!(?:{excluded})$)" if isinstance(excluded, str) else ""
        return f"{not_these}(?:{words})", [*([] if isinstance(excluded, str) else excluded), *saved]
    return sorted({*(target or []), *parameters}), [*excluded, *saved]


def _suffixes(names: list[str]) -> str:
    return rf"(?:.*\.)?(?:{'|'.join(re.escape(n) for n in sorted(names))})" if names else ""


def attach_peft(model: nn.Module, folder: str | Path, *, name: str | None = None, trainable: bool = False,
                allow_zero: bool = False) -> Graft:
    """Attach a PEFT LoRA folder as a graft. Every tensor must find its place and every place its tensor.

    Raises ArtifactError with what is missing, unexpected, of another shape, not finite or not readable."""
    config = read_config(folder)
    tensors = _read_tensors(Path(folder))
    graft = attach(model, config, name=name or "default")
    try:
        with torch.no_grad():
            problems = _fill(graft, tensors, _document(folder))
        if problems:
            more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise ArtifactError(f"{folder} does not fit this model: {'; '.join(problems[:5])}{more}",
                                remedy=f"load the model it was trained on: {_document(folder).get('base_model_name_or_path')}")
        settle(graft, folder, trainable=trainable, allow_zero=allow_zero)
    except BaseException:
        graft.detach()
        raise
    return graft


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / TENSORS
    if not path.is_file() and list(folder.glob("adapter_model.*")):
        raise ArtifactError(f"{folder} keeps its tensors in a pickle, which is never opened",
                            remedy="save it again with PEFT (safetensors is its default)")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read ({error})", remedy="the file is missing or truncated; get it again") from None
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ArtifactError(f"{path}: {key} has NaN or infinite values", remedy="the file is damaged, or training diverged")
    return {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}


def _fill(graft: Graft, tensors: dict[str, Tensor], document: dict[str, Any]) -> list[str]:
    """Copy the tensors into the adapters; the problems found."""
    problems: list[str] = []

    def take(key: str, target: Tensor | None = None, *, needed: bool = True, shape: tuple | None = None) -> Tensor | None:
        value = tensors.pop(key, None)
        if value is None:
            if needed:
                problems.append(f"missing tensor {key}")
            return None
        shape = tuple(target.shape) if target is not None else shape
        if tuple(value.shape) != shape:
            problems.append(f"{key} is {tuple(value.shape)}, expected {shape}")
            return None
        if target is not None:
            target.copy_(value)
        return value.float()

    for name, adapter in graft.adapters.items():
        site = graft.sites[name]
        if site.expert is not None:
            continue
        take(f"{name}.lora_A.weight", adapter.lora_A)
        take(f"{name}.lora_B.weight", adapter.lora_B)
        kept, old = tensors.get(f"{name}.base_layer.weight"), site.product.dense()
        if kept is not None and kept.shape == old.shape and torch.equal(kept.to(old.dtype), old.cpu()):
            del tensors[f"{name}.base_layer.weight"]  # PEFT saves the base of embeddings and heads along
        if adapter.bias_change is None:
            continue
        beside = take(f"{name}.lora_B.bias", needed=bool(document.get("lora_bias")), shape=(site.out_features,))
        if beside is not None:
            adapter.bias_change += beside * adapter.scale
        old = site.product.bias
        if old is not None and document.get("bias") == "lora_only":
            new = take(f"{name}.base_layer.bias", shape=(site.out_features,))
            if new is not None:
                adapter.bias_change += new - old.float()
    _fill_experts(graft, take)
    for name, module in graft.saved_modules.items():
        take(f"{name}.weight", module.weight)
        if module.bias is not None:
            take(f"{name}.bias", module.bias)
    return problems + [f"unexpected tensor {key}{_why(key)}" for key in sorted(tensors)]


def _fill_experts(graft: Graft, take) -> None:
    places: dict[tuple[str, str], list[Any]] = {}
    for name, adapter in graft.adapters.items():
        site = graft.sites[name]
        if site.expert is not None:
            places.setdefault((site.module_name, site.attribute), []).append(adapter)
    for (module, attribute), adapters in places.items():
        wrapped = [a for a in ATTRIBUTES if (module, a) in places]
        key = module + ".base_layer" * (len(wrapped) - 1 - wrapped.index(attribute))
        count, first = len(adapters), adapters[0]
        A = take(f"{key}.lora_A.weight", shape=(count * first.r, first.in_features))
        B = take(f"{key}.lora_B.weight", shape=(first.out_features, first.r * count))
        if A is None or B is None:
            continue
        for expert, adapter in enumerate(adapters):
            adapter.lora_A.copy_(A.view(count, first.r, -1)[expert])
            adapter.lora_B.copy_(B.view(-1, first.r, count)[..., expert])


def _why(key: str) -> str:
    reasons = {"lora_embedding": " (LoRA of an embedding is not read)", "lora_magnitude_vector": " (DoRA)",
               "trainable_tokens": " (trained tokens are not read)", "base_layer.weight": " (a changed base weight)"}
    return next((why for part, why in reasons.items() if part in key), "")
