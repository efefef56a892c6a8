"""PEFT's adapter folders, written and read: adapter_config.json and adapter_model.safetensors as peft 0.21.2 has them. LoRA here, the
other methods that both have by the table in peft_methods.py.

Keys: `base_model.model.` + module + `.lora_A.weight` (r, in), `.lora_B.weight` (out, r); scale of a module = alpha / r, with
use_rslora alpha / sqrt(r); rank_pattern and alpha_pattern give other values per module. Expert parameters (3-D) come as
`target_parameters`: per module nested, lora_A (E r, in) expert by expert, lora_B (out, r E) with the expert as the fast index.

Two styles. `exact` keeps a LoRA's own tensors and scale, bit for bit. `baked` is what readers that ignore patterns and rsLoRA
(vLLM, LoRAX, S-LoRA) need: one rank, scale 1, the scale folded into B, zeros as padding.
PEFT loads with strict=False and only warns about missing keys; here missing and unexpected keys are errors, and options that
would change the result (aLoRA, an initialization that rewrote the base, ...) are refused by name.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.attach import attach
from ..adapters.base import AdapterConfig
from ..adapters.graft import Graft
from ..artifact import settle
from ..errors import ArtifactError, GraftworkError
from ..modeling.experts import ATTRIBUTES
from ..registry import lookup
from .peft_exchange import TEMPLATE, Place
from .peft_export import CONFIG, PREFIX, TENSORS, write_peft
from .peft_methods import EXCHANGES, exchange_of

__all__ = ["CONFIG", "TEMPLATE", "TENSORS", "attach_peft", "read_config", "write_peft"]
#: options that change what the tensors mean and that a graft cannot express
REFUSED = ("alora_invocation_tokens", "arrow_config", "layer_replication", "monteclora_config",
           "use_bdlora", "use_qalora", "velora_config", "megatron_config")
#: options that say how training started or ran, and leave the saved tensors' meaning alone
IGNORED = ("auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "fan_in_fan_out",
           "inference_mode", "loftq_config", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision",
           "task_type", "runtime_config")
#: initializations under which PEFT leaves the base as it is
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class PeftFiles:
    """A folder's files as they were read once. sha256: of both, the config first (hex)."""

    config: AdapterConfig
    document: dict[str, Any]
    tensors: dict[str, Tensor]
    sha256: str


