"""Grafts merged into copies of the weights, beside a base that others use at the same time.

A slot keeps W + sum of weight * delta as a product of its own, and runs it in a forward whose state names it
(`ForwardState.merged`). The base's own weights are the pristine ones: they are never written, so leaving the merged mode is
exact, costs nothing, and nobody else can ever see a merged weight. The price is the memory of the copies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import IncompatibleError
from ..modeling.protocols import Product
from .attach import slot_of
from .graft import Graft
from .merging import bias_change, saved_site
from .slot import Route, Slot


class MergedProduct(Product):
    """W + delta (out, in) and its bias, on their own."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight, self.bias = weight, bias
        self.out_features, self.in_features = weight.shape

    def dense(self, leaves=None):
        return self.weight

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)


@torch.no_grad()
def merge_beside(route: Route, parts: Sequence[tuple[Graft, float]]) -> int:
    """Give every slot that these grafts change a copy of its weight, in the base's dtype, with weight * change of each in it. route:
    what rows name for this sum. Copies of other routes go. Returns the bytes of the copies. Raises IncompatibleError for a graft that
    is more than a change of weights; no slot has a copy then."""
    for graft, _ in parts:
        refuse_beside(graft)
    changes: dict[Slot, list[tuple[Graft, str, float]]] = {}
    for graft, weight in parts:
        for name in (*graft.adapters, *graft.saved_modules):
            slot = slot_of(graft.model, graft.sites.get(name) or saved_site(graft, name))
            changes.setdefault(slot, []).append((graft, name, weight * graft.weight))
    unmerge_beside(parts[0][0].model)
    total = 0
    try:
        for slot, entries in changes.items():
            slot.merged[route] = product = _merged_product(slot, entries)
            total += product.nbytes
    except BaseException:
        unmerge_beside(parts[0][0].model)
        raise
    return total


def unmerge_beside(model: nn.Module) -> None:
    """Drop all merged copies."""
    for module in model.modules():
        if isinstance(module, Slot) and module.merged:
            module.merged = {}


def refuse_beside(graft: Graft) -> None:
    """Raises IncompatibleError for a graft whose change cannot be in a copy of the weights."""
    reason = ("has no weight change" if not graft.info.traits["mergeable"] else
              "trains rows of tokens too" if graft.trainable_tokens else
              "runs on an edited base" if graft.edited_storage else None)
    if reason:
        raise IncompatibleError(f"graft '{graft.name}' ({graft.method}) {reason} and cannot be merged", remedy="serve it beside the base")


def _merged_product(slot: Slot, entries: Sequence[tuple[Graft, str, float]]) -> MergedProduct:
    whole, own_bias = slot.frozen.dense(), slot.frozen.bias
    new = whole.detach().to(torch.float32, copy=True)
    bias = None if own_bias is None else own_bias.detach().float()
    for graft, name, weight in entries:
        saved = name not in graft.adapters
        site = saved_site(graft, name) if saved else graft.sites[name]
        adapter = graft.saved_modules[name] if saved else graft.adapters[name]
        change = adapter.delta_weight(graft.base_of(site))
        if change is None:
            raise IncompatibleError(f"'{name}': the change depends on the input and cannot be merged", remedy="serve it beside the base")
        rows = slice(None) if site.rows is None else site.rows
        new[rows].add_(change, alpha=weight)
        moved = bias_change(adapter, site) if saved else adapter.delta_bias()
        if moved is not None:
            bias = new.new_zeros(new.shape[0]) if bias is None else bias.clone()
            bias[rows].add_(moved.float(), alpha=weight)
    return MergedProduct(new.to(whole.dtype), None if bias is None else bias.to(whole.dtype if own_bias is None else own_bias.dtype))
