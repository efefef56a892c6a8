"""A graft folded into a dense Transformers folder: W + delta for every weight, one weight in memory at a time.

W is what the graft was trained on: on a quantised model D(W), the de-quantised weight, since the graft has learned to work
with its rounding; `base='pristine'` takes the weights of the model's files instead. Nothing in the live model changes.
A tied head that only one of the two owners changes is untied in the copy. Folder: config, weights (shards with an index when
they are many), generation config, tokenizer, and the licence files of the base.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.graft import Graft, MergeReport
from ..adapters.merging import LOSS_LIMIT
from ..errors import GraftworkError, IncompatibleError, ModelError, UsageError
from ..files import atomic_folder
from ..modeling.models import parse_dtype
from ..modeling.protocols import Base, Product, StoredWeight, is_conv1d
from ..modeling.sites import layer_of
from ..modeling.source import source_of
from .factors import check_exportable, whole_modules

#: bytes of one weight file; a folder with more is sharded
SHARD_BYTES = 4 << 30


class _Dense(Product):
    """A dense weight (out, in) as the product that an adapter sees."""

    def __init__(self, weight: Tensor):
        self.weight = weight
        self.out_features, self.in_features = weight.shape

    def dense(self, leaves=None):
        return self.weight


class MergedWeights:
    """The parameters of a model with one graft merged, as a stream. Iterating yields (name, tensor) by Transformers' names;
    `report` fills meanwhile. dtype None: each weight's own (a quantised one: its compute dtype); vectors: another dtype for
    biases and norms."""

    def __init__(self, graft: Graft, *, base: str = "trained", dtype: str | torch.dtype | None = None,
                 vectors: torch.dtype | None = None, requantize: bool = False, force: bool = False):
        check_exportable(graft)
        if base not in ("trained", "pristine"):
            raise UsageError(f"there is no base '{base}'", remedy="trained (what the graft was trained on) or pristine")
        if requantize and base == "pristine":
            raise UsageError("requantize works on the storage that the graft was trained on", remedy="leave out base='pristine'")
        if requantize and getattr(graft.model, "graft_storage", None) is None:
            raise UsageError("requantize needs a quantised base, this one is dense", remedy="leave it out")
        self.graft, self.model, self.dtype = graft, graft.model, parse_dtype(dtype)
        self.vectors, self.requantize, self.force = vectors, requantize, force
        self.source = source_of(self.model) if base == "pristine" else None
        if base == "pristine" and self.source is None:
            raise ModelError("the pristine weights of this model are not at hand: it has no files", remedy="use base='trained'")
        with torch.device("meta"):
            self.skeleton = type(self.model)._from_config(deepcopy(self.model.config))
        self.shapes = {name: tuple(value.shape) for name, value in self.skeleton.state_dict().items()}
        self.changes: dict[str, list[tuple[str, Any]]] = {}
        for name, site in graft.sites.items():
            self.changes.setdefault(site.parameter_name, []).append((name, site))
        self.replaced = {f"{n}.{p}": value for n, values in whole_modules(graft).items() for p, value in values.items()}
        self.tokens = {f"{name}.weight": tokens for tokens in graft.trainable_tokens.values() for name in tokens.modules_using}
        self.tied = dict(getattr(self.skeleton, "all_tied_weights_keys", None) or {})
        touched = set(self.changes) | set(self.replaced)
        self.untied = {target for target, kept in self.tied.items()
                       if {target, kept} & touched or self.tokens.get(target) is not self.tokens.get(kept)}
        self.report = MergeReport("requantized" if requantize else "dense")
        self._check_biases()

    def _check_biases(self) -> None:
        for name, adapter in self.graft.adapters.items():
            change, site = adapter.delta_bias(), self.graft.sites[name]
            if change is not None and bool(change.any()) and site.product.bias is None:
                raise IncompatibleError(f"'{name}' has no bias that the change of the bias could be merged into",
                                        remedy="convert --to peft or --to lora, or train with bias='none'")

    def names(self) -> list[str]:
        """Names of what the folder holds; of tied weights the kept one only."""
        return [n for n in self.skeleton.state_dict() if n not in self.tied or n in self.untied]

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.names():
            yield name, self.one(name)

    @torch.no_grad()
    def one(self, name: str) -> Tensor:
        """One parameter or buffer, merged, on the CPU."""
        module_name, _, attribute = name.rpartition(".")
        module = self.model.get_submodule(module_name)
        if name in self.replaced:
            live = getattr(module, attribute)
            return self.replaced[name].cpu().to(self._dtype(live))
        value = self._value(name, module, attribute)
        if not value.is_floating_point():
            return value
        out_dtype = self._dtype(value)
        beside = name.removesuffix("_bias")
        if attribute == "bias" or beside != name and beside in self.changes:
            change = self._bias_change(module_name) if attribute == "bias" else self._expert_biases(beside)
            return (value.float() + change).to(out_dtype) if change is not None else value.to(out_dtype)
        if name not in self.changes:
            return self._with_tokens(name, value, out_dtype)
        merged = value.float().clone()
        for site_name, site in self.changes[name]:
            part = merged if site.expert is None else merged[site.expert]
            part = part.T if (is_conv1d(module) if site.expert is None else site.product.transposed_source) else part
            part = part if site.rows is None else part[site.rows]
            exact = part + (change := self._change(site_name, site, part.to(value.dtype)))
            part.copy_(exact)
            if self.requantize and isinstance(self._stored(site), StoredWeight):
                held = self.graft.adapters[site_name].held_by(site.product, self.graft.weight, exact=False)
                part.copy_(self._again(site, exact) if held is None else held.dequantize())
            size = change.norm().item()
            lost = ((part.to(out_dtype).float() - exact).norm().item() / size) if size else 0.0
            self.report.errors[site_name] = lost
            if self.requantize and lost > LOSS_LIMIT and not self.force:
                raise GraftworkError(f"quantising the merged weights again would lose {lost:.0%} of the change at '{site_name}'",
                                     remedy="merge into dense weights (the default), or force it")
        return self._with_tokens(name, merged, out_dtype).contiguous()

    def _with_tokens(self, name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`, with the rows of trained tokens."""
        tokens = self.tokens.get(name)
        if tokens is None:
            return value.to(dtype)
        ids, before = tokens.ids.cpu(), value.index_select(0, tokens.ids.cpu()).float()
        exact = tokens.moved(before.to(tokens.origin.device), self.graft.weight).cpu()
        size = (exact - before).norm().item()
        self.report.errors[f"{name.removesuffix('.weight')} (tokens)"] = (
            ((exact.to(dtype).float() - exact).norm().item() / size) if size else 0.0)
        return value.to(dtype).index_copy(0, ids, exact.to(dtype))

    def _dtype(self, value: Tensor) -> torch.dtype:
        return (self.vectors if value.dim() < 2 else None) or self.dtype or value.dtype

    def _value(self, name: str, module: nn.Module, attribute: str) -> Tensor:
        """The unmerged weight in its Transformers shape."""
        if self.source is not None and name in self.source and not self._resized(name):
            return self.source.read(name)
        if isinstance(module, StoredWeight) and attribute == "weight":
            return module.dequantize().detach().cpu()
        kept = getattr(module, attribute)
        if isinstance(kept, nn.ModuleList):
            whole = torch.stack([each.dequantize().detach().cpu() for each in kept])
            return whole.mT if getattr(module, "is_transposed", False) else whole
        return kept.detach().cpu()

    def _resized(self, name: str) -> bool:
        """Whether the model has another number of rows there than its file (tokens were added since)."""
        return self.source.shape(name) != self.shapes[name]

    def _change(self, name: str, site: Any, weight: Tensor) -> Tensor:
        """delta (out, in) in fp32 of one site on `weight`."""
        adapter = self.graft.adapters[name]
        change = adapter.delta_weight(Base(_Dense(weight.to(site.product.device)))).float().cpu() * self.graft.weight
        if self.source is not None and getattr(adapter, "pair_in_storage", False):
            B0, A0 = adapter.base_edit()
            change -= (B0.float() @ A0.float()).cpu()
        return change

    def _bias_change(self, module_name: str) -> Tensor | None:
        total = None
        for name, site in self.graft.sites.items():
            change = self.graft.adapters[name].delta_bias() if site.module_name == module_name else None
            if change is None:
                continue
            whole = site.product.whole.out_features if site.rows is not None else site.out_features
            total = torch.zeros(whole) if total is None else total
            total[site.rows or slice(None)] += change.detach().float().cpu() * self.graft.weight
        return total

    def _expert_biases(self, parameter: str) -> Tensor | None:
        """Changes of the biases beside a fused parameter, (experts, out)."""
        total = None
        for name, site in self.changes[parameter]:
            change = self.graft.adapters[name].delta_bias()
            if change is not None:
                total = torch.zeros(self.shapes[f"{parameter}_bias"]) if total is None else total
                total[site.expert] += change.detach().float().cpu() * self.graft.weight
        return total

    def _stored(self, site: Any) -> Any:
        return site.module if site.expert is None else getattr(site.module, site.attribute)[site.expert]

    def _again(self, site: Any, weight: Tensor) -> Tensor:
        if site.rows is not None:
            raise IncompatibleError(f"'{site.name}' is a slice of a fused projection and cannot be quantised on its own",
                                    remedy="merge into dense weights (the default), or target the whole projection")
        stored = self._stored(site)
        return type(stored).from_weight(weight, type(stored).without_data(stored.options), dtype=stored.compute_dtype).dequantize().float()

    def config(self) -> Any:
        """The config of the merged model."""
        config = deepcopy(self.model.config)
        config.architectures = [type(self.skeleton).__name__]
        weight = next(v for v in self.model.parameters() if v.is_floating_point())
        config.dtype = str(self.dtype or weight.dtype).removeprefix("torch.")
        if self.untied:
            config.tie_word_embeddings = False
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        return config


