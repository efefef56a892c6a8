"""Pristine weights: which file and which stored tensors each parameter of a model came from, and reading one again.

Detach, unmerge, conversion and initializers re-read a weight from its file; adding and subtracting a change in bf16
would alter it. The map from parameter names to stored names is Transformers' own (`core_model_loading`): renamed keys,
base-model prefixes, and fused parameters put together from several stored tensors (the 3-D experts of Transformers 5).
"""

from __future__ import annotations

from collections import defaultdict
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ..errors import ModelError, UsageError
from .checkpoint import Stored, license_files, stored_tensors

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Origin:
    """How one parameter is made from stored tensors: `keys` by source pattern; `converter` None means a plain copy."""

    keys: dict[str, list[str]]
    shape: tuple[int, ...]
    converter: Any = None
    first: str = ""  # the parameter name under which Transformers runs the converter


@dataclass(frozen=True)
class ModelSource:
    """Where the weights of a model came from. Kept at `model.graft_source`; holds no tensor.

    `origins`: canonical parameter name -> Origin; `aliases`: tied name -> canonical name; `base_prefix`: the prefix of
    the trunk in this model ("model", "bert", ...), which fingerprints leave out.
    """

    folder: Path
    stored: dict[str, Stored] = field(repr=False)
    origins: dict[str, Origin] = field(repr=False)
    aliases: dict[str, str] = field(repr=False, default_factory=dict)
    base_prefix: str = ""
    config: Any = field(repr=False, default=None)
    ref: str | None = None
    revision: str | None = None
    coded: bool = False  # the files hold codes; weights that are codes there cannot be read
    pristine: dict[str, str] | None = field(repr=False, default=None)  # digests of the dense weights that the codes were made of

    def names(self) -> list[str]:
        """Names of the parameters that can be read, tied ones once."""
        return sorted(self.origins)

    def __contains__(self, name: str) -> bool:
        return self.aliases.get(name, name) in self.origins

    def files(self) -> list[Path]:
        """The safetensors files."""
        return sorted({stored.file for stored in self.stored.values()})

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter, without reading it."""
        return self._origin(name).shape

    def license_files(self) -> list[Path]:
        """Licence texts that go with these weights."""
        return license_files(self.folder)

    def _origin(self, name: str) -> Origin:
        try:
            return self.origins[self.aliases.get(name, name)]
        except KeyError:
            raise ModelError(f"{self.folder} holds no weight for '{name}'",
                             remedy="load the model again from its own folder") from None

    def read(self, name: str, dtype: torch.dtype | None = None, rows: slice | torch.Tensor | None = None,
             expert: int | None = None) -> torch.Tensor:
        """One weight as it is in the file: a CPU tensor of the parameter's shape, in the stored dtype unless `dtype` is given.

        `expert` picks one entry of the first axis of a fused 3-D parameter, then `rows` (a slice or an int64 index) picks
        rows of what is left. A plain copy reads only the chosen contiguous part. Under FakeTensorMode nothing is read: the
        result is a fake tensor of that shape. Raises ModelError for a name without a file and for a damaged file.
        """
        import torch

        origin = self._origin(name)
        if _fake_mode() is not None:
            some = next(iter(origin.keys.values()))[0]
            full = torch.empty(origin.shape, dtype=dtype or _torch_dtype(self.stored[some].dtype))
            full = full if expert is None else full[expert]
            return full if rows is None else full[rows]
        try:
            plain = origin.converter is None
            tensor = self._plain(origin, rows, expert) if plain else self._converted(name, origin, rows, expert)
        except OSError as error:
            raise ModelError(f"cannot read '{name}' again from {self.folder}: {error}",
                             remedy="the model's files must stay in place while it is in use") from error
        return tensor if dtype is None else tensor.to(dtype)

    def stored_tensor(self, key: str) -> torch.Tensor:
        """A tensor of the files by its name there, as it is."""
        return read_stored(self.stored[key], key)

    def _plain(self, origin: Origin, rows, expert) -> torch.Tensor:
        [[key]] = origin.keys.values()
        with _opened(self.stored[key].file) as handle:
            if expert is not None:
                part = handle.get_slice(key)[expert:expert + 1][0]
                return part if rows is None else part[rows].contiguous()
            if isinstance(rows, slice) and rows.step in (None, 1) and origin.shape:
                start, stop, _ = rows.indices(origin.shape[0])
                return handle.get_slice(key)[start:max(start, stop)]
            whole = handle.get_tensor(key)
        return whole if rows is None else whole[rows].contiguous()

    def _converted(self, name: str, origin: Origin, rows, expert) -> torch.Tensor:
        import torch

        converter, taken = deepcopy(origin.converter), expert
        merges = type(converter.operations[0]).__name__ == "MergeModulelist" and not converter.operations[0].dim
        for pattern, keys in origin.keys.items():
            if merges and expert is not None:  # the stored tensors are one per expert: read only the one asked for
                keys, taken = [keys[expert]], 0
            for key in keys:
                with _opened(self.stored[key].file) as handle:
                    converter.add_tensor(origin.first, key, pattern, handle.get_tensor(key))
        shapes = SimpleNamespace(get_parameter=lambda each: torch.empty(self._origin(each).shape, device="meta"))
        made = converter.convert(origin.first, model=shapes, config=self.config)
        tensor = made[self.aliases.get(name, name)]
        tensor = tensor[0] if isinstance(tensor, list) else tensor
        tensor = tensor if taken is None else tensor[taken]
        return (tensor if rows is None else tensor[rows]).contiguous()


def read_stored(stored: Stored, key: str) -> torch.Tensor:
    """A tensor of a file by its name there; under FakeTensorMode a fake one of its shape and dtype."""
    import torch

    if _fake_mode() is not None:
        return torch.empty(stored.shape, dtype=_torch_dtype(stored.dtype))
    with _opened(stored.file) as handle:
        return handle.get_tensor(key)


def _fake_mode():
    from torch._guards import detect_fake_mode

    return detect_fake_mode()


def _torch_dtype(name: str) -> torch.dtype:
    import torch

    return {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
            "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
            "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
            "F8_E8M0": torch.float8_e8m0fnu, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64}[name]


def _opened(file: Path):
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ModelError(f"{file} is damaged: {error}", remedy="get the file again") from error


def build_source(model: nn.Module, folder: str | Path, *, ref: str | None = None, revision: str | None = None) -> ModelSource:
    """The source of `model` (a Transformers model as just loaded, or its skeleton on meta) in the files of `folder`.

    Parameters whose stored shape differs (a resized embedding) or that no file holds (a new head) are left out.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    folder = Path(folder)
    stored = stored_tensors(folder)
    live = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    prefix = model.base_model_prefix
    plain: dict[str, str] = {}
    composed: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, live)
        if name not in live and key in live:
            name, pattern = rename_source_key(key, [], [], prefix, live)
        if name not in live:
            continue
        if pattern is None:
            plain[name] = key
        else:
            composed[name][pattern].append(key)
    origins = {name: Origin({key: [key]}, stored[key].shape) for name, key in plain.items()
               if stored[key].shape == tuple(live[name].shape)}
    for first, keys in composed.items():
        converter = by_pattern[next(iter(keys))]
        for target in converter.target_patterns:  # one stored tensor may be cut into several parameters
            name = first.replace(converter.target_patterns[0], target, 1) if len(converter.target_patterns) > 1 else first
            if name in live:
                origins[name] = Origin({p: list(k) for p, k in keys.items()}, tuple(live[name].shape), converter, first)
    aliases = _tied_aliases(model, live, origins)
    return ModelSource(folder, stored, {n: o for n, o in origins.items() if n not in aliases}, aliases,
                       prefix if hasattr(model, prefix) else "", model.config, ref, revision)