def read_peft(folder: str | Path) -> PeftFiles:
    """Both files of a PEFT folder, each opened once, so that the sum is of what is returned. Raises ArtifactError."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = Path(folder) / TENSORS
    text = _content(Path(folder) / CONFIG)
    try:
        content = path.read_bytes()
        tensors = {key.removeprefix(PREFIX): value for key, value in load(content).items()}
    except (OSError, SafetensorError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read ({error})", remedy="the file is missing or truncated; get it again") from None
    _refuse_not_finite(path, tensors)
    document = _document(text, Path(folder) / CONFIG)
    config = _config(document, folder, lambda: {key: tuple(value.shape) for key, value in tensors.items()})
    total = hashlib.sha256(text)
    total.update(content)
    return PeftFiles(config, document, tensors, total.hexdigest())


def read_document(folder: str | Path) -> dict[str, Any]:
    """adapter_config.json as it is. Raises ArtifactError when it is missing or damaged."""
    path = Path(folder) / CONFIG
    return _document(_content(path), path)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror})", remedy="name a folder written by PEFT") from None


def _document(content: bytes, path: Path) -> dict[str, Any]:
    try:
        document = json.loads(content.decode("utf-8"))
        document["peft_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged ({error})", remedy="restore the folder from a copy") from None
    return document


def read_config(folder: str | Path) -> AdapterConfig:
    """The options of a PEFT folder. Raises ArtifactError naming what a graft cannot express."""
    return _config(read_document(folder), folder, lambda: _shapes(Path(folder)))


def _config(document: dict[str, Any], folder: str | Path, shapes: Callable[[], dict[str, tuple[int, ...]]]) -> AdapterConfig:
    exchange = exchange_of(document)
    if exchange is None:
        known = sorted({e.template["peft_type"] for e in EXCHANGES.values()})
        raise ArtifactError(f"{folder} is a PEFT {document['peft_type']} adapter; {', '.join(known)} are read",
                            remedy="convert it with PEFT's convert_to_lora where that exists, or train it here")
    for key, value in document.items():
        if key in REFUSED and value or key not in exchange.template and key not in IGNORED and value:
            raise ArtifactError(f"{folder} uses PEFT's '{key}' ({value!r}), which is not read here",
                                remedy="merge it with PEFT (merge_and_unload) and use the merged model")
    start = document.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        raise ArtifactError(f"{folder} was started with init_lora_weights={start!r}, which rewrote its base: on the original "
                            "model it computes something else",
                            remedy="save it from PEFT with path_initial_model_for_weight_conversion")
    bias = document.get("bias", "none")
    if bias == "all":
        raise ArtifactError(f"{folder} trained bias='all', also of modules without LoRA, which is not read here",
                            remedy="merge it with PEFT (merge_and_unload) and use the merged model")
    for key, allowed in exchange.only.items():
        if document.get(key, allowed[0]) not in allowed:
            raise ArtifactError(f"{folder} uses {key}={document[key]!r} with '{exchange.method}', which is not read here",
                                remedy="merge it with PEFT (merge_and_unload) and use the merged model")
    layers = document.get("layers_to_transform")
    try:
        info, where = lookup("adapter", exchange.method), {}
        if info.traits["scope"] == "site":
            target, excluded = _targets(document, folder)
            where = {"target_modules": target, "exclude_modules": excluded,
                     "layers_to_transform": [layers] if isinstance(layers, int) else layers or None}
        return info.config(**exchange.options(document, shapes), **where,
                           modules_to_save=sorted(document.get("modules_to_save") or []),
                           trainable_tokens=document.get("trainable_token_indices") or [])
    except (ValueError, TypeError, KeyError) as error:
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
                allow_zero: bool = False, files: PeftFiles | None = None) -> Graft:
    """Attach a PEFT folder as a graft. Every tensor must find its place and every place its tensor. files: what was read of it already.

    Raises ArtifactError with what is missing, unexpected, of another shape, not finite or not readable."""
    if files is None:
        config, document, tensors = read_config(folder), read_document(folder), _read_tensors(Path(folder))
    else:
        config, document, tensors = files.config, files.document, dict(files.tensors)
    seed = EXCHANGES[config.method].seed
    graft = attach(model, config, name=name or "default", loading=True, seed=document.get(seed, 0) if seed else 0)
    try:
        with torch.no_grad():
            problems = _fill(graft, tensors, document)
        if problems:
            more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
            base = document.get("base_model_name_or_path")
            raise ArtifactError(f"{folder} does not fit this model: {'; '.join(problems[:5])}{more}",
                                remedy=f"load the model it was trained on: {base}")
        settle(graft, folder, trainable=trainable, allow_zero=allow_zero)
    except BaseException:
        graft.detach()
        raise
    return graft


def _opened(folder: Path, take: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """take(open safetensors file), keys without PEFT's prefix."""
    from safetensors import SafetensorError, safe_open

    path = folder / TENSORS
    if not path.is_file() and list(folder.glob("adapter_model.*")):
        raise ArtifactError(f"{folder} keeps its tensors in a pickle, which is never opened",
                            remedy="save it again with PEFT (safetensors is its default)")
    try:
        with safe_open(path, framework="pt") as handle:
            found = take(handle)
    except (OSError, SafetensorError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read ({error})", remedy="the file is missing or truncated; get it again") from None
    return {key.removeprefix(PREFIX): value for key, value in found.items()}


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return _opened(folder, lambda handle: {key: tuple(handle.get_slice(key).get_shape()) for key in handle.keys()})


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / TENSORS
    tensors = _opened(folder, lambda handle: {key: handle.get_tensor(key) for key in handle.keys()})
    _refuse_not_finite(path, tensors)
    return tensors


def _refuse_not_finite(path: Path, tensors: dict[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ArtifactError(f"{path}: {key} has NaN or infinite values", remedy="the file is damaged, or training diverged")


def _fill(graft: Graft, tensors: dict[str, Tensor], document: dict[str, Any]) -> list[str]:
    """Copy the tensors into the adapters; the problems found."""
    problems: list[str] = []
    exchange = EXCHANGES[graft.method]
    places = exchange.tensors

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

    def fill(key: str, place: Place) -> None:
        found = tensors.get(key)
        if place.leading and found is not None and found.dim() == len(place.file_shape):
            tensors[key] = found[tuple(slice(0, size) for size in place.file_shape)]
        value = take(key, shape=place.file_shape)
        if value is not None:
            place.put(value)

    for key, place in exchange.shared(graft, document).items() if exchange.shared else ():
        whole, end = tensors.get(key), key.removeprefix("base_model.")
        for name in graft.sites:  # PEFT saves a copy for each site of some methods
            copy = tensors.pop(f"{name}.{end}", None)
            if copy is not None and (whole is None or not torch.equal(copy, whole)):
                problems.append(f"{name}.{end} is not the {key} that all sites share")
        fill(key, place)
    for name, site in graft.sites.items():
        adapter = graft.adapters[name]
        if site.expert is not None and not places:
            continue
        if places:
            for key, place in places(adapter, document, graft.weight).items():
                fill(f"{name}.{key}", place)
        else:
            take(f"{name}.lora_A.weight", adapter.lora_A)
            take(f"{name}.lora_B.weight", adapter.lora_B)
        kept, old = tensors.get(f"{name}.base_layer.weight"), site.product.dense()
        if kept is not None and kept.shape == old.shape and torch.equal(kept.to(old.dtype), old.cpu()):
            del tensors[f"{name}.base_layer.weight"]  # PEFT saves the base of embeddings and heads along
        if places or adapter.bias_change is None:
            continue
        beside = take(f"{name}.lora_B.bias", needed=bool(document.get("lora_bias")), shape=(site.out_features,))
        if beside is not None:
            adapter.bias_change += beside * adapter.scale
        old = site.product.bias
        if old is not None and document.get("bias") == "lora_only":
            new = take(f"{name}.base_layer.bias", shape=(site.out_features,))
            if new is not None:
                adapter.bias_change += new - old.float()
    if not places:
        _fill_experts(graft, take)
    for name, module in graft.saved_modules.items():
        take(f"{name}.weight", module.weight)
        if module.bias is not None:
            take(f"{name}.bias", module.bias)
    for name, rows in graft.trainable_tokens.items():
        value = take(f"{name}.token_adapter.trainable_tokens_delta", shape=tuple(rows.rows.shape))
        if value is not None:
            rows.rows.copy_(value[_ascending(document["trainable_token_indices"], name)])
    return problems + [f"unexpected tensor {key}{_why(key)}" for key in sorted(tensors)]


def _ascending(tokens: list[int] | dict[str, list[int]], module: str) -> list[int]:
    """The order in which the file's rows of a module go by ascending token; PEFT keeps them as they were named."""
    ids = next(v for k, v in tokens.items() if module == k or module.endswith("." + k)) if isinstance(tokens, dict) else tokens
    return sorted(range(len(ids)), key=ids.__getitem__)


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
    reasons = {"lora_embedding": " (LoRA of an embedding is not read)", "lora_magnitude_vector": " (DoRA, but use_dora is false)",
               "trainable_tokens": " (tokens that the config does not name)", "base_layer.weight": " (a changed base weight)"}
    return next((why for part, why in reasons.items() if part in key), "")
