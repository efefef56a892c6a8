"""Singular values of what a graft has learned, one site at a time (of full tuning: whole.py).

    change = B A   (out, in), B (out, r), A (r, in):   B = Q_b R_b, A^T = Q_a R_a   ->   sigma(B A) = sigma(R_b R_a^T), (r, r)
    any other change: sigma of the dense (out, in) matrix

stable rank = |change|_F^2 / sigma_1^2;  effective rank = exp(-sum p log p), p = sigma / sum sigma. All in float64.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import GraftworkError

#: sites of a graft that are looked at, and singular values of each that are kept
SITES, VALUES = 64, 64


def write_spectra(folder: Path, grafts: Sequence[Any], *, sites: int = SITES, dense: bool = True,
                  progress: Callable[[int, int], None] | None = None) -> None:
    """spectra.json of a run. dense: also changes that are not of low rank, which take an SVD of a whole matrix each. A fleet shares
    the number of sites among its members."""
    import json

    from ..files import atomic_write_text

    found: dict[str, Any] = {}
    plain = next((graft for graft in grafts if not graft.info.traits["mergeable"]), None)
    if plain is not None:
        why = f"'{plain.method}' changes no weight, so there are no singular values"
        return atomic_write_text(folder / "spectra.json", json.dumps({"sites": {}, "left_out": why}))
    share = max(1, sites // max(1, len(grafts)))
    for graft in list(grafts)[:sites]:
        prefix = f"{graft.name}/" if len(grafts) > 1 else ""
        found.update({prefix + name: values for name, values in graft_spectra(graft, chosen_sites(graft, share), dense, progress)})
    document = {"sites": found, "of": sum(len(g.adapters) for g in grafts)}
    if not found:
        document["left_out"] = ("its changes depend on the input" if dense else
                                "its changes are not of low rank (graft report RUN --spectra 24 takes the time)")
    atomic_write_text(folder / "spectra.json", json.dumps(document))


def chosen_sites(graft: Any, limit: int) -> list[str]:
    """At most `limit` sites: of evenly spaced layers, the first and the last among them, with all their sites."""
    return evenly(list(graft.adapters), limit, lambda name: graft.sites[name].layer)


def evenly(names: list[str], limit: int, layer_of: Callable[[str], int]) -> list[str]:
    """At most `limit` of the names: those of evenly spaced layers, the first and the last among them, after what
    lies outside of the layers (layer -1)."""
    if len(names) <= limit:
        return names
    layers: dict[int, list[str]] = {}
    for name in names:
        layers.setdefault(layer_of(name), []).append(name)
    outside = layers.pop(-1, [])  # embeddings and heads get a quarter at most
    if not layers:
        return outside[:limit]
    outside = outside[:max(limit // 4, limit - sum(map(len, layers.values())))]
    order, room = sorted(layers), limit - len(outside)
    count = max(1, min(len(order), room // max(map(len, layers.values()))))
    kept = [order[round(i * (len(order) - 1) / max(1, count - 1))] for i in range(count)]
    return [*outside, *[name for layer in dict.fromkeys(kept) for name in layers[layer]][:room]]


def graft_spectra(graft: Any, names: Iterable[str], dense: bool = True,
                  progress: Callable[[int, int], None] | None = None) -> Iterable[tuple[str, dict[str, Any]]]:
    """(site, its numbers), lazily: one change is alive at a time."""
    names = list(names)
    for i, name in enumerate(names):
        values = singular_values(graft, name, dense)
        if progress is not None:
            progress(i + 1, len(names))
        if values is not None:
            yield name, {"shape": [graft.adapters[name].out_features, graft.adapters[name].in_features], **summary(values)}


def singular_values(graft: Any, name: str, dense: bool = True) -> Any:
    """Of one site's change, in falling order, float64 on the CPU; None where there is none (it depends on the input)
    or, unless dense, it has no factors."""
    import torch


    adapter, base = graft.adapters[name], graft.base_of(graft.sites[name])
    with torch.no_grad():
        pair = adapter.factors(base)
        if pair is not None and 2 * pair[1].shape[0] <= min(pair[0].shape[0], pair[1].shape[1]):
            right, left = (torch.linalg.qr(each.double()).R for each in (pair[1].T, pair[0]))
            return torch.linalg.svdvals(left @ right.T).cpu() * abs(graft.weight)
        if pair is None and not dense:
            return None
        change = pair[0].double() @ pair[1].double() if pair is not None else adapter.delta_weight(base)
        return None if change is None else torch.linalg.svdvals(change.double()).cpu() * abs(graft.weight)


def summary(values: Any) -> dict[str, Any]:
    """The numbers that are kept of a spectrum."""
    total, squares = float(values.sum()), float(values.square().sum())
    share = (values / total)[values > 0] if total else values[:0]
    return {"values": [float(f"{v:.6g}") for v in values[:VALUES].tolist()], "frobenius": squares**0.5,
            "stable_rank": squares / float(values[0]) ** 2 if total else 0.0,
            "effective_rank": float((-(share * share.log()).sum()).exp()) if total else 0.0}


def role_of(site: str) -> str:
    """The kind of map: the last part of a site's name, experts together."""
    return next(part for part in reversed(re.split(r"[./]", site)) if not part.isdigit())


def of_saved(folder: Path, *, sites: int, say: Callable[[str], None]) -> None:
    """spectra.json of a finished run, from its base and its saved graft or its tuned weights."""
    from ..evaluation.targets import find_target, load_target
    from ..modeling.state import state_of

    target = find_target(folder)
    if not target.grafts:
        from .whole import write_changes

        return write_changes(folder, target.model, target.recipe.model, task=target.task, sites=sites, stored=target.storage is not None,
                             say=say)
    try:
        model, _ = load_target(target, say=say)
    except GraftworkError as error:
        raise type(error)(f"{folder}: {error.message}", remedy=error.remedy) from None
    write_spectra(folder, list(state_of(model).grafts.values()), sites=sites,
                  progress=lambda done, total: say(f"spectra: {done} of {total} sites") if done == total or done % 8 == 0 else None)
