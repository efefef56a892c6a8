"""Folders of published quantised checkpoints: which of their tensors belong to which map of the model, experts included.

Names of the files are first renamed as Transformers does. What lies below a linear map is its codes. Experts come in two layouts:

    one map per expert     ...experts.3.gate_proj.qweight, ...: Transformers' conversions say which maps are which rows of which fused
                           parameter (gate over up); the storages of the parts are put together (`Storage.joined`)
    MXFP4 of gpt-oss       gate_up_proj_blocks (E, out, in/32, 16) and gate_up_proj_scales (E, out, in/32) of all experts, rows of W as in
                           storages, though the dense parameter is transposed; biases stay parameters of the experts module

An expert whose maps have a weight alone stayed dense, as all experts of its parameter must then have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GraftworkError, ModelError
from ..modeling.experts import expert_count, is_experts
from ..modeling.protocols import has_values
from ..registry import lookup
from ._folder import below_modules, fill_dense, here, storage_of
from .base import Place, Storage, StorageConfig, install, places, store
from .published import dense_modules

#: leaf of a part: name in the files, and the expert whose slice it is
Part = dict[str, tuple[str, int | None]]
#: what a fused parameter of gpt-oss is called in MXFP4, behind its own name
_FUSED = {"_blocks": "blocks", "_scales": "scales"}
_AGAIN = "the files belong to another config, or are damaged: get them again"


def fill_published(model: nn.Module, document: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]],
                   read: Callable[[str], Tensor]) -> list[str]:
    """`fill` of a published checkpoint."""
    config, mapping = storage_of(document), _Conversions(model)
    names = mapping.names(shapes)
    below, experts, tensors = below_modules(names), _expert_parts(model, names, shapes, mapping), _Tensors(read)
    dense = {name.rpartition(".")[0] for name in experts} - {
        name.rpartition(".")[0] for name, parts in experts.items() if any(set(part) - {"weight", "bias"} for part in parts)}
    for place in places(model, config.model_copy(update={"skip_modules": []})):
        if place.expert is None:
            own = below.get(place.name, {})
            parts = [] if set(own) <= {"weight", "bias"} else [{leaf: (stored, None) for leaf, stored in own.items()}]
        else:
            parts = [] if place.name.rpartition(".")[0] in dense else experts.get(place.name, [])
        if parts:  # else it stayed dense
            _put(model, place, config, [{leaf: tensors(*where) for leaf, where in part.items()} for part in parts], document)
    made = {name: (lambda n=name: _dense_experts(n, experts, tensors)) for name in dense}
    return fill_dense(model, names, shapes, read, made=made)


def apply_published(model: nn.Module, document: Mapping[str, Any]) -> None:
    """Storages of the sizes that config.json tells, where there is nothing else: but for the modules that it names as dense."""
    config, dense = storage_of(document), dense_modules(document)
    for place in places(model, config):
        if not dense(place.name):
            store(model, place, config)


class _Tensors:
    """Tensors of the files, or one expert's copy of a slice; what was cut last is kept for the next expert."""

    def __init__(self, read: Callable[[str], Tensor]):
        self.read, self.kept = read, {}

    def __call__(self, stored: str, expert: int | None) -> Tensor:
        if expert is None:
            return self.read(stored)
        if stored not in self.kept:
            if len(self.kept) >= len(_FUSED):
                self.kept.clear()
            self.kept[stored] = self.read(stored)
        return self.kept[stored][expert].clone()


class _Conversions:
    """Transformers' own table of how names of files become parameters of the model."""

    def __init__(self, model: nn.Module):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        mapping = get_model_conversion_mapping(model)
        self.model, self.live, self.rename = model, model.state_dict(), rename_source_key
        self.renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
        self.converters = [each for each in mapping if isinstance(each, WeightConverter)]
        self.by_pattern = {pattern: each for each in self.converters for pattern in each.source_patterns}

    def names(self, shapes: Mapping[str, Any]) -> dict[str, str]:
        """{name in this model: name in the files}; what has no place here keeps its name."""
        found, modules = {}, {}
        for key in shapes:
            name, _ = self.rename(key, self.renamings, [], self.model.base_model_prefix, self.live)
            if name not in self.live:
                module, leaf = _split(key)
                if module not in modules:  # patterns are made for weights, and might see something else in the name of a leaf
                    renamed, _ = self.rename(f"{module}.weight", self.renamings, [])
                    modules[module] = renamed.removesuffix(".weight") if renamed.endswith(".weight") else module
                name = here(self.model, f"{modules[module]}.{leaf}" if module else leaf)
            found[name] = key
        return found

    def fused(self, module: str) -> tuple[str, int, int, int] | None:
        """Of a map called `module` in the files, renamed: (fused parameter, expert, which of its parts, of how many), or None.
        Raises ModelError for parameters that are made of maps in other ways than one below the other."""
        name, pattern = self.rename(f"{module}.weight", [], self.converters)
        if pattern is None or name not in self.live or "*" not in pattern:
            return None
        converter = self.by_pattern[pattern]
        tail = pattern.rpartition("*")[2].replace("\\", "").removesuffix("$")
        number = f"{module}.weight".removesuffix(tail).rpartition(".")[2]
        steps = [type(each).__name__ for each in converter.operations]
        plain = steps in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]) and not converter.operations[0].dim
        if not plain or not number.isdigit() or len(converter.target_patterns) > 1 or (len(steps) > 1 and converter.operations[1].dim != 1):
            raise ModelError(f"'{name}' is made of maps like '{module}' in a way that codes cannot follow ({', '.join(steps)})",
                             remedy="give the dense model and choose a storage, for example `storage: int4`")
        return name, int(number), converter.source_patterns.index(pattern), len(converter.source_patterns)