def write_merged(graft: Graft, folder: str | Path, *, tokenizer: Any = None, base: str = "trained",
                 dtype: str | torch.dtype | None = None, requantize: bool = False, force: bool = False, overwrite: bool = False,
                 shard_bytes: int = SHARD_BYTES) -> MergeReport:
    """Write the merged model; returns the rounding errors by site, relative to the change.

    base: 'trained' or 'pristine'. requantize: put every merged weight through the storage's quantiser once more, so that a
    model loaded from the folder into that storage is what is reported; refused when over half of a change would be lost,
    unless forced. Raises IncompatibleError (no weight change, bias without a place) and GraftworkError (disk)."""
    merged = MergedWeights(graft, base=base, dtype=dtype, requantize=requantize, force=force)
    with atomic_folder(folder, overwrite=overwrite) as target:
        _write_weights(merged, target, shard_bytes)
        merged.config().save_pretrained(target)
        if getattr(graft.model, "generation_config", None) is not None and graft.model.can_generate():
            graft.model.generation_config.save_pretrained(target)
        if tokenizer is not None:
            tokenizer.save_pretrained(target)
        copy_licenses(graft.model, target)
    return merged.report


def copy_licenses(model: nn.Module, target: Path) -> list[str]:
    """The licence files of the base's weights into `target`; their names. A second file of one name gets a number."""
    source = source_of(model)
    names = []
    for file in source.license_files() if source is not None else []:
        place, number = target / file.name, 2
        while place.exists():
            place, number = target / f"{file.stem}-{number}{file.suffix}", number + 1
        shutil.copyfile(file, place)
        names.append(place.name)
    return names


