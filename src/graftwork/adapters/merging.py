"""Merging a graft's exact change into the weights, and taking it out again by putting kept copies back.

Arithmetic cannot undo a merge in bf16 (adding and subtracting a change moves about 16 % of the entries), so `unmerge`
restores CPU copies made at merge time (a stored weight's own module is kept instead).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..errors import GraftworkError, IncompatibleError
from ..modeling.protocols import StorageProduct, StoredWeight, is_conv1d
from ..modeling.sites import Site

if TYPE_CHECKING:
    from .graft import Graft, MergeReport

#: requantising may lose at most this share of the change without force
LOSS_LIMIT = 0.5


def merge_sites(graft: Graft, *, requantize: bool, force: bool) -> MergeReport:
    """Write W + delta at every site. All new weights are computed before the first one is written.

    Where a storage can hold the change in its metadata, or the method says in which storage it ends, that one is used."""
    from .graft import MergeReport

    _refuse_tied(graft)
    _refuse_part_of_tied_rows(graft)
    stored = any(isinstance(s.module, StoredWeight) for s in graft.sites.values())
    report = MergeReport("requantized" if stored and requantize else "dense")
    planned: list[tuple[Site, Tensor | nn.Module, Tensor | None]] = []
    for name, adapter in {**graft.adapters, **graft.saved_modules}.items():
        site = graft.sites.get(name) or saved_site(graft, name)
        if requantize and site.rows is not None and isinstance(site.module, StoredWeight):
            raise IncompatibleError(f"'{name}' is a slice of a fused projection and cannot be quantised on its own",
                                    remedy="merge into dense weights (the default), or target the whole projection")
        base = graft.base_of(site)
        change = adapter.delta_weight(base) * graft.weight
        dense = base.weight()
        exact = dense.float() + change
        new = exact.to(dense.dtype)
        held = adapter.held_by(site.product, graft.weight, exact=not requantize) if site.rows is None else None
        if held is not None:
            new, report.target = held.dequantize(), "stored"
        elif requantize and isinstance(site.module, StoredWeight):
            kind = type(site.module)
            again = kind.from_weight(new, kind.without_data(site.module.options), dtype=site.module.compute_dtype)
            new = again.dequantize()
        size = change.norm().item()
        report.errors[name] = ((new.float() - exact).norm().item() / size) if size else 0.0
        bias = adapter.delta_bias() if name in graft.adapters else bias_change(adapter, site)
        if bias is not None and site.product.bias is None:
            raise IncompatibleError(f"'{name}' has no bias that the change of the bias could be merged into",
                                    remedy="attach with bias='none'")
        planned.append((site, new if held is None else held, None if bias is None else bias * graft.weight))
    if requantize and report.worst > LOSS_LIMIT and not force:
        raise GraftworkError(
            f"quantising the merged weights again would lose {report.worst:.0%} of the change at "
            f"'{max(report.errors, key=report.errors.get)}'",
            remedy="merge into dense weights (the default), or pass force=True")
    originals: dict[str, Tensor | nn.Module] = {}
    for site, new, bias in planned:
        originals[site.name] = _write(site, new, bias, requantize, graft)
    graft.__dict__["_originals"] = originals
    graft.__dict__["_original_rows"] = [_write_rows(graft, name, report) for name in graft.trainable_tokens]
    return report


def _write_rows(graft: Graft, name: str, report: MergeReport) -> tuple[nn.Parameter, Tensor, Tensor]:
    """Write the rows of tokens into their matrix, after everything else; returns (matrix, ids, its rows from before)."""
    tokens, weight = graft.trainable_tokens[name], graft.model.get_submodule(name).weight
    before = weight.data.index_select(0, tokens.ids)
    exact = tokens.moved(before, graft.weight)
    weight.data.index_copy_(0, tokens.ids, exact.to(weight.dtype))
    size = (exact - before.float()).norm().item()
    report.errors[f"{name} (tokens)"] = ((exact.to(weight.dtype).float() - exact).norm().item() / size) if size else 0.0
    return weight, tokens.ids, before


def unmerge_sites(graft: Graft) -> None:
    """Put every site's pristine weight back."""
    for weight, ids, before in reversed(graft.__dict__.pop("_original_rows")):
        weight.data.index_copy_(0, ids, before)
    originals = graft.__dict__.pop("_originals")
    for name, kept in reversed(originals.items()):  # slices of one module were written on top of each other
        site = graft.sites.get(name) or saved_site(graft, name)
        _restore(site, kept)


