"""The zeroth-order estimators run on fake tensors, and a plan counts the state that they keep."""

import pytest

import graftwork
import tiny
from training_support import completions, folder, recipe


@pytest.mark.slow
@pytest.mark.parametrize("name, moments", [("zo_adam", 2), ("zo_conservative", 0), ("zo_blockwise", 0), ("sparse_mezo", 0),
                                            ("forward_gradient", 0)])
def test_plans(name, moments, tmp_path):
    document = recipe(folder(tmp_path), completions(tmp_path / "d.jsonl"), tmp_path / "o", estimator=name, optimizer=None, adapter=None)
    made = graftwork.plan(document, estimate_time=False)
    state = moments * 4 * sum(p.numel() for p in tiny.llama().parameters())
    assert state <= made.categories["optimizer_state"] <= state + 1024 and not made.notes