def _split(key: str) -> tuple[str, str]:
    """Module and leaf of a name in the files; leaves of bitsandbytes are called `weight.absmax` and the like."""
    module, found, leaf = key.partition(".weight.")
    if found:
        return module, f"weight.{leaf}"
    module, _, leaf = key.rpartition(".")
    return module, leaf


def _expert_parts(model: nn.Module, names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]],
                  mapping: _Conversions) -> dict[str, list[Part]]:
    """{place of an expert: its parts, rows in order}. Raises ModelError for experts that are not whole, or not of this model."""
    counts = {f"{name}.{attribute}": expert_count(module) for name, module in model.named_modules() if is_experts(module)
              for attribute, kept in module._parameters.items() if kept is not None and kept.dim() == 3}
    found: dict[str, dict[int, Part]] = {}
    where: dict[str, tuple[str, int, int, int] | None] = {}
    total: dict[str, int] = {}
    for name, stored in names.items():
        suffix = next((each for each in _FUSED if name.endswith(each) and name.removesuffix(each) in counts), None)
        if suffix is not None:
            parameter = name.removesuffix(suffix)
            if (shapes[stored] or (0,))[0] != counts[parameter]:
                raise ModelError(f"'{stored}' has the shape {tuple(shapes[stored])}, and the model {counts[parameter]} experts",
                                 remedy=_AGAIN)
            total[parameter] = 1
            for expert in range(counts[parameter]):
                found.setdefault(f"{parameter}.{expert}", {}).setdefault(0, {})[_FUSED[suffix]] = (stored, expert)
            continue
        module, leaf = _split(name)
        if module not in where:
            where[module] = mapping.fused(module) if counts else None
        if where[module] is not None and where[module][0] in counts:
            parameter, expert, part, total[parameter] = where[module]
            if expert >= counts[parameter]:
                raise ModelError(f"'{stored}' is of expert {expert}, and '{parameter}' has {counts[parameter]}", remedy=_AGAIN)
            found.setdefault(f"{parameter}.{expert}", {}).setdefault(part, {})[leaf] = (stored, None)
    for parameter, parts in total.items():
        for expert in range(counts[parameter]):
            if len(found.get(f"{parameter}.{expert}", {})) != parts:
                raise ModelError(f"the files lack expert {expert} of '{parameter}', or a part of it", remedy=_AGAIN)
    return {name: [parts[number] for number in sorted(parts)] for name, parts in found.items()}


def _dense_experts(parameter: str, experts: Mapping[str, list[Part]], tensors: _Tensors) -> Tensor:
    """A fused parameter (E, out, in) of experts that stayed dense."""
    found, expert = [], 0
    while (parts := experts.get(f"{parameter}.{expert}")) is not None:
        weights = [tensors(*part["weight"]) for part in parts]
        if any(weight.itemsize == 1 for weight in weights):
            raise ModelError(f"'{parts[0]['weight'][0]}' holds codes, and their scales are missing", remedy=_AGAIN)
        found.append(torch.cat(weights))
        expert += 1
    return torch.stack(found)


def _put(model: nn.Module, place: Place, config: StorageConfig, parts: list[dict[str, Tensor]], document: Mapping[str, Any]) -> None:
    """Put one map into the storage of its published codes."""
    dense, bias = place.product.dense(), place.product.bias if place.expert is None else None
    try:
        stored = _stored(place, config, parts, document, dense)
    except GraftworkError as error:
        raise type(error)(f"'{place.name}': {error.message}", remedy=error.remedy) from error
    if (stored.out_features, stored.in_features) != tuple(dense.shape):
        raise ModelError(f"'{place.name}' is {stored.out_features} x {stored.in_features} in the checkpoint, not {tuple(dense.shape)}",
                         remedy="the checkpoint belongs to another config")
    if (bias is None) != (stored.bias is None):
        raise ModelError(f"'{place.name}' has {'no' if stored.bias is None else 'a'} bias in the checkpoint, unlike the model",
                         remedy="the checkpoint belongs to another config")
    if stored.bias is not None:
        stored.bias = nn.Parameter(stored.bias.detach().to(dense.dtype), requires_grad=False)
    stored.compute_dtype = dense.dtype  # by hand, since fake parameters cannot be moved
    install(model, place, stored)


def _stored(place: Place, config: StorageConfig, parts: list[dict[str, Tensor]], document: Mapping[str, Any], dense: Tensor) -> Storage:
    cls, wanted = lookup("storage", config.method).cls, place.product.bias is not None and place.expert is None
    known, made = all(has_values(tensor) for part in parts for tensor in part.values()), []
    if not known and config.method == "nf4":  # shapes are values there
        plain = config if len(parts) == 1 else config.model_copy(update={"double_quant": False})
        return cls.from_weight(dense.detach(), plain, bias=place.product.bias if wanted else None, dtype=dense.dtype)
    for part in parts:
        if not known and "weight_shape" in part:
            part = {**part, "weight_shape": (dense.shape[0] // len(parts), dense.shape[1])}
        one = cls.from_checkpoint(part, document)
        if not wanted and one.bias is not None and not (known and bool(one.bias.any())):
            one.bias = None  # some tools write zeros for every module
        if len(parts) > 1 and one.bias is not None:
            raise ModelError("a map of an expert has a bias in the checkpoint, unlike the model", remedy=_AGAIN)
        made.append(one)
    return made[0] if len(made) == 1 else cls.joined(made)
