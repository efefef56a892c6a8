"""Model folders whose weights are codes: reading them with the codes kept, and the tensors of one to be written.

config.json says how they are coded: `quantization_config: {"quant_method": ..., ...}`. Ours ("graftwork") names storage and options, and
keeps every leaf in its own shape and dtype as `MODULE.LEAF` beside the tensors that stayed dense; what `uncalibrated` lists was
rounded to the nearest, and `modules` says which of `variants` a storage is of that has another method than the model's. In a
published quantized checkpoint (published.py has the formats, _published_folder.py the names) each module becomes a storage with options
of its own, by `from_checkpoint`. The model is built without memory, and only what the files hold is filled in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import GraftworkError, ModelError
from ..registry import lookup, make_config
from .base import Place, Storage, StorageConfig, bytes_parameter, install, places
from .published import storage_of_checkpoint

#: how our own folders are called in config.json
OURS = "graftwork"


def quantization_of(config: Any) -> dict[str, Any] | None:
    """The document of a Transformers config that says how its weights are coded; None for dense weights."""
    found = getattr(config, "quantization_config", None)
    if not found:
        return None
    return dict(found) if isinstance(found, Mapping) else found.to_dict()


def check_readable(document: Mapping[str, Any]) -> None:
    """Raises UsageError for a published checkpoint that no storage holds, with the reason."""
    if document.get("quant_method") != OURS:
        storage_of_checkpoint(document)


def storage_of(document: Mapping[str, Any]) -> StorageConfig:
    """The storage that weights coded so are kept in. Raises ModelError for a damaged document."""
    try:
        if document.get("quant_method") != OURS:
            return storage_of_checkpoint(document)[1]
        kept = dict(document["storage"])
        return make_config("storage", kept.pop("method"), **kept)
    except (KeyError, TypeError, GraftworkError) as error:
        raise ModelError(f"config.json does not say how the weights are coded: {error}",
                         remedy="get the folder again, or use a version of graftwork that knows this storage") from error


def kept_in(ref: Any) -> str | None:
    """The name of the storage whose codes a local model folder (or its config.json) holds, from config.json alone; None for all else."""
    path = Path(str(ref)).expanduser()
    try:
        file = path if path.name == "config.json" else path / "config.json"
        document = json.loads(file.read_text(encoding="utf-8")).get("quantization_config")
        return storage_of(document).method if document else None
    except (OSError, ValueError, AttributeError, GraftworkError):
        return None  # whoever loads it says what is wrong


def document_of(config: StorageConfig, uncalibrated: Iterable[str], modules: Mapping[str, Mapping[str, Any]] | None = None,
                **more: Any) -> dict[str, Any]:
    """What config.json says of a folder of ours. modules: of `modules_of`."""
    document = {"quant_method": OURS, "storage": {"method": config.method, **config.model_dump(mode="json")},
                "uncalibrated": sorted(uncalibrated), **more}
    if modules:
        variants: list[Mapping[str, Any]] = []
        for each in modules.values():
            if each not in variants:
                variants.append(each)
        document |= {"variants": variants, "modules": {name: variants.index(each) for name, each in sorted(modules.items())}}
    return document


def _modules(document: Mapping[str, Any]) -> dict[str, StorageConfig]:
    """The storages of another method than the model's, by name."""
    variants = [storage_of({**document, "storage": each}) for each in document.get("variants", ())]
    try:
        return {name: variants[index] for name, index in document.get("modules", {}).items()}
    except (IndexError, TypeError, AttributeError) as error:
        raise ModelError(f"config.json does not say how the weights are coded: {error}", remedy="get the folder again") from error


# -- reading -------------------------------------------------------------------------------------------------------------
def fill(model: nn.Module, document: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor],
         within: str = "") -> list[str]:
    """Put the tensors of a folder into a model that has none (on meta or fake), or into its module `within`. shapes: of every tensor of
    the folder, by its name there; read(name) gives one. Returns the names of the model that no tensor was found for.
    Raises ModelError for tensors that do not belong together."""
    if document.get("quant_method") != OURS:
        from ._published_folder import fill_published

        return fill_published(model, document, shapes, read)
    config, rounded = storage_of(document), set(document.get("uncalibrated", ()))
    names, other = {here(model, name): name for name in shapes}, _modules(document)
    below, empty = below_modules(names), {}
    for place in places(model, config.model_copy(update={"skip_modules": []}), within):
        own = below.get(place.name, {})
        if set(own) <= {"weight", "bias"}:
            continue  # it stayed dense
        tensors = {leaf: read(stored) for leaf, stored in own.items()}
        _put_codes(model, place, other.get(place.name, config), place.name in rounded, tensors, empty)
    return fill_dense(model, names, shapes, read, within)


