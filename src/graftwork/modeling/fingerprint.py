"""The fingerprint of a model's pristine dense weights: which base a graft belongs to.

One SHA-256 per weight, over (shape, canonical bytes), and one over the sorted list of (name, digest). Canonical means
that what does not matter drops out:

- values, not dtypes: floats of up to 32 bits are hashed as little-endian fp32, so a bf16 file and its exact fp32 copy
  agree, and so does every dtype or quantised storage the same files were loaded into (the files are hashed, not the model);
- names of parameters, not of stored tensors: sharding, legacy names, expert fusion and tied duplicates drop out, and so
  does the prefix of the trunk (`bert.`), by which an encoder and its classifier differ;
- all bytes count. Sampling blocks would be faster, and blind to an edit outside the sample. Weights are hashed in
  parallel, and for files the digests are remembered in the cache by path, size and modification time.

A folder of codes that we wrote keeps the digests of the dense weights that they were made of, so it is the same base; a
published quantized checkpoint is known by its codes. A model without files is hashed from memory, while it is still dense
and unmerged: whoever is about to change its weights calls `keep_fingerprint` first. Grafts on it are not counted.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from ..cache import file_stamp, remember
from ..errors import ModelError
from .source import ModelSource, source_of

if TYPE_CHECKING:
    import torch
    from torch import nn

_CHUNK = 1 << 22  # elements converted at a time


def fingerprint(model: nn.Module | ModelSource, names: Iterable[str] | None = None) -> str:
    """SHA-256 (64 hex digits) of the pristine weights of a model, or of those called `names` (its parameter names).

    Raises ModelError when a name is unknown, or when a model without files holds quantised or fake weights.
    """
    source = model if isinstance(model, ModelSource) else source_of(model)
    kept = getattr(model, "graft_fingerprint", None)
    if source is None and names is None and kept is not None:
        return kept
    if source is not None:
        digests = source_digests(source)
        wanted = list(digests) if names is None else [source.aliases.get(name, name) for name in names]
        prefix = source.base_prefix
    else:
        weights = _dense_weights(model)
        wanted = list(weights) if names is None else list(names)
        unknown = [name for name in wanted if name not in weights]
        digests = _digests({name: (lambda n=name: weights[n]) for name in wanted if name in weights}) if not unknown else {}
        prefix = getattr(model, "base_model_prefix", "")
    unknown = [name for name in wanted if name not in digests]
    if unknown:
        raise ModelError(f"the model has no weight '{unknown[0]}'", remedy="give parameter names of the base model")
    lines = sorted({(name.removeprefix(f"{prefix}."), digests[name]) for name in wanted})
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def keep_fingerprint(model: nn.Module) -> None:
    """Before weights are quantised, merged or trained: notes the fingerprint of a model without files as
    `model.graft_fingerprint`, which `fingerprint` then returns. Nothing happens for a model with files, with a note
    already, or without values (fake, meta).
    """
    if source_of(model) is None and getattr(model, "graft_fingerprint", None) is None:
        if not any(_without_values(weight) for weight in model.parameters()):
            model.graft_fingerprint = fingerprint(model)


def short_fingerprint(full: str) -> str:
    """The first 12 digits, for people."""
    return full[:12]


def weight_digest(tensor: torch.Tensor) -> str:
    """SHA-256 of one weight: its shape and its canonical bytes (see the module's text)."""
    import torch

    if _without_values(tensor):
        raise ModelError("a weight without values has no fingerprint", remedy="load the model's weights first")
    state = hashlib.sha256(json.dumps(list(tensor.shape)).encode())
    small = tensor.is_floating_point() and tensor.element_size() <= 4
    flat = tensor.detach().reshape(-1)
    if not small:
        state.update(str(tensor.dtype).encode())
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start:start + _CHUNK].cpu()
        state.update(memoryview((part.to(torch.float32) if small else part.contiguous()).numpy()).cast("B"))
    return state.hexdigest()


def _without_values(tensor: torch.Tensor) -> bool:
    return tensor.is_meta or "FakeTensor" in (type(tensor).__name__, type(tensor.data).__name__)


def _digests(read: dict[str, Callable[[], torch.Tensor]]) -> dict[str, str]:
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # hashlib and file reads run outside the interpreter lock
        return dict(zip(read, pool.map(lambda get: weight_digest(get()), read.values())))


def source_digests(source: ModelSource) -> dict[str, str]:
    if source.pristine is not None:
        return source.pristine
    if source.coded:  # a published quantized checkpoint: nothing but its codes is known
        key = json.dumps(["codes-1", [file_stamp(file) for file in source.files()]])
        return remember("digests", key, lambda: _digests({name: (lambda n=name: source.stored_tensor(n)) for name in source.stored}))
    made_from = [[name, origin.shape, origin.keys] for name, origin in sorted(source.origins.items())]
    key = json.dumps(["weights-1", [file_stamp(file) for file in source.files()], made_from])
    return remember("digests", key, lambda: _digests({name: (lambda n=name: source.read(n)) for name in source.names()}))


def _dense_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters of the base model by name, tied ones once; graftwork's own children are skipped."""
    from torch import nn

    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()

    def visit(module: nn.Module, prefix: str) -> None:
        if _ours(module):
            if type(module).__module__.startswith("graftwork.storage"):
                raise ModelError("the model was not loaded from files and is quantised: its pristine weights are gone",
                                 remedy="save the dense model to a folder first, and load it from there")
            return
        for name, weight in module._parameters.items():
            if weight is not None and id(weight) not in seen:
                seen.add(id(weight))
                found[prefix + name] = weight
        for name, child in module._modules.items():
            if child is not None:
                visit(child, f"{prefix}{name}.")

    def _ours(module: nn.Module) -> bool:
        """A class of this package that is not merely an attached (re-classed) layer of the model."""
        bases = [c for c in type(module).__mro__ if issubclass(c, nn.Module) and c is not nn.Module]
        containers = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList, nn.Sequential)
        return all(c.__module__.startswith("graftwork.") or c in containers for c in bases) and bool(bases) and \
            type(module).__module__.startswith("graftwork.")

    visit(model, "")
    return found
