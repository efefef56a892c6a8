"""Shared by the adapter tests: options that fit the tiny models, grafts with random values, outputs, pairwise covers."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import combinations, product

import pytest
import torch

import graftwork
import tiny
from graftwork.adapters.graft import Graft
from graftwork.registry import lookup, make_config, methods
from graftwork.storage.base import apply_storage

#: options that exercise a method on the tiny models; a method that is not named here runs on its defaults
OPTIONS = {
    "binary_adapter": {"r": 6, "bits": 2},
    "binary_lora": {"r": 5},
    "prompt": {"num_virtual_tokens": 3},
    "prefix": {"num_virtual_tokens": 3},
    "bottleneck": {"r": 6, "scaling": 1.5},
    "mixlora": {"num_experts": 4, "r": 3, "alpha": 6.0, "dropout": 0.0},
    "lora": {"r": 4, "alpha": 6.0},
    "nola": {"r": 3, "alpha": 5.0, "n_basis": 20, "n_basis_b": 11},
    "flora": {"r": 2},
    "paca": {"r": 5, "alpha": 7.0},
    "miss": {"r": 5},
    "bat": {"r": 8},
    "mos": {"r": 3, "equivalent_rank": 3, "private_rank": 1, "shards": 2, "alpha": 4.0},
    "randlora": {"r": 10, "alpha": 7.0},
    "vera": {"r": 6, "d_initial": 0.5},
    "dora": {"r": 4, "alpha": 6.0},
    "ia3": {},
    "loha": {"r": 2, "alpha": 5.0},
    "lokr": {"r": 3, "alpha": 4.0},
    "oft": {"block_size": 16},
    "kasa": {"r": 4, "alpha": 6.0},
    "loldu": {"r": 8, "alpha": 16.0, "init": "normal"},
    "nlora": {"r": 4, "alpha": 6.0, "landmarks": "random"},
    "lamda": {"r": 5, "alpha": 8.0},
    "lora_xs": {"r": 6, "alpha": 9.0},
    "lora_sb": {"r": 6},
    "block_lora": {"r": 3, "n_blocks": 2, "alpha": 8.0},
    "s2ft": {"ratio": 0.3, "per_layer": True, "target_modules": "all-linear"},
    "spiel": {"density": 0.08},
    "s2_lora": {"r": 12, "threshold": 0.02},
    "allora": {"r": 4, "eta": 1.5},
    "adalora": {"r": 4, "alpha": 20.0},
    "increlora": {"r": 4, "alpha": 20.0},
    "sst": {"r": 6},
    "sora": {"r": 4, "alpha": 20.0},
    "qa_lora": {"r": 4, "alpha": 16.0, "group_size": 16},
    "edkm": {"r": 4, "alpha": 6.0},
    "l4q": {"bits": 3, "group_size": 32, "r": 4, "alpha": 6.0},
}
#: the storage that a method needs below it, where a dense model will not do
BASE = {"peqa": {"method": "int4", "group_size": 32}, "pv_tuning": {"method": "int4", "group_size": 32}}
#: noise of `fill` and rate of the steps, where trained values are no weights of order 0.1
SIZES, RATES = {"peqa": 0.01, "pv_tuning": 0.01, "l4q": 0.02, "edkm": 0.02}, {"peqa": 2e-3, "pv_tuning": 2e-3, "l4q": 5e-3, "edkm": 5e-3}
SITE = [info.name for info in methods("adapter") if info.traits["scope"] == "site"]
OTHER = [info.name for info in methods("adapter") if info.traits["scope"] != "site"]
BLOCK = [info.name for info in methods("adapter") if info.traits["scope"] == "block"]

#: methods that are tested on every kind of model in every run; they share all code that knows of kinds with the others
EVERYWHERE = ("lora", "nola", "flora", "paca")


def on_kinds(kinds) -> list:
    """(method, kind) for parametrize. Methods outside EVERYWHERE run on the tiny Llama, and on one more kind that differs from
    method to method outside `make test-fast`; their other kinds come with `make test-all` (and in the pairwise cover)."""
    kinds, cases = list(kinds), []
    for i, method in enumerate(SITE):
        second = kinds[1:][i % (len(kinds) - 1)]
        for kind in kinds:
            late = method not in EVERYWHERE and kind != "llama"
            marks = [] if not late else [pytest.mark.slow if kind == second else pytest.mark.full]
            cases.append(pytest.param(method, kind, marks=marks))
    return cases


def on_base(model, method: str, folder=None):
    """The model, its weights in the storage that the method needs; loaded from a folder in `folder`, if given, as artifacts want it."""
    if method in BASE and folder is not None:
        place = folder / "base"
        return graftwork.load(place if place.exists() else tiny.save(model, place), storage=BASE[method], dtype="fp32")[0]
    if method in BASE:
        options = dict(BASE[method])
        apply_storage(model, make_config("storage", options.pop("method"), **options))
    return model


def runs_on(method: str, storage: str) -> bool:
    """Whether the method takes weights of that storage."""
    leaf = lookup("adapter", method).traits.get("owns_leaf")
    return leaf is None or lookup("storage", storage).cls.lets_train(leaf)


def fill(graft: Graft, seed: int = 0, size: float | None = None) -> Graft:
    """Add normal noise to every trained value, so that the graft changes something."""
    size = SIZES.get(graft.method, 0.1) if size is None else size
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


def same_as_twin(model, twin, plain, ids, parameters, *, logits: float = 1e-5, gradients: float = 1e-4) -> None:
    """The grafted model and another library's twin of it give the same outputs and gradients. plain: the model without either.
    parameters: [(ours, theirs)] or [(ours, theirs, factor)], where ours = factor * theirs."""
    ours, theirs = output(model, ids), output(twin, ids)
    close(ours, theirs, logits)
    assert (ours - output(plain, ids)).abs().max() > 1e-2
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for mine, other, *factor in parameters:
        close(mine.grad, other.grad * factor[0] if factor else other.grad, gradients)


def pairwise(factors: dict[str, list], seed: int = 0, possible: Callable[..., bool] = lambda *row: True) -> list[tuple]:
    """A seeded covering array of strength 2: every pair of values of two factors that occurs in a possible row occurs in some row."""
    names, generator = list(factors), random.Random(seed)
    rows = [row for row in product(*factors.values()) if possible(*row)]
    number: dict[tuple, int] = {}  # of every pair: a bit of a row's mask, as rows are counted some million times
    masks = []
    for row in rows:
        pairs = [((a, row[a]), (b, row[b])) for a, b in combinations(range(len(names)), 2)]
        masks.append((sum(1 << number.setdefault(pair, len(number)) for pair in pairs), row))
    chosen, missing = [], (1 << len(number)) - 1
    while missing:
        generator.shuffle(masks)
        mask, row = max(masks, key=lambda each: (each[0] & missing).bit_count())
        missing &= ~mask
        chosen.append(row)
    return chosen