def below_modules(names: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """{module: {rest of the name: name in the folder}} of names in the model."""
    below: dict[str, dict[str, str]] = {}
    for name, stored in names.items():
        parts = name.split(".")
        for end in range(1, len(parts)):
            below.setdefault(".".join(parts[:end]), {})[".".join(parts[end:])] = stored
    return below


def here(model: nn.Module, name: str) -> str:
    """The name in this model of a name in a folder, which may be of the trunk alone, or of a class with another head."""
    prefix = f"{model.base_model_prefix}." if getattr(model, "base_model_prefix", "") else ""
    if name.split(".")[0] in model._modules or not prefix:
        return name
    return prefix + name if hasattr(model, prefix[:-1]) else name.removeprefix(prefix)


def _put_codes(model: nn.Module, place: Place, config: StorageConfig, rounded: bool, tensors: dict[str, Tensor],
               empty: dict[tuple, Storage]) -> None:
    """empty: storages without values by kind, from one call to the next, since making one costs a whole calculation of shapes."""
    cls, dense = lookup("storage", config.method).cls, place.product.dense()
    bias = place.product.bias if place.expert is None else None
    kind = (tuple(dense.shape), dense.dtype, bias is None, rounded, config.method, config.model_dump_json())
    if kind not in empty or not dense.is_meta:  # a copy of fake tensors would be of another mode
        empty[kind] = cls.from_weight(dense.detach(), cls.without_data(config) if rounded else config, bias=bias, dtype=dense.dtype)
    made = empty[kind]
    stored = install(model, place, deepcopy(made, {id(made.options): made.options}) if dense.is_meta else made)
    wanted, bias = stored.leaves(), tensors.pop("bias", None)
    wrong = sorted(set(wanted) ^ set(tensors)) or sorted(name for name, leaf in wanted.items() if leaf.dtype != tensors[name].dtype)
    if wrong or (bias is None) != (stored.bias is None):
        raise ModelError(f"'{place.name}' in the folder is not what {config.method} keeps: {', '.join(wrong) or 'bias'}",
                         remedy="the folder is damaged; quantize the model again")
    for name, tensor in tensors.items():
        stored._parameters[name] = bytes_parameter(tensor)
        if hasattr(stored, "_kinds"):  # sizes that depend on the weights
            stored._kinds[name] = (tuple(tensor.shape), tensor.dtype)
    if bias is not None:
        stored.bias = nn.Parameter(bias.to(stored.bias.dtype), requires_grad=False)


def fill_dense(model: nn.Module, names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor],
               within: str = "", made: Mapping[str, Callable[[], Tensor]] | None = None) -> list[str]:
    """Fill in what is in no storage: from `made`, what several tensors of the folder are put together for, else from a tensor of its own.
    Returns the names that there is nothing for."""
    missing, aliases, made = [], set(getattr(model, "all_tied_weights_keys", None) or {}), made or {}
    for name, tensor in dense_names(model, within).items():
        if name not in names and name not in made:
            if name not in aliases:
                missing.append(name)
            continue
        value = made[name]() if name in made else None
        found = tuple(shapes[names[name]]) if value is None else tuple(value.shape)
        if found != tuple(tensor.shape):
            raise ModelError(f"'{name}' is {found} in the file, not {tuple(tensor.shape)}", remedy="the files belong to another config")
        value = read(names[name]) if value is None else value
        if value.itemsize == 1 and tensor.is_floating_point():
            raise ModelError(f"'{name}' is codes in the file ({value.dtype}), and their scales are missing",
                             remedy="the files belong to another config, or are damaged: get them again")
        put_tensor(model, name, value.to(tensor.dtype))
    return missing


def put_tensor(model: nn.Module, name: str, value: Tensor) -> None:
    """A parameter or buffer of the model by its name, whatever it is on now."""
    parent, _, last = name.rpartition(".")
    owner = model.get_submodule(parent)
    if last in owner._buffers:
        owner._buffers[last] = value
    else:
        old = owner._parameters[last]
        owner._parameters[last] = nn.Parameter(value, requires_grad=old.requires_grad and value.is_floating_point())


# -- writing -------------------------------------------------------------------------------------------------------------
def dense_names(model: nn.Module, within: str = "") -> dict[str, Tensor]:
    """Parameters and persistent buffers of a model, or of its module, that are not in a storage."""
    found: dict[str, Tensor] = {}
    for name, module in model.get_submodule(within).named_modules():
        if isinstance(module, Storage):
            continue
        prefix = ".".join(part for part in (within, name) if part)
        kept = {**module._parameters, **{k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set}}
        found |= {f"{prefix}.{k}" if prefix else k: v for k, v in kept.items() if v is not None}
    return found


def folder_tensors(model: nn.Module, within: str = "") -> dict[str, Tensor]:
    """{name in the folder: tensor} of a model, or of its module; what is tied to another weight is left out."""
    aliases = set(getattr(model, "all_tied_weights_keys", None) or {})
    found = {name: tensor.detach().contiguous() for name, tensor in dense_names(model, within).items() if name not in aliases}
    for name, module in model.get_submodule(within).named_modules():
        if isinstance(module, Storage):
            prefix = ".".join(part for part in (within, name) if part)
            found |= {f"{prefix}.{leaf}": value.contiguous() for leaf, value in module.leaves().items()}
            if module.bias is not None:
                found[f"{prefix}.bias"] = module.bias.detach().contiguous()
    return found


def uncalibrated_of(model: nn.Module, config: StorageConfig, within: str = "") -> list[str]:
    """Names of the storages that have other options than the model's."""
    return [".".join(part for part in (within, name) if part) for name, module in model.get_submodule(within).named_modules()
            if isinstance(module, Storage) and type(module.options) is type(config) and module.options != config]


def modules_of(model: nn.Module, config: StorageConfig, within: str = "") -> dict[str, dict[str, Any]]:
    """{name: {method, options}} of the storages of another method than the model's."""
    return {".".join(part for part in (within, name) if part): {"method": module.options.method, **module.options.model_dump(mode="json")}
            for name, module in model.get_submodule(within).named_modules()
            if isinstance(module, Storage) and type(module.options) is not type(config)}
