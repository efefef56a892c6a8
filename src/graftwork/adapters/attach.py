"""Attaching a new graft to a model, in place: sites, the adapter of each, its start, whole modules and tokens beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import IncompatibleError, UsageError, nearest
from ..modeling.protocols import product_of
from ..modeling.sites import Site, find_sites, flat_tokens, linear_modules
from ..modeling.source import pristine_weight
from ..modeling.state import state_of
from ..registry import MethodConfig, lookup, make_config
from .base import Adapter, pattern_value
from .graft import NAME, Graft, on_device, site_generator
from .saved_module import SavedModule
from .slot import Slot, graft_point
from .trainable_tokens import attach_tokens, with_token_ids


def attach(model: nn.Module, method: str | MethodConfig = "lora", *, name: str = "default", initializer: Any = None,
           batches: Iterable[dict[str, Tensor]] | None = None, seed: int = 0, ranks: dict[str, int] | None = None,
           loading: bool = False, **config: Any) -> Graft:
    """Attach a new graft to a model, in place; freezes everything that is not a graft.

    method: a registered name with options as keywords, or a config object. initializer: a name, or {method, options}.
    batches: model inputs for initializers that need statistics. ranks: {site: rank}, overriding the config (0: no adapter).
    loading: the values come from an artifact, so no method takes its start from the weights.
    Raises UsageError (unknown name or option, no site, name taken) and IncompatibleError."""
    config_object = method if isinstance(method, MethodConfig) else make_config("adapter", method, **config)
    if isinstance(method, MethodConfig) and config:
        config_object = type(method)(**{**method.model_dump(), **config})
    info = lookup("adapter", config_object.method)
    holder = state_of(model)
    if not NAME.fullmatch(name):
        raise UsageError(f"'{name}' is no name for a graft", remedy="letters, digits, '_', '-', '@', at most 128")
    if name in holder.grafts:
        raise UsageError(f"a graft named '{name}' is attached already", remedy="choose another name, or detach it first")
    config_object = with_token_ids(model, config_object)
    graft = Graft(model, name, info, config_object, seed)
    graft.loading = loading
    if not holder.grafts:
        model.requires_grad_(False)
    if info.traits["scope"] != "site":
        if _initializer(initializer) is not None:
            raise IncompatibleError(f"'{info.name}' has no sites that an initializer could start", remedy="initializer: default")
        return _finished(graft, lambda: info.cls.attach_to(graft))
    sites = find_sites(model, config_object.target_modules, exclude_modules=config_object.exclude_modules,
                       layers=config_object.layers_to_transform)
    sites = _without_whole(sites, config_object.modules_to_save)
    check_exclusive(graft, sites)
    start = _initializer(initializer)
    statistics = None
    if start is not None:
        start.bind(model)
        start.check(info, config_object, sites)
        statistics = start.statistics(model, sites, config_object, batches)
        ranks = {**start.ranks(sites, config_object, statistics), **(ranks or {})}
        graft.initializer = {"method": start.method, **start.config.model_dump()}
    graft.shared = info.cls.make_shared(sites, config_object, seed)
    if graft.shared is not None:
        graft.shared_at = _host_of_pools(model, sites[0])
        if "graft_shared" not in graft.shared_at._modules:
            graft.shared_at.add_module("graft_shared", nn.ModuleDict())
        graft.shared_at._modules["graft_shared"][name] = on_device(graft.shared, sites[0].product.device).train(model.training)
    ranks = ranks or {}

    def at_sites() -> None:
        for site in sites:
            if ranks.get(site.name) != 0:
                _attach_site(graft, site, ranks.get(site.name), start, statistics, loading)

    return _finished(graft, at_sites)


def _finished(graft: Graft, adapters: Callable[[], None]) -> Graft:
    """The graft with its adapters and what rides on them; where anything raises, the model is as it was."""
    graft.holder.grafts[graft.name] = graft
    try:
        adapters()
        _attach_saved_modules(graft)
        attach_tokens(graft)
    except BaseException:
        graft.detach()
        raise
    return graft


def _host_of_pools(model: nn.Module, first: Site) -> nn.Module:
    """The module that gets what the sites share as a child: the model, or its first site where the children of the model are
    what it runs or counts."""
    return first.module if isinstance(model, (nn.Sequential, nn.ModuleList, nn.ModuleDict)) else model


def _initializer(choice: Any):
    if choice is None or choice == "default":
        return None
    options = {"method": choice} if isinstance(choice, str) else dict(choice)
    name = options.pop("method")
    if name == "default":
        return None
    return lookup("initializer", name).cls(make_config("initializer", name, **options))


def _attach_site(graft: Graft, site: Site, rank: int | None, start: Any, statistics: Any, loading: bool) -> None:
    config = graft.config if rank is None else with_rank(graft.config, site.name, rank)
    generator = site_generator(graft.seed, site.name)
    adapter = graft.info.cls(site, config, shared=graft.shared, generator=generator)
    if graft.info.traits["needs_weights"] and (graft.info.cls.restarts_on_load or not loading):
        on_device(adapter, site.product.device)
        with torch.no_grad():
            adapter.start(site.product, lambda: pristine_weight(graft.model, site), generator)
    if start is not None:
        edited = start.build(site, site.product, adapter, statistics, generator)
        if edited is not None:
            other = next((g for g in graft.holder.grafts.values() if g is not graft and site.name in g.sites), None)
            if other is not None:
                raise IncompatibleError(f"'{start.method}' puts another weight in the place of '{site.name}', which graft "
                                        f"'{other.name}' runs on", remedy=f"detach '{other.name}' first")
            graft.edit_storage(site.name, edited, site)
    place(graft, site, adapter)


def place(graft: Graft, site: Site, adapter: Adapter) -> None:
    """Make a finished adapter the graft's at this site."""
    on_device(adapter, site.product.device).train(site.module.training)
    slot_of(graft.model, site).put(graft.name, site.rows, site.role, adapter)
    graft.sites[site.name], graft.adapters[site.name] = site, adapter


