"""The saved form of a graft: a folder with `graft.safetensors` and `graft.json`, written whole or not at all.

graft.json: schema_version, method, config, name, seed, weight, sites {site: [out, in, rank]}, initializer, storage the graft was
trained on, base {fingerprint, model, class}, tensors {key: [shape, dtype]}, extra (facts of single sites), provenance
(recipe, data digest, metrics), versions, and two SHA-256 sums: `sha256` of graft.safetensors, `checksum` of the entries of
graft.json that decide what the graft computes (all but name, base.model, versions and provenance, which may be edited).
Keys in graft.safetensors: `<site>.<tensor>`, `shared.<tensor>`, `modules_to_save.<module>.<tensor>`,
`trainable_tokens.<module>.rows`. What a seed regenerates is not in the file.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapters.attach import attach
from .adapters.graft import Graft
from .errors import ArtifactError, GraftworkError, UsageError
from .files import atomic_folder
from .registry import lookup, make_config
from .storage.base import has_values

SCHEMA = 1
TENSORS, CARD = "graft.safetensors", "graft.json"
#: entries of graft.json under the checksum
SEALED = ("schema_version", "method", "config", "seed", "weight", "initializer", "edited_storage", "sites", "storage", "extra",
          "tensors", "sha256")
_COPY = "the artifact was changed after it was saved; restore it from a copy"


def stored_tensors(graft: Graft) -> Iterator[tuple[str, Tensor]]:
    """(key, tensor) of everything the graft stores."""
    for key, module in graft.named_modules():
        state = module.artifact_state() if hasattr(module, "artifact_state") else dict(module.state_dict())
        for name, tensor in state.items():
            yield f"{key}.{name}", tensor


def graft_tensors(graft: Graft) -> dict[str, Tensor]:
    """{key: tensor} of everything the graft stores, on the CPU."""
    return {key: tensor.detach().cpu().contiguous() for key, tensor in stored_tensors(graft)}


def describe(graft: Graft, provenance: dict[str, Any] | None = None) -> dict[str, Any]:
    """The content of graft.json."""
    from .modeling.fingerprint import fingerprint

    storage = getattr(graft.model, "graft_storage", None)
    source = getattr(graft.model, "graft_source", None)
    extra = {name: adapter.stored_extra() for name, adapter in graft.adapters.items()
             if hasattr(adapter, "stored_extra") and adapter.stored_extra()}
    return {
        "schema_version": SCHEMA, "method": graft.method, "name": graft.name, "config": graft.config.model_dump(mode="json"),
        "seed": graft.seed, "weight": graft.weight, "paper": graft.info.paper, "initializer": graft.initializer,
        "edited_storage": bool(graft.edited_storage),
        "sites": {name: [a.out_features, a.in_features, getattr(a, "r", None)] for name, a in graft.adapters.items()},
        "base": {"fingerprint": fingerprint(graft.model), "model": getattr(source, "ref", None) or
                 getattr(getattr(graft.model, "config", None), "_name_or_path", None),
                 "class": type(graft.model).__name__},
        "storage": None if storage is None else {"method": storage.method, **storage.model_dump(mode="json")},
        "parameters": graft.parameter_count(), "extra": extra,
        "versions": _versions(), "provenance": {**graft.provenance, **(provenance or {})},
    }


def save_graft(graft: Graft, folder: str | Path, *, provenance: dict[str, Any] | None = None, overwrite: bool = True) -> Path:
    """Write the artifact atomically. overwrite: replace an artifact that is there; a folder that holds anything else is never
    replaced. Raises GraftworkError for such a folder and when the disk is full or not writable; nothing half-written stays."""
    from safetensors.torch import save

    target = Path(folder)
    if target.is_dir() and any(target.iterdir()) and not (target / CARD).is_file():
        raise GraftworkError(f"{folder} holds other files and no saved graft: it is not replaced", remedy="choose another folder")
    tensors = graft_tensors(graft)
    card = describe(graft, provenance)
    card["tensors"] = {k: [list(t.shape), str(t.dtype).removeprefix("torch.")] for k, t in sorted(tensors.items())}
    content = save(dict(sorted(tensors.items())), metadata={"format": "pt"})
    card["sha256"] = hashlib.sha256(content).hexdigest()
    card["checksum"] = seal(card)
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        (temporary / TENSORS).write_bytes(content)
        (temporary / CARD).write_text(json.dumps(card, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return target


def seal(card: dict[str, Any]) -> str:
    """SHA-256 of what graft.json says about the computation (see SEALED) and of the base's fingerprint."""
    sealed = {key: card.get(key) for key in SEALED} | {"fingerprint": card["base"].get("fingerprint")}
    return hashlib.sha256(json.dumps(sealed, sort_keys=True).encode()).hexdigest()


