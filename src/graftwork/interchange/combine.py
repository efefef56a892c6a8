"""Several grafts of one base as one graft: sums, TIES and DARE on their exact changes.

    linear   sum_i w_i D_i                                        D_i (out, in): the exact change of graft i at a map
    ties     (arXiv 2306.01708) T_i: D_i with all but its `density` largest entries set to 0; s = sign(sum_i T_i);
             per entry the mean of w_i T_i over the grafts whose sign is s
    dare     (arXiv 2311.03099) sum_i w_i M_i * D_i / density, M_i Bernoulli(density) from a private generator

The result is a `lora` graft. A linear sum of low-rank changes is exact (ranks add up, at most min(out, in)); everything
else has full rank and is truncated to `rank`, with its error reported. As in PEFT, TIES divides by the number of agreeing
grafts, not by their weights, so one graft at weight w and density 1 gives w D. Unlike PEFT's combinations, which act on A
and B apart (so that even a sum of two adapters is not the sum of their changes), all three act on the changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..adapters.graft import Graft
from ..errors import IncompatibleError, UsageError, nearest
from ..modeling.experts import expert_count
from .factors import Factors, LowRank, check_exportable, lora_factors, truncated
from .lora import lora_of

Rule = Callable[[Sequence[Tensor], Sequence[float], float, torch.Generator], Tensor]


def linear(changes: Sequence[Tensor], weights: Sequence[float], density: float, generator: torch.Generator) -> Tensor:
    """sum_i w_i D_i, any equal shapes."""
    return sum(weight * change for change, weight in zip(changes, weights))


def ties(changes: Sequence[Tensor], weights: Sequence[float], density: float, generator: torch.Generator) -> Tensor:
    """Trim, elect signs, mean of those that agree."""
    kept = torch.stack([_largest(change, density) for change in changes])
    agree = kept.sign() == torch.where(kept.sum(0) >= 0, 1.0, -1.0)
    weighted = kept * torch.tensor(weights, dtype=kept.dtype, device=kept.device).view(-1, *[1] * (kept.dim() - 1))
    return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)


def dare(changes: Sequence[Tensor], weights: Sequence[float], density: float, generator: torch.Generator) -> Tensor:
    """Drop entries at random, rescale what is left, add up."""
    masks = [(torch.rand(change.shape, generator=generator) < density).to(change.device) for change in changes]
    return linear([change * mask / density for change, mask in zip(changes, masks)], weights, density, generator)


RULES: dict[str, Rule] = {"linear": linear, "ties": ties, "dare": dare}


@torch.no_grad()
def combine(grafts: Sequence[Graft], method: str = "linear", *, weights: Sequence[float] | None = None, density: float | None = None,
            rank: int | None = None, seed: int = 0) -> tuple[Graft, float]:
    """(a `lora` graft, relative Frobenius error of its truncation). All grafts are attached to one model; one graft at weight 1
    is returned as it is.

    weights: one per graft, default 1 each. density: share of entries that ties and dare keep. rank: bound of the result's rank; needed
    for ties and dare, and where a graft is not low-rank. Raises UsageError (options) and IncompatibleError (a graft that is no
    change of weights, or trains whole modules beside its adapter)."""
    if method not in RULES:
        raise UsageError(f"there is no method '{method}' of combining grafts{nearest(method, RULES)}",
                         remedy=f"methods: {', '.join(RULES)}")
    weights = [1.0] * len(grafts) if weights is None else list(weights)
    if len(weights) != len(grafts):
        raise UsageError(f"{len(weights)} weights are given for {len(grafts)} grafts", remedy="give one weight per graft, in their order")
    if method == "linear" and density is not None:
        raise UsageError("density does nothing for linear", remedy="it goes with ties and dare")
    if density is not None and not 0 < density <= 1:
        raise UsageError(f"density {density} is no share", remedy="choose a number in (0, 1], for example 0.5")
    for graft in grafts:
        check_exportable(graft)
        if graft.edited_storage:
            raise IncompatibleError(f"graft '{graft.name}' runs on an edited base of its own",
                                    remedy="convert it first: graft convert ... --to lora")
        if graft.saved_modules:
            raise IncompatibleError(f"graft '{graft.name}' holds whole trained modules: {', '.join(graft.saved_modules)}",
                                    remedy="combine grafts that were trained without modules_to_save")
        if graft.trainable_tokens:
            raise IncompatibleError(f"graft '{graft.name}' holds rows of tokens: {', '.join(graft.trainable_tokens)}",
                                    remedy="combine grafts that were trained without trainable_tokens")
    if method == "linear" and rank is None and weights == [1.0]:
        return grafts[0], 0.0
    exact = method == "linear" and all(graft.info.traits["low_rank"] for graft in grafts)
    if rank is None and not exact:
        raise UsageError(f"a combination by {method} of these grafts has full rank: as a graft it can only be approximated",
                         remedy="name the rank of the approximation (--rank 16); its error is reported")
    share = 0.5 if density is None else density
    factors = _sums(grafts, weights, rank) if exact else _dense(grafts, RULES[method], weights, share, rank, seed)
    made = lora_of(grafts[0], factors)
    made.provenance = {"combined": [{"name": g.name, "method": g.method, "weight": w} for g, w in zip(grafts, weights)],
                       "method": method, "density": density, "seed": seed}
    return made, factors.error


def _sums(grafts: Sequence[Graft], weights: Sequence[float], rank: int | None) -> Factors:
    """Factors side by side: exact, unless a bound truncates them."""
    found, parts = Factors(), {}
    for graft, weight in zip(grafts, weights):
        own = lora_factors(graft)
        for key, pair in _pairs(own).items():
            folded = pair.folded()
            parts.setdefault(key, []).append(LowRank(folded.A, folded.B * weight))
        for name, bias in own.biases.items():
            found.biases[name] = found.biases.get(name, 0) + bias * weight
    lost = total = 0.0
    for key, pairs in parts.items():
        pair = LowRank(torch.cat([p.A for p in pairs]), torch.cat([p.B for p in pairs], 1))
        pair, cut, whole = truncated(pair, min(rank or pair.r, *(pair.A.shape[1], pair.B.shape[0])))
        lost, total = lost + cut, total + whole
        _put(found, grafts[0], key, pair)
    found.error = (lost / total) ** 0.5 if rank is not None and total else 0.0
    return found


def _dense(grafts: Sequence[Graft], rule: Rule, weights: Sequence[float], density: float, rank: int, seed: int) -> Factors:
    """One map at a time: its changes, combined, cut to the rank."""
    places: dict[Any, list[tuple[int, str]]] = {}
    for i, graft in enumerate(grafts):
        for name, site in graft.sites.items():
            key = site.module_name if site.expert is None else (site.module_name, site.attribute, site.expert)
            places.setdefault(key, []).append((i, name))
    found, lost, total = Factors(), 0.0, 0.0
    for key, members in places.items():
        changes, biases = {}, {}
        for i, name in members:
            site, adapter = grafts[i].sites[name], grafts[i].adapters[name]
            whole = site.product.whole if site.rows is not None else site.product
            change, bias = adapter.delta_weight(grafts[i].base_of(site)), adapter.delta_bias()
            full = changes.setdefault(i, torch.zeros(whole.out_features, whole.in_features))
            full[site.rows or slice(None)] += change.float().cpu() * grafts[i].weight
            if bias is not None:
                biases.setdefault(i, torch.zeros(whole.out_features))[site.rows or slice(None)] += bias.float().cpu() * grafts[i].weight
        combined = rule(list(changes.values()), [weights[i] for i in changes], density, _generator(seed, f"{key}"))
        U, S, Vh = torch.linalg.svd(combined, full_matrices=False)
        lost, total = lost + float(S[rank:].square().sum()), total + float(S.square().sum())
        _put(found, grafts[0], key, LowRank(Vh[:rank].contiguous(), (U[:, :rank] * S[:rank]).contiguous()))
        if biases:
            where = key if isinstance(key, str) else ".".join(map(str, key))
            found.biases[where] = rule(list(biases.values()), [weights[i] for i in biases], density, _generator(seed, f"{key}/bias"))
    found.error = (lost / total) ** 0.5 if total else 0.0
    return found


def _pairs(factors: Factors) -> dict[Any, LowRank]:
    experts = {(module, attribute, e): pair for (module, attribute), entries in factors.experts.items() for e, pair in enumerate(entries)
               if pair is not None}
    return {**factors.modules, **experts}


def _put(found: Factors, graft: Graft, key: Any, pair: LowRank) -> None:
    if isinstance(key, str):
        found.modules[key] = pair
        return
    module, attribute, expert = key
    count = expert_count(graft.model.get_submodule(module))
    found.experts.setdefault((module, attribute), [None] * count)[expert] = pair


def _largest(change: Tensor, density: float) -> Tensor:
    """The change with all but its share `density` of largest entries set to 0."""
    if density == 1:
        return change
    keep = torch.zeros(change.numel(), dtype=torch.bool, device=change.device)
    keep[change.abs().reshape(-1).topk(int(density * change.numel())).indices] = True
    return change * keep.view_as(change)


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") & (2**63 - 1))