def slot_of(model: nn.Module, site: Site) -> Slot:
    """The slot of a site; made on first use."""
    holder = state_of(model)
    point = graft_point(model, site.module_name, holder)
    slot = point.slot(site.slot_name)
    if slot is None:
        slot = Slot(site.product.whole if site.rows is not None else site.product, holder, flat=flat_tokens(site.name))
        point.add_module(site.slot_name, slot)
    return slot


def with_rank(config: MethodConfig, site: str, rank: int) -> MethodConfig:
    """The config for one site whose rank was chosen by an initializer; alpha/r stays what it was."""
    if "r" not in type(config).model_fields:
        raise IncompatibleError(f"'{config.method}' has no rank that an initializer could choose")
    update: dict[str, Any] = {"r": rank}
    if "rank_pattern" in type(config).model_fields:
        update["rank_pattern"] = {}
    if getattr(config, "alpha", None) is not None:
        before = pattern_value(getattr(config, "rank_pattern", {}), site, config.r)
        scale = (rank / before) ** (0.5 if getattr(config, "use_rslora", False) else 1.0)
        update["alpha"] = pattern_value(getattr(config, "alpha_pattern", {}), site, config.alpha) * scale
        if "alpha_pattern" in type(config).model_fields:
            update["alpha_pattern"] = {}
    return config.model_copy(update=update)


def check_exclusive(graft: Graft, sites: list[Site]) -> None:
    """Raises IncompatibleError when another graft owns the stored weights of these sites, or is merged."""
    names = {s.name for s in sites}
    for other in graft.holder.grafts.values():
        if other is graft:
            continue
        overlap = names & set(other.sites)
        if overlap and other.edited_storage:
            raise IncompatibleError(
                f"graft '{other.name}' ({other.method}) owns the stored weight of {len(overlap)} of these sites",
                remedy=f"detach '{other.name}' first: methods that edit the stored base are exclusive")
        if other.merged:
            raise IncompatibleError(f"graft '{other.name}' is merged into the weights",
                                    remedy=f"unmerge or detach '{other.name}' first")


def _without_whole(sites: list[Site], whole: list[str]) -> list[Site]:
    """The sites that are not trained whole: a module has one of the two."""
    left = [s for s in sites if not any(s.module_name == ending or s.module_name.endswith("." + ending) for ending in whole)]
    if not left:
        raise UsageError(f"every module that target_modules matches is trained whole (modules_to_save: {', '.join(whole)})",
                         remedy="target other modules, or leave them out of modules_to_save")
    return left


def _attach_saved_modules(graft: Graft) -> None:
    for ending in graft.config.modules_to_save:
        found = [n for n, _ in graft.model.named_modules() if (n == ending or n.endswith("." + ending)) and ".graft" not in n]
        if not found:
            linear = [n for n, _, _ in linear_modules(graft.model)]
            raise UsageError(f"modules_to_save: no module is named '{ending}'{nearest(ending, [n.rpartition('.')[2] for n in linear])}",
                             remedy="name a linear map, such as lm_head, score or classifier")
        own = {site.module_name for site in graft.sites.values()}
        for module_name in found:
            if module_name in own:
                raise UsageError(f"modules_to_save: '{module_name}' has an adapter of '{graft.method}' already",
                                 remedy="leave it out of modules_to_save")
            module = graft.model.get_submodule(module_name)
            product = product_of(module)
            if product is None:
                raise UsageError(f"modules_to_save: '{module_name}' is a {type(module).__name__}, not a linear map",
                                 remedy="name linear maps; for rows of an embedding use trainable_tokens")
            site = Site(module_name, module_name, module, product, "saved", -1, model=graft.model)
            adapter = SavedModule(site, graft.config, shared=None, generator=site_generator(graft.seed, module_name))
            adapter.take(product)
            on_device(adapter, product.device).train(module.training)
            slot_of(graft.model, site).put(graft.name, None, "saved", adapter)
            graft.saved_modules[module_name] = adapter