def _write_weights(merged: MergedWeights, target: Path, shard_bytes: int) -> None:
    """Shards of at most about `shard_bytes`; names and fusions as in published checkpoints, converted layer by layer."""
    from safetensors.torch import save_file
    from transformers.core_model_loading import revert_weight_conversion

    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    group: dict[str, Tensor] = {}
    total = 0

    def write() -> None:
        nonlocal total
        if pending:
            total += sum(t.numel() * t.itemsize for t in pending.values())
            save_file(dict(pending), target / f"shard-{len(shards)}", metadata={"format": "pt"})
            shards.append(list(pending))
            pending.clear()

    def close() -> None:
        for name, tensor in revert_weight_conversion(merged.model, dict(group)).items():
            whole = tensor.untyped_storage().nbytes() == tensor.nbytes  # a part would keep its fused tensor alive
            pending[name] = tensor.contiguous() if whole else tensor.contiguous().clone()
        group.clear()
        if sum(t.numel() * t.itemsize for t in pending.values()) >= shard_bytes:
            write()

    layer = None
    for name, tensor in merged:
        if group and layer_of(name) != layer:
            close()
        layer = layer_of(name)
        group[name] = tensor
    close()
    write()
    if len(shards) == 1:
        (target / "shard-0").rename(target / "model.safetensors")
        return
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for i, file in enumerate(files):
        (target / f"shard-{i}").rename(target / file)
    index = {"metadata": {"total_size": total}, "weight_map": {n: f for f, names in zip(files, shards) for n in names}}
    (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
