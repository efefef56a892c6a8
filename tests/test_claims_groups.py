"""One claim of every group as it is committed: true of the method as it is, `does not hold here` once that is broken on purpose.

Those that serve something are in test_claims_serving.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest

from claims_support import verdict
from graftwork.claims.claim import claims, find


def not_skew(own):
    """Rotations that are none."""
    return lambda upper, size: own(upper, size).triu()


def at_full_size(own):
    """New ranks that take part at once."""
    def grow(self, count, generator):
        own(self, count, generator)
        self.gate.data[-count:] = 1.0

    return grow


def same_half(own):
    """A and B take the same directions."""
    return lambda self, r, generator: own(self, r, generator)[:1] * 2


def coupled(own):
    """Weight decay as a part of the gradient."""
    def update(params, grads, *state, weight_decay, **options):
        return own(params, [g + weight_decay * p for g, p in zip(grads, params, strict=True)], *state, weight_decay=0.0, **options)

    return update


def a_block_late(own):
    """Forwards restart behind the block whose weight was moved."""
    def slope(self, ctx, p, i, base, stack, depth):
        return own(self, ctx, p, i, base, stack, min(depth + 1, len(stack.blocks)) if stack else depth)

    return slope


def halved(own):
    """Half of the change goes into the zero points."""
    return lambda self, product, weight, *, exact: own(self, product, 0.5 * weight, exact=exact)


def unweighted(own):
    """A sum that forgets its weights."""
    return lambda grafts, weights, rank: own(grafts, [1.0 for _ in weights], rank)


BROKEN: dict[str, tuple[str, str, Callable[[Any], Any]]] = {
    "adamw_decay": ("graftwork.optim.adamw", "adamw_any_", coupled),
    "deepzero_reuse": ("graftwork.estimators.deepzero:DeepZeroEstimator", "_slope", a_block_late),
    "flora_stacking": ("graftwork.interchange.combine", "_sums", unweighted),
    "increlora_growth": ("graftwork.adapters.increlora:IncreLoRAAdapter", "grow", at_full_size),
    "lora_ga_step": ("graftwork.initializers.lora_ga:LoRAGAInitializer", "halves", same_half),
    "oft_angles": ("graftwork.adapters.oft", "skew", not_skew),
    "qa_lora_merge": ("graftwork.adapters.qa_lora:QALoRAAdapter", "held_by", halved),
}


def test_every_group_is_here():
    assert {find(name).group for name in BROKEN} == {claim.group for claim in claims().values()} - {"absent", "serving"}


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN)
def test_a_claim_and_a_method_that_is_broken(name, tmp_path, monkeypatch):
    claim, (place, attribute, broken) = find(name), BROKEN[name]
    assert verdict(claim, tmp_path / "good") == "holds"
    module, _, owner = place.partition(":")
    held = importlib.import_module(module)
    held = getattr(held, owner) if owner else held
    monkeypatch.setattr(held, attribute, broken(getattr(held, attribute)))
    assert verdict(claim, tmp_path / "broken") == "does not hold here"