def _tied_aliases(model: nn.Module, live: dict, origins: dict[str, Origin]) -> dict[str, str]:
    """Tied name -> the name that is read. The file may hold either of the two, or both."""
    aliases = {}
    for target, kept in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if target in live and kept in live:
            if kept in origins:
                aliases[target] = kept
            elif target in origins:
                aliases[kept] = target
    return aliases


def source_of(model: nn.Module) -> ModelSource | None:
    """The source of a model: the one `load_model` left, else one derived from the folder or Hub snapshot that Transformers
    loaded it from; None when there is no such folder.

    A derived source says where the weights should be; compare a read with the live tensor (`torch.equal`) before relying
    on it, since the model may have been changed since.
    """
    known = getattr(model, "graft_source", None)
    if known is not None:
        return known
    config = getattr(model, "config", None)
    place = getattr(config, "_name_or_path", None) or getattr(model, "name_or_path", None)
    folder = _loaded_from(place, getattr(config, "_commit_hash", None)) if place else None
    if folder is None or not (folder / "config.json").is_file():
        return None
    try:
        source = build_source(_skeleton(model), folder, ref=str(place), revision=getattr(config, "_commit_hash", None))
    except ModelError:
        return None
    if not source.origins:
        return None
    model.graft_source = source
    return source


def _loaded_from(place: str, commit: str | None) -> Path | None:
    if Path(place).is_dir():
        return Path(place).resolve()
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(place, "config.json", revision=commit)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _skeleton(model: nn.Module) -> nn.Module:
    """The model as its class builds it, on meta: names and shapes from before anything was swapped into it."""
    import torch

    with torch.device("meta"):
        return type(model)._from_config(deepcopy(model.config))


def pristine_weight(model: nn.Module, site: Any) -> torch.Tensor:
    """W (out, in), fp32, of a site as its file has it (as it is now, where there is no file or nothing but shapes). Raises
    UsageError for a stored site of a model without files."""
    import torch

    from .protocols import StoredWeight, has_values, is_conv1d

    if not has_values(next(site.module.parameters())):
        return site.product.dense().detach().float()
    stored, source = isinstance(site.module, StoredWeight), source_of(model)
    if source is None or site.parameter_name not in source:
        if stored:
            raise UsageError(f"the full-precision weight of '{site.name}' is not at hand: the model was not loaded from files that hold it",
                             remedy="load the dense model with graftwork.load(folder, storage=...), or keep the storage dense")
        return site.product.dense().detach().float()
    weight = source.read(site.parameter_name, dtype=torch.float32, expert=site.expert)
    # Conv1D and some experts keep (in, out); a stored site has lost its module class, so its source shape tells
    if site.expert is not None:
        transposed = site.product.transposed_source
    else:
        transposed = is_conv1d(site.module) or (stored and getattr(site.module, "transposed_source", False))
    weight = weight.T if transposed else weight
    return weight if site.rows is None else weight[site.rows]
