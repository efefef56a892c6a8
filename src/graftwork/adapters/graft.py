"""A graft: all adapters of one method on one model, their shared state and config; attach, detach, merge, convert."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import IncompatibleError, UsageError
from ..modeling.protocols import Base, StoredWeight
from ..modeling.sites import Site
from ..modeling.state import StateHolder, state_of
from ..registry import MethodConfig, MethodInfo
from .base import Adapter
from .slot import GraftPoint, drop_point

if TYPE_CHECKING:
    from .trainable_tokens import TokenRows

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_@-]{0,127}")


@dataclass
class MergeReport:
    """What merging did: rounding error of the merged weight against W + delta, relative to the delta, by site. target: dense,
    requantized, or stored (storages that hold the change without new codes; where a site has none, dense)."""

    target: str
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def worst(self) -> float:
        return max(self.errors.values(), default=0.0)


class Graft:
    """A graft on a model. Made by `attach` or `attach_saved`; attributes: name, method, config, adapters {site: Adapter},
    sites {site: Site}, shared (nn.Module or None), weight (its factor in a sum of grafts), merged."""

    def __init__(self, model: nn.Module, name: str, info: MethodInfo, config: MethodConfig, seed: int):
        self.model, self.name, self.info, self.config, self.seed = model, name, info, config, seed
        self.sites: dict[str, Site] = {}
        self.adapters: dict[str, Adapter] = {}
        self.shared: nn.Module | None = None
        self.shared_at: nn.Module = model  # whose child `graft_shared` holds it
        self.saved_modules: dict[str, Adapter] = {}
        self.trainable_tokens: dict[str, TokenRows] = {}  # by the module whose rows they are
        self.weight, self.merged = 1.0, False
        self.loading = False  # while it is attached: the values come from an artifact
        self.initializer: dict[str, Any] | None = None
        self.edited_storage: dict[str, nn.Module] = {}  # site -> the storage that an initializer replaced
        self.provenance: dict[str, Any] = {}

    @property
    def method(self) -> str:
        return self.info.name

    @property
    def holder(self) -> StateHolder:
        return state_of(self.model)

    # -- parameters ------------------------------------------------------------------------------------------------
    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """(key, module) of everything the graft owns, keys as in the artifact."""
        if self.shared is not None:
            yield "shared", self.shared
        yield from self.adapters.items()
        for name, module in self.saved_modules.items():
            yield f"modules_to_save.{name}", module
        for name, tokens in self.trainable_tokens.items():
            yield f"trainable_tokens.{name}", tokens

    def named_parameters(self, *, trainable: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        """(key, parameter) in a stable order; only trained ones by default."""
        for key, module in self.named_modules():
            for name, parameter in module.named_parameters():
                if parameter.requires_grad or not trainable:
                    yield f"{key}.{name}", parameter

    def parameters(self) -> list[nn.Parameter]:
        return [p for _, p in self.named_parameters()]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups: parameters of equal lr_scale, weight decay and update gain together; keys params, names, lr_scale,
        role."""
        names = {id(p): n for n, p in self.named_parameters()}
        merged: dict[tuple, dict[str, Any]] = {}
        modules = [m for _, m in self.named_modules()]
        for module in modules:
            groups = module.parameter_groups() if hasattr(module, "parameter_groups") else [
                {"params": [p for p in module.parameters() if p.requires_grad], "lr_scale": 1.0}]
            for group in groups:
                key = (group["lr_scale"], group.get("weight_decay"), group.get("update_gain"))
                entry = merged.setdefault(key, {"params": [], "names": [], "role": "adapter",
                                                **{k: v for k, v in group.items() if k != "params"}})
                entry["params"] += group["params"]
                entry["names"] += [names[id(p)] for p in group["params"]]
        return [g for g in merged.values() if g["params"]]

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())

    # -- on and off ------------------------------------------------------------------------------------------------
    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Scope in which this graft is off (the bare base, or the other grafts)."""
        if self.merged:
            raise UsageError(f"graft '{self.name}' is merged and cannot be switched off", remedy="graft.unmerge() first")
        with self.holder.scope(disabled=self.holder.current.disabled | {self.name}):
            yield

    def scale(self, weight: float) -> None:
        """Factor of this graft's change, in sums, per row and when merged. Only for additive methods."""
        if self.merged:
            raise UsageError(f"graft '{self.name}' is merged: its weight is fixed", remedy="graft.unmerge() first")
        if (self.info.traits["multiplicative"] or self.info.traits["scope"] != "site") and weight != 1.0:
            raise IncompatibleError(f"'{self.method}' adds nothing to an output: its change has no scale")
        self.weight = float(weight)

    def detach(self) -> None:
        """Remove the graft; the base is bit for bit what it was."""
        if self.merged:
            self.unmerge()
        if hasattr(self.info.cls, "on_detach"):
            self.info.cls.on_detach(self)
        for site in self.sites.values():
            self._restore_storage(site)
        using = {name for tokens in self.trainable_tokens.values() for name in tokens.modules_using}
        for module_name in {s.module_name for s in self.sites.values()} | set(self.saved_modules) | using:
            module = self.model.get_submodule(module_name)
            point = module._modules["graft"]
            for key, slot in list(point.named_children()):
                slot.drop(self.name)
                if slot.idle:
                    del point._modules[key]
            drop_point(self.model, module_name)
        pools = self.shared_at._modules.get("graft_shared")
        if pools is not None and self.name in pools:
            del pools[self.name]
            if not len(pools):
                del self.shared_at._modules["graft_shared"]
        del self.holder.grafts[self.name]

    def remove(self, name: str) -> None:
        """Take the adapter of one site away: the site is again what it is without this graft."""
        if self.merged:
            raise UsageError(f"graft '{self.name}' is merged: its sites stay", remedy="graft.unmerge() first")
        site, adapter = self.sites.pop(name), self.adapters.pop(name)
        self._restore_storage(site)
        point = site.module._modules["graft"]
        slot = point.slot(site.slot_name)
        slot.take(next(key for key, entry in slot.entries.items() if entry is adapter))
        if slot.idle:
            del point._modules[site.slot_name]
        drop_point(self.model, site.module_name)

    # -- exact change ------------------------------------------------------------------------------------------------
    def _check_weights(self) -> None:
        if self.info.traits["scope"] == "model":
            raise UsageError(f"'{self.method}' changes what the model reads and no weight: it cannot become a LoRA",
                             remedy="serve it beside the base")
        if self.info.traits["scope"] == "block":
            raise UsageError(f"'{self.method}' has no weight change and cannot become a LoRA: what it adds depends on the input",
                             remedy="serve it beside the base")

    def base_of(self, site: Site) -> Base:
        return Base(site.product)

    @torch.no_grad()
    def delta_weights(self) -> dict[str, Tensor]:
        """{site: exact change (out, in), fp32, times the graft's weight}. Raises UsageError for methods whose change
        depends on the input."""
        self._check_weights()
        changes = {}
        for name, adapter in self.adapters.items():
            change = adapter.delta_weight(self.base_of(self.sites[name]))
            if change is None:
                raise UsageError(f"'{self.method}' has no weight change: it depends on the input")
            changes[name] = change * self.weight
        return changes

    @torch.no_grad()
    def to_lora(self, rank: int | None = None) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
        """({site: (B (out, r), A (r, in))}, error): exact factors (error 0) where the method is low-rank and rank is not
        smaller, else the truncated SVD with its relative Frobenius error over all sites. B carries the graft's weight."""
        self._check_weights()
        pairs, lost, total = {}, 0.0, 0.0
        for name, adapter in self.adapters.items():
            exact = adapter.factors(self.base_of(self.sites[name]))
            if exact is not None and (rank is None or exact[1].shape[0] <= rank):
                pairs[name] = (exact[0].float() * self.weight, exact[1].float())
                continue
            change = adapter.delta_weight(self.base_of(self.sites[name]))
            if change is None:
                raise UsageError(f"'{self.method}' cannot become a LoRA: its change depends on the input")
            if rank is None:
                raise UsageError(f"'{self.method}' is not low-rank: its LoRA form is an approximation",
                                 remedy="name the rank: to_lora(rank=16)")
            U, S, Vh = torch.linalg.svd(change, full_matrices=False)
            pairs[name] = (U[:, :rank] * S[:rank] * self.weight, Vh[:rank])
            lost += float((S[rank:] ** 2).sum())
            total += float((S**2).sum())
        return pairs, (lost / total) ** 0.5 if total else 0.0

    # -- merge ---------------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def merge(self, *, requantize: bool = False, force: bool = False) -> MergeReport:
        """Fold the change into the weights. A dense base takes W + delta; a quantised one becomes dense D(W) + delta, or is
        quantised again with requantize=True, which is refused when over half of the change would be lost (force=True
        overrides). A change that a storage can hold in its metadata stays in that storage: with fp32 metadata, or rounded to what
        the base keeps with requantize=True. Returns the error. `unmerge` puts the pristine weights back."""
        if self.merged:
            raise UsageError(f"graft '{self.name}' is merged already")
        if not self.info.traits["mergeable"]:
            raise IncompatibleError(f"'{self.method}' cannot be merged: it has no weight change",
                                    remedy="serve it beside the base instead")
        other = next((g for g in self.holder.grafts.values() if g.merged and set(g.sites) & set(self.sites)), None)
        if other is not None:
            raise IncompatibleError(f"graft '{other.name}' is merged into the same weights",
                                    remedy=f"unmerge '{other.name}' first")
        from .merging import merge_sites

        report = merge_sites(self, requantize=requantize, force=force)
        self.merged = True
        return report

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the weights from before the merge back (kept copies, never a subtraction)."""
        from .merging import unmerge_sites

        if not self.merged:
            raise UsageError(f"graft '{self.name}' is not merged")
        unmerge_sites(self)
        self.merged = False

    # -- disk ------------------------------------------------------------------------------------------------------------
    def save(self, folder, **options) -> None:
        """Write the artifact (graft.safetensors, graft.json) atomically; see graftwork.artifact."""
        from ..artifact import save_graft

        save_graft(self, folder, **options)

    def edit_storage(self, name: str, stored: nn.Module, site: Site | None = None) -> None:
        """Run a site on another storage while this graft is attached; detach puts the old one back, which waits in host memory."""
        self.edited_storage[name] = on_device(swap_storage(site or self.sites[name], stored), torch.device("cpu"))

    def _restore_storage(self, site: Site) -> None:
        kept = self.edited_storage.pop(site.name, None)
        if kept is not None:
            swap_storage(site, on_device(kept, site.product.device))

    def __repr__(self) -> str:
        return f"Graft('{self.name}', method='{self.method}', sites={len(self.adapters)}, parameters={self.parameter_count():,})"


def swap_storage(site: Site, stored: nn.Module) -> nn.Module:
    """Exchange the tensors of a stored site for those of another storage of the same class; returns the old ones as a
    storage without graft. The module object stays, so references to it stay valid."""
    module = site.module
    assert isinstance(module, StoredWeight)
    old = {k: v for k, v in module._parameters.items()}
    attributes = {k: v for k, v in stored.__dict__.items() if not k.startswith("_") and k != "training"}
    before = {k: module.__dict__.get(k) for k in attributes}
    for key, value in stored._parameters.items():
        if key != "bias":
            module._parameters[key] = value
    module.__dict__.update(attributes)
    for key in old:
        if key != "bias":
            stored._parameters[key] = old[key]
    stored.__dict__.update(before)
    return stored


def on_device(module: nn.Module, device: torch.device) -> nn.Module:
    """The module on that device. Nothing is called when it is there already: fake tensors refuse `.to`."""
    return module if all(p.device == device for p in module.parameters()) else module.to(device)


def site_generator(seed: int, name: str) -> torch.Generator:
    """Private CPU generator that depends on the graft's seed and the site's name only."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") & (2**63 - 1))


__all__ = ["Graft", "GraftPoint", "MergeReport", "swap_storage"]
