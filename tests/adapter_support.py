"""Shared by the adapter tests: options that fit the tiny models, grafts with random values, outputs, pairwise covers."""

from __future__ import annotations

import random
from itertools import combinations, product

import torch

import graftwork
from graftwork.adapters.graft import Graft
from graftwork.registry import methods

#: options that exercise a method on the tiny models; a method that is not named here runs on its defaults
OPTIONS = {
    "lora": {"r": 4, "alpha": 6.0},
    "nola": {"r": 3, "alpha": 5.0, "n_basis": 20, "n_basis_b": 11},
    "flora": {"r": 2},
    "paca": {"r": 5, "alpha": 7.0},
    "adalora": {"r": 4, "alpha": 20.0},
    "increlora": {"r": 4, "alpha": 20.0},
    "sora": {"r": 4, "alpha": 20.0},
    "slora": {"r": 3, "alpha": 20.0},
}
SITE = [info.name for info in methods("adapter") if info.traits["scope"] == "site"]
OTHER = [info.name for info in methods("adapter") if info.traits["scope"] != "site"]


def fill(graft: Graft, seed: int = 0, size: float = 0.1) -> Graft:
    """Add normal noise to every trained value, so that the graft changes something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in graft.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * size
            parameter.add_(noise.to(parameter.device, parameter.dtype))
    return graft


def attach(model, method: str, *, name: str = "a", seed: int = 0, filled: bool = True, **options) -> Graft:
    """A graft with the method's test options; random values unless filled=False."""
    graft = graftwork.attach(model, method, name=name, seed=seed, **{**OPTIONS.get(method, {}), **options})
    return fill(graft, seed + 1) if filled else graft


def output(model, ids, **more):
    """Logits, or the last hidden state of an encoder."""
    answer = model(ids, **more)
    return answer.logits if hasattr(answer, "logits") else answer.last_hidden_state


def close(got, wanted, relative: float = 1e-4) -> None:
    """Largest difference relative to the largest wanted value."""
    error = (got.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp_min(1e-12)
    assert error <= relative, f"relative error {error:.2e} > {relative:.0e}"


def pairwise(factors: dict[str, list], seed: int = 0) -> list[tuple]:
    """A seeded covering array of strength 2: every pair of values of two factors occurs in some row."""
    names, generator = list(factors), random.Random(seed)
    rows = list(product(*factors.values()))
    open_pairs = {((a, x), (b, y)) for a, b in combinations(range(len(names)), 2)
                  for x in factors[names[a]] for y in factors[names[b]]}

    def covers(row: tuple) -> set:
        return {((a, row[a]), (b, row[b])) for a, b in combinations(range(len(names)), 2)} & open_pairs

    chosen = []
    while open_pairs:
        generator.shuffle(rows)
        best = max(rows, key=lambda row: len(covers(row)))
        open_pairs -= covers(best)
        chosen.append(best)
    return chosen
