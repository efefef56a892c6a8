"""Plans grown from a few equal blocks against the simulation of every block."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tiny
from graftwork.planning import repeat
from graftwork.planning.blocks import Snapshot
from graftwork.planning.repeat import Trace, blocks_of, equal, grown
from graftwork.planning.simulate import plan
from graftwork.recipe import load_recipe
from test_plan import RECIPES, document

ROOT = Path(__file__).parents[1]
#: enough for four blocks between those that the depths show
LAYERS = 9
SIZES = dict(hidden_size=64, intermediate_size=176, vocab_size=512)
CASES = {name: RECIPES[name] for name in ("lora", "lora accumulated", "checkpointing", "qlora", "paca", "galore")}
CASES["mezo on int4"] = {"storage": "int4", "adapter": {"method": "lora", "r": 4}, "estimator": "mezo"}
CASES["zo_blockwise"] = {"adapter": {"method": "lora", "r": 4, "target_modules": ["q_proj"]}, "estimator": "zo_blockwise"}
CASES["vptq"] = {"storage": "vptq", "adapter": {"method": "lora", "r": 4}}  # which looks its vectors up, too
CASES["s2_lora"] = {"adapter": {"method": "s2_lora", "r": 4, "target_modules": "all-linear"}}  # whose penalty comes after the pass
#: those of every run; the rest is for `make test-all`
EVERYWHERE = ("checkpointing", "mezo on int4", "zo_blockwise", "s2_lora")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tiny.llama(num_hidden_layers=LAYERS, **SIZES), tmp_path_factory.mktemp("repeat") / "model", with_tokenizer=False)


@pytest.fixture
def tall(monkeypatch):
    monkeypatch.setattr(repeat, "LEAST", LAYERS)


def both(doc):
    recipe = load_recipe(doc)
    return [plan(recipe, use_data=False, estimate_time=False, every_block=every) for every in (True, False)]


def is_grown(made):
    return any("equal blocks" in note for note in made.notes)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in EVERYWHERE else pytest.mark.full) for n in CASES])
def test_grown_figures_are_those_of_every_block(folder, tall, name):
    whole, few = both(document(folder, data={"max_length": 24}, **CASES[name]))
    assert is_grown(few) and not is_grown(whole)
    for figure in ("peak_bytes", "categories", "device", "trained", "flops", "saved_bytes", "batch"):
        assert getattr(few, figure) == getattr(whole, figure), figure
    assert [cell for cell in few.work if cell[1]] == [cell for cell in whole.work if cell[1]]


@pytest.mark.full
def test_70b_is_grown_to_what_every_block_gave():
    rows = json.loads((ROOT / "benchmarks" / "results" / "plan_tables.json").read_text(encoding="utf-8"))["rows"]
    row = next(r for r in rows if (r["model"], r["method"], r["checkpointing"]) == ("70b", "lora", False))
    made = plan({**row["recipe"], "model": "config:llama-2-70b"}, use_data=False, device="cuda", estimate_time=False, every_block=False)
    assert is_grown(made) and (made.peak_bytes, made.categories, made.trained) == (row["peak_bytes"], row["categories"], row["trained"])
    assert made.device == row["cuda"]  # pools and blocks at the peak too


def test_recipes_that_tell_blocks_apart_are_not_grown(folder, tall):
    assert blocks_of(load_recipe(document(folder))) == LAYERS
    lora = {"method": "lora", "layers_to_transform": [1, 2, 3]}
    for sections in (RECIPES["lisa"], {"storage": "mixed"}, {"adapter": lora},
                     {"adapter": {"method": "lora", "rank_pattern": {"q_proj": 2}}},
                     {"adapter": {"method": "lora", "target_modules": ["layers.0.self_attn.q_proj"]}}):
        assert blocks_of(load_recipe(document(folder, **sections))) is None


def test_short_models_are_simulated_as_they_are(folder):
    assert blocks_of(load_recipe(document(folder))) is None  # below LEAST


def test_blocks_are_compared_to_the_attribute():
    blocks = tiny.llama(num_hidden_layers=4, **SIZES).model.layers
    assert equal(blocks)
    blocks[2].mlp.act_alpha = 0.5
    assert not equal(blocks)
    del blocks[2].mlp.act_alpha
    blocks[1].mlp.up_proj = torch.nn.Linear(64, 180, bias=False)
    assert not equal(blocks)


def test_a_config_whose_layers_differ_is_not_grown(tmp_path, tall):
    from transformers import Qwen3Config

    kinds = ["full_attention"] * 8 + ["sliding_attention"]
    config = Qwen3Config(hidden_size=64, intermediate_size=128, num_hidden_layers=9, num_attention_heads=4, num_key_value_heads=2,
                         head_dim=16, vocab_size=128, layer_types=kinds, use_sliding_window=True, sliding_window=8)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**config.to_dict(), "architectures": ["Qwen3ForCausalLM"]}), encoding="utf-8")
    assert blocks_of(load_recipe(document(path))) is None


# -- made up traces ----------------------------------------------------------------------------------------------------
def made_up(depth, live):
    """A forward of `depth` blocks whose moment of block l has live(l, depth) bytes."""
    points = [Snapshot(i, "forward", n := live(i, depth), [n, 0, 0, 0, 0, 0, 0, 0], [n, 0, 0], depth) for i in range(depth)]
    work = SimpleNamespace(cells=Counter({("float32", 8, 4): depth}), update=Counter(), operations=depth)
    return Trace(points, {i: ("op", ((2, 2),)) for i in range(depth)}, work, 10 * depth, 40 * depth)


def test_the_moment_that_wins_in_the_whole_model_may_not_win_in_the_shallow_ones():
    def live(block, depth):  # the first block is far ahead at the depths that are looked at, the last one grows faster
        return 1000 + depth if block == 0 else 10 * block + depth

    found = grown([made_up(n, live) for n in repeat.DEPTHS], 200)
    assert found.peak == max(live(block, 200) for block in range(200)) == 10 * 199 + 200
    assert (found.operations, found.trained, found.saved, found.blocks) == (200, 2000, 8000, 200)
    assert found.cells == {("float32", 8, 4): 200} and found.categories[0] == found.peak


def test_what_does_not_grow_evenly_has_no_answer():
    traces = [made_up(n, lambda block, depth: depth**2 + block) for n in repeat.DEPTHS]
    assert grown(traces, 40) is None
    even = [made_up(n, lambda block, depth: depth + block) for n in repeat.DEPTHS]
    assert grown(even, 40).peak == 40 + 39
    assert grown([*even[:2], replace(even[2], trained=51)], 40) is None
    even[1].work.cells["float32", 9, 9] = 1
    assert grown(even, 40) is None