def saved_site(graft: Graft, name: str) -> Site:
    module = graft.model.get_submodule(name)
    return Site(name, name, module, module._modules["graft"].slot("whole").frozen, "saved", -1)


def bias_change(adapter, site: Site) -> Tensor | None:
    return None if adapter.bias is None else adapter.bias.float() - site.product.bias.float()


def _write(site: Site, new: Tensor | nn.Module, bias: Tensor | None, requantize: bool, graft: Graft) -> dict:
    """Write one merged weight; returns what restores it."""
    kept: dict = {}
    module = site.module
    if bias is not None:
        target = site.product.bias
        kept["bias"] = target.detach().cpu().clone()
        target.data.copy_((target.float() + bias).to(target.dtype))
    if isinstance(new, nn.Module):
        slot = module._modules["graft"].slot(site.slot_name)
        kept["frozen"] = (slot, slot.frozen)
        own = slot.frozen.bias  # an expert's is a row of a parameter
        new.bias = own if own is None or isinstance(own, nn.Parameter) else nn.Parameter(own.detach(), requires_grad=False)
        slot.frozen = StorageProduct(new)
    elif site.expert is not None:
        holder = getattr(module, site.attribute)
        if isinstance(holder, nn.ModuleList):
            kept["stored"] = (holder, site.expert, holder[site.expert])
            holder[site.expert] = _stored(holder[site.expert], new, requantize, graft)
        else:
            view = site.product.dense().data
            kept["weight"] = view.cpu().clone()
            view.copy_(new)
    elif isinstance(module, StoredWeight):
        slot = module._modules["graft"].slot("whole")
        kept["frozen"] = (slot, slot.frozen)
        if site.rows is not None:
            whole = slot.frozen.dense().clone()
            whole[site.rows] = new
            new = whole
        slot.frozen = _replacement(_stored(module, new, requantize, graft), module)
    else:
        view = module.weight.data.T if is_conv1d(module) else module.weight.data
        part = view if site.rows is None else view[site.rows]
        kept["weight"] = part.cpu().clone()
        part.copy_(new)
    return kept


def _restore(site: Site, kept: dict) -> None:
    module = site.module
    if "bias" in kept:
        site.product.bias.data.copy_(kept["bias"])
    if "stored" in kept:
        holder, expert, old = kept["stored"]
        holder[expert] = old
    elif "frozen" in kept:
        slot, old = kept["frozen"]
        slot.frozen = old
    elif site.expert is not None:
        site.product.dense().data.copy_(kept["weight"])
    else:
        view = module.weight.data.T if is_conv1d(module) else module.weight.data
        (view if site.rows is None else view[site.rows]).copy_(kept["weight"])


def _stored(module: nn.Module, new: Tensor, requantize: bool, graft: Graft) -> nn.Module:
    from ..registry import lookup, make_config

    if requantize:
        return type(module).from_weight(new, type(module).without_data(module.options), dtype=module.compute_dtype)
    return lookup("storage", "dense").cls.from_weight(new, make_config("storage", "dense"), dtype=new.dtype)


def _refuse_tied(graft: Graft) -> None:
    owners: dict[int, str] = {}
    for name, parameter in graft.model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), name)
    for name in [*graft.adapters, *graft.saved_modules]:
        site = graft.sites.get(name) or saved_site(graft, name)
        weight = getattr(site.module, "weight", None)
        first = owners.get(id(weight))
        if isinstance(weight, nn.Parameter) and first is not None and not first.startswith(site.module_name + "."):
            raise IncompatibleError(f"'{site.module_name}' shares its weight with '{first}': merging would change both",
                                    remedy="untie the model first (config.tie_word_embeddings=False and a cloned head weight)")


def _refuse_part_of_tied_rows(graft: Graft) -> None:
    for name, tokens in graft.trainable_tokens.items():
        weight = graft.model.get_submodule(name).weight
        others = [n for n, m in graft.model.named_modules() if n not in tokens.modules_using and m._parameters.get("weight") is weight]
        if others:
            raise IncompatibleError(f"'{name}' shares its weight with '{others[0]}', which has other tokens: merging would change both",
                                    remedy="export a merged copy (graft merge), in which the two are untied")


def _replacement(stored: nn.Module, module: nn.Module) -> StorageProduct:
    stored.bias = module.bias
    return StorageProduct(stored)