def read_card(folder: str | Path) -> dict[str, Any]:
    """graft.json of an artifact. Raises ArtifactError with what is wrong."""
    path = Path(folder) / CARD
    if not path.is_file():
        what = "is no folder" if not Path(folder).is_dir() else f"has no {CARD}"
        raise ArtifactError(f"{folder} {what}: it is no saved graft",
                            remedy="name a folder written by graft.save or `graft train`")
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        newer = card["schema_version"] > SCHEMA
        if not newer:
            for key in ("method", "config", "seed", "sites", "tensors", "base", "sha256", "checksum"):
                card[key]
            sealed = seal(card)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} is damaged ({type(error).__name__}: {error})",
                            remedy="restore the folder from a copy") from None
    if newer:
        raise ArtifactError(f"{path} has schema {card['schema_version']}, this version reads up to {SCHEMA}",
                            remedy="upgrade graftwork")
    if sealed != card["checksum"]:
        raise ArtifactError(f"{path} does not match its own checksum", remedy=_COPY)
    return card


def read_tensors(folder: str | Path, card: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of an artifact, checked against its card: missing, unexpected, other shape, dtype or values are errors."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = Path(folder) / TENSORS
    try:
        content = path.read_bytes()
        tensors = load(content)
    except (OSError, SafetensorError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read ({error})",
                            remedy="the file is missing or truncated; restore it from a copy") from None
    problems = [f"missing tensor {k}" for k in card["tensors"] if k not in tensors]
    problems += [f"unexpected tensor {k}" for k in tensors if k not in card["tensors"]]
    for key in sorted(set(tensors) & set(card["tensors"])):
        shape, dtype = card["tensors"][key]
        found = [list(tensors[key].shape), str(tensors[key].dtype).removeprefix("torch.")]
        if found != [shape, dtype]:
            problems.append(f"{key} is {found[0]} {found[1]}, expected {shape} {dtype}")
        elif tensors[key].is_floating_point() and not torch.isfinite(tensors[key]).all():
            problems.append(f"{key} has NaN or infinite values")
    if not problems and hashlib.sha256(content).hexdigest() != card["sha256"]:
        problems.append("its values are not those that were saved")
    if problems:
        raise ArtifactError(f"{path} does not match its {CARD}: " + "; ".join(problems[:5]) +
                            (f"; and {len(problems) - 5} more" if len(problems) > 5 else ""), remedy=_COPY)
    return tensors


def attach_saved(model: nn.Module, folder: str | Path, *, name: str | None = None, trainable: bool = False,
                 allow_zero: bool = False) -> Graft:
    """Attach a saved graft (ours or PEFT's) to a model. Raises ArtifactError when it belongs to another base, does not fit,
    or changes nothing. trainable: keep training it (attached grafts are frozen otherwise)."""
    folder = Path(folder)
    if not (folder / CARD).exists() and (folder / "adapter_config.json").exists():
        from .interchange.peft import attach_peft

        return attach_peft(model, folder, name=name, trainable=trainable)
    card = read_card(folder)
    tensors = read_tensors(folder, card) if all(has_values(p) for p in model.parameters()) else None
    return attach_read(model, card, tensors, folder, name=name, trainable=trainable, allow_zero=allow_zero)


def attach_read(model: nn.Module, card: dict[str, Any], tensors: dict[str, Tensor] | None, folder: str | Path, *,
                name: str | None = None, trainable: bool = False, allow_zero: bool = False) -> Graft:
    """Attach an artifact that was read already; folder: where from, for messages. tensors None: planning, shapes are all there is."""
    folder = Path(folder)
    config = _config(card, folder)
    ranks = {site: shape[2] for site, shape in card["sites"].items() if shape[2] is not None}
    name = name or card.get("name") or "default"
    if tensors is None:
        graft = attach(model, config, name=name, seed=card["seed"], ranks=_ranks(model, config, ranks), loading=True)
        shapes = card["tensors"].items()
        load_tensors(graft, {key: torch.empty(shape, dtype=getattr(torch, dtype)) for key, (shape, dtype) in shapes})
        if trainable:
            _resume(graft)
        return graft
    _check_head(model, card, folder)
    check_base(model, card, folder)
    graft = attach(model, config, name=name, seed=card["seed"], ranks=_ranks(model, config, ranks), loading=True)
    try:
        _check_sites(graft, card, folder)
        load_tensors(graft, tensors, card)
        graft.initializer, graft.provenance = card.get("initializer"), card.get("provenance", {})
        if graft.info.traits["multiplicative"] is False:
            graft.scale(card.get("weight", 1.0))
        if card.get("edited_storage"):
            lookup("initializer", card["initializer"]["method"]).cls.restore(graft)
        settle(graft, folder, trainable=trainable, allow_zero=allow_zero)
    except BaseException:
        graft.detach()
        raise
    _warn_storage(model, card, folder)
    return graft


def settle(graft: Graft, folder: str | Path, *, trainable: bool, allow_zero: bool) -> None:
    """The last step of loading: refuses a change that is zero everywhere, and freezes the graft unless it goes on training."""
    if not allow_zero and changes_nothing(graft):
        raise ArtifactError(f"{folder} changes nothing: its change is zero everywhere",
                            remedy="it was saved before training; pass allow_zero=True if that is meant")
    if trainable:
        _resume(graft)
    else:
        for parameter in graft.parameters():
            parameter.requires_grad_(False)
        for _, module in graft.named_modules():
            module.eval()


def _resume(graft: Graft) -> None:
    for adapter in graft.adapters.values():
        adapter.resume()


def _config(card: dict[str, Any], folder: Path) -> Any:
    try:
        return make_config("adapter", card["method"], **card["config"])
    except UsageError as error:  # written by a version that has another method or option
        raise ArtifactError(f"{folder}: {error.message}",
                            remedy=f"it was written by {card.get('versions')}; use that version") from None


def _ranks(model: nn.Module, config, ranks: dict[str, int]) -> dict[str, int]:
    """Ranks that differ from the config, and 0 for sites of the config that the artifact does not have."""
    from .adapters.base import pattern_value
    from .modeling.sites import find_sites

    if lookup("adapter", config.method).traits["scope"] != "site" or not ranks:
        return {}
    sites = find_sites(model, config.target_modules, exclude_modules=config.exclude_modules, layers=config.layers_to_transform)
    usual = {s.name: pattern_value(getattr(config, "rank_pattern", {}), s.name, getattr(config, "r", None)) for s in sites}
    return {s: ranks.get(s, 0) for s in usual if ranks.get(s, 0) != usual[s]}


def load_tensors(graft: Graft, tensors: dict[str, Tensor], card: dict[str, Any] | None = None) -> None:
    """Fill a graft from {key: tensor}; missing or unexpected keys and wrong shapes are errors."""
    remaining = dict(tensors)
    for key, module in graft.named_modules():
        own = {k[len(key) + 1:]: remaining.pop(k) for k in list(remaining) if k.startswith(key + ".")}
        try:
            if hasattr(module, "load_artifact_state"):
                module.load_artifact_state(own)
            else:
                module.load_state_dict(own)
        except (RuntimeError, KeyError, ValueError) as error:
            raise ArtifactError(f"'{key}' does not fit: {error}", remedy="the artifact is of another configuration") from None
        extra = (card or {}).get("extra", {}).get(key)
        if extra and hasattr(module, "check_extra"):
            module.check_extra(extra)
    if remaining:
        raise ArtifactError(f"unexpected tensors: {', '.join(sorted(remaining)[:5])}", remedy="the artifact is of another model")


def check_base(model: nn.Module, card: dict[str, Any], folder: Path) -> None:
    """Raises ArtifactError when the model's pristine weights are not those the graft was trained on."""
    from .modeling.fingerprint import fingerprint

    wanted, found = card["base"].get("fingerprint"), fingerprint(model)
    if wanted and found and wanted != found:
        raise ArtifactError(
            f"{folder} was trained on another base: fingerprint {wanted[:16]} ({card['base'].get('model')}), this model has "
            f"{found[:16]}",
            remedy=f"load the model it was trained on: {card['base'].get('model')}")


def _check_head(model: nn.Module, card: dict[str, Any], folder: Path) -> None:
    """Raises ArtifactError where the graft brings a score head and the model writes text."""
    scored = str(card["base"].get("class") or "").endswith("ForSequenceClassification")
    if not scored or not any(key.startswith("modules_to_save.") for key in card["tensors"]):
        return
    if getattr(model, "get_output_embeddings", lambda: None)() is None:
        return
    provenance = card.get("provenance", {})
    labels, form = provenance.get("labels"), ((provenance.get("recipe") or {}).get("data") or {}).get("format")
    does = f"tells {len(labels)} classes apart" if labels else "gives a number for a text" if form == "regression" else "scores texts"
    raise ArtifactError(f"{folder} {does} by a head of its own, and {type(model).__name__} writes text: it cannot answer here",
                        remedy="`graft eval` scores rows with it; from Python load the base as a sequence classifier "
                               "(graftwork.load(M, task='regression'), or task='classification' with num_labels)")


def _check_sites(graft: Graft, card: dict[str, Any], folder: Path) -> None:
    found = {name: [a.out_features, a.in_features, getattr(a, "r", None)] for name, a in graft.adapters.items()}
    wrong = [f"{s}: saved {card['sites'].get(s)}, model {found.get(s)}" for s in {*found, *card["sites"]}
             if found.get(s) != card["sites"].get(s)]
    if wrong:
        raise ArtifactError(f"{folder} does not fit this model: {'; '.join(sorted(wrong)[:4])}",
                            remedy="load the model it was trained on")


@torch.no_grad()
def changes_nothing(graft: Graft) -> bool:
    """True when the change is exactly zero at every site (methods without a weight change: False)."""
    if not graft.info.traits["mergeable"] or graft.saved_modules:
        return False
    if any(bool(tokens.change().any()) for tokens in graft.trainable_tokens.values()):
        return False
    for name, adapter in graft.adapters.items():
        bias = adapter.delta_bias()
        if bias is not None and bool(bias.any()):
            return False
        pair = adapter.factors(graft.base_of(graft.sites[name]))
        change = pair[0].float() @ pair[1].float() if pair is not None else adapter.delta_weight(graft.base_of(graft.sites[name]))
        if bool(change.any()):
            return False
    return True


def _warn_storage(model: nn.Module, card: dict[str, Any], folder: Path) -> None:
    now = getattr(model, "graft_storage", None)
    then = card.get("storage")
    now_name, then_name = (now.method if now else "dense"), (then["method"] if then else "dense")
    if now_name != then_name:
        error = _storage_error(model)
        detail = f" (weight error of {now_name} on this model: {error:.2%})" if error is not None else ""
        warnings.warn(f"{folder} was trained on {then_name} storage and is attached to {now_name}{detail}", stacklevel=3)


def _storage_error(model: nn.Module) -> float | None:
    """Relative error of one stored weight against its pristine value."""
    from .modeling.sites import all_sites
    from .modeling.source import source_of
    from .storage.base import Storage

    source = source_of(model)
    site = next((s for s in all_sites(model) if isinstance(s.module, Storage)), None)
    if source is None or site is None or site.parameter_name not in source:
        return None
    pristine = source.read(site.parameter_name, dtype=torch.float32)
    stored = site.module.dequantize().float().cpu()
    pristine = pristine if pristine.shape == stored.shape else pristine.T
    return float((stored - pristine).norm() / pristine.norm())


def _versions() -> dict[str, str]:
    found = {}
    for package in ("graftwork", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            pass
    return found
