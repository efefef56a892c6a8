"""Peaks of recipes drawn from the space that advice searches: planned and measured by the profiler, within 2 %.

One recipe of each of 36 draws: an arm that was not drawn before, a storage, a schedule, whatever the rules of recipes allow.
"""

from __future__ import annotations

import json
import random

import pytest
import torch
import torch.nn.functional as F

import tiny
from graftwork.errors import GraftworkError
from graftwork.planning.evidence import packaged
from graftwork.planning.measure import measure_peak
from graftwork.planning.search import describe
from graftwork.planning.space import Candidate, Space
from graftwork.recipe import load_recipe
from test_plan import measured, planned

DRAWS = 36
#: of every run; the rest is for `make test-all`
EVERY = 3
#: (least, most) of planned / measured - 1 where it is not 2 %. Upper bounds: welore's ranks follow from singular values of weights, which
#: a plan does not read; increlora's from gradients.
BOUNDS = {"increlora": (-0.001, 0.03), "welore": (0.0, 0.25)}


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    folder = tiny.save(tiny.llama(hidden_size=128, intermediate_size=352, num_hidden_layers=2, vocab_size=1024),
                       tmp_path_factory.mktemp("advise") / "model")
    rows = folder.with_name("rows.jsonl")  # for storages that are calibrated; plans and steps are of the shape alone
    rows.write_text("".join(json.dumps({"text": f"row {n} of {n * 7} words to calibrate on"}) + "\n" for n in range(16)))
    base = load_recipe({"model": str(folder), "data": {"train": str(rows), "format": "text", "max_length": 48},
                        "train": {"batch_size": 4, "max_steps": 10, "precision": "fp32"}})
    return Space(base.document(), packaged(), "causal_lm", 4, ("fp32", "bf16"))


def drawn(space: Space, count: int):
    """Candidates that the rules allow, each of another arm, in an order that is always the same."""
    draw, storages, chosen = random.Random(11), space.storages(), []
    arms = list(space.arms())
    draw.shuffle(arms)
    taken = set()
    for arm in arms:
        kind = arm.adapter["method"] if arm.adapter else ("full", arm.optimizer and arm.optimizer["method"], arm.estimator["method"])
        if len(chosen) == count:
            break
        if kind in taken:
            continue
        for _ in range(8):
            candidate = Candidate(draw.choice(storages), arm, *draw.choice(list(space.schedules(arm))))
            try:
                load_recipe(candidate.document(space.base))
            except GraftworkError:
                continue
            taken.add(kind)
            chosen.append(candidate)
            break
    return chosen


@pytest.fixture(scope="module")
def candidates(space):
    found = drawn(space, DRAWS)
    assert len(found) == DRAWS and len({describe(c) for c in found}) == DRAWS
    return found


@pytest.fixture(scope="module")
def scratch(space):
    """Bytes that the kernel of attention allocates and frees within a call on these models: what a ledger says that it does not see.
    10 KiB with AVX-512, none on other processors."""
    heads, rows, length, width = 4, 4, 48, 32

    def attend():
        return F.scaled_dot_product_attention(*inputs, is_causal=True)

    inputs = [torch.zeros(rows, heads, length, width, requires_grad=True) for _ in range(3)]
    others = measure_peak(lambda: None).baseline_bytes
    return measure_peak(attend).peak_bytes - others - 4 * rows * heads * length * (width + 1)  # its output, and a sum a row


@pytest.mark.parametrize("number", [pytest.param(n, marks=pytest.mark.slow if n < EVERY else pytest.mark.full) for n in range(DRAWS)])
def test_recipes_of_the_space_are_planned_within_two_percent(space, candidates, scratch, number):
    candidate = candidates[number]
    doc = candidate.document(space.base)
    try:
        expected = planned(doc)
    except GraftworkError as error:  # what rules see only once sites and shapes are there; advice passes it over
        pytest.skip(f"{describe(candidate)}: {error.message}")
    # of adapters the second step is the heaviest: what the first one leaves is state
    found = max(measured(doc, at) for at in ((0, 1, 8) if candidate.arm.selection else (1,) if candidate.arm.adapter else (0, 1)))
    method = (doc["adapter"] or {}).get("method")
    least, most = BOUNDS.get(method, (-0.02, 0.02))
    if method == "increlora":  # its peak lies in attention
        least = max(least - scratch / found, -0.02)
    assert least <= expected.peak_bytes / found - 1 <= most, (describe(candidate), expected.peak_bytes, found, expected.categories)
