"""What the search for recipes is made of: counted work against hand counts, the roofline, the evidence table, the Pareto set against
brute force, and the search itself on a planner by formula."""

from __future__ import annotations

import json
import random
from functools import cache

import pytest
import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode

import tiny
from graftwork import registry
from graftwork.adapters.attach import attach
from graftwork.artifact import graft_tensors
from graftwork.errors import GraftworkError, UsageError
from graftwork.planning import pareto, roofline, search, simulate
from graftwork.planning.evidence import FAILED, Evidence, gap_of, packaged
from graftwork.planning.judging import reasons
from graftwork.planning.ledger import Ledger
from graftwork.planning.measure import MIB, expected_device_bytes
from graftwork.planning.roofline import Roofline
from graftwork.planning.simulate import plan
from graftwork.planning.work import Work
from graftwork.recipe import load_recipe
from graftwork.training.build import build_model
from test_plan import graft

FLAT = Roofline("flat", {"float32": 1e9, "bfloat16": 2e9}, 1e9, 0.0, True, "made up")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tiny.llama(), tmp_path_factory.mktemp("advise") / "model", with_tokenizer=False)


# -- work and roofline -------------------------------------------------------------------------------------------------
def test_work_of_a_linear_layer_is_the_hand_count():
    layer, x = torch.nn.Linear(16, 8, bias=False), torch.randn(5, 16, requires_grad=True)
    ledger, work = Ledger(), Work()
    with ledger:
        ledger.on_operation = work
        layer(x).sum().backward()
    product = 2 * 5 * 16 * 8
    assert work.flops == 3 * product  # y, the gradient of x, that of W
    products = {bytes_: n for (dtype, flops, bytes_), n in work.cells.items() if flops}
    assert products == {4 * (5 * 16 + 16 * 8 + 5 * 8): 3}  # each reads two of x, W, y and writes the third
    assert sum(n for (_, flops, _), n in work.cells.items() if not flops) <= 6 and not work.update


def test_views_and_lookups_touch_what_they_touch():
    table, index = torch.randn(1000, 4), torch.tensor([1, 2, 3])
    ledger, work = Ledger(), Work()
    with ledger:
        ledger.on_operation = work
        torch.empty(50).view(5, 10).t()
        assert not work.cells
        torch.nn.functional.embedding(index, table)
    assert work.cells == {("", 0, 2 * 3 * 4 * 4 + 3 * 8): 1}


@pytest.mark.slow
def test_flops_of_lora_grow_with_its_rank_by_the_hand_count(folder):
    rows, tokens = 2, 24

    def flops(rank):
        return plan({"model": str(folder), "adapter": {"method": "lora", "r": rank, "target_modules": "all-linear"},
                     "data": {"train": "x.jsonl", "max_length": tokens}, "train": {"batch_size": rows, "precision": "fp32"}},
                    use_data=False, estimate_time=False)

    few, many = flops(2), flops(5)
    h, kv, ffn = tiny.HIDDEN, tiny.HIDDEN * tiny.KV_HEADS // tiny.HEADS, tiny.FFN
    sites = [(h, h), (h, kv), (h, kv), (h, h), (h, ffn), (h, ffn), (ffn, h)]  # (in, out) of a block
    # forward A x and B (A x); backward of B, of A x, of A, of x; nothing asks for the gradient of the embeddings (q, k, v of block 0)
    one = sum(6 * (i + o) for i, o in sites) * tiny.LAYERS - 2 * sum(i for i, _ in sites[:3])
    assert many.flops - few.flops == 3 * one * rows * tokens
    values = tiny.LAYERS * sum(i + o for i, o in sites)
    assert few.saved_bytes == 4 * 2 * values and few.trained == 2 * values
    assert sum(flops * n for _, flops, _, n in few.work) == few.flops and "work" not in few.to_json()


@pytest.mark.slow
def test_bytes_of_every_artifact_are_planned(folder):
    models, checked = {}, []
    for info in registry.methods("adapter"):
        kept = "dense" if info.traits["owns_leaf"] is None else "int4"
        recipe = load_recipe({"model": str(folder), "storage": kept, "adapter": info.name, "initializer": None, "data": "x.jsonl",
                              "train": {"precision": "fp32"}}, check=False)
        if kept not in models:
            models[kept] = build_model(recipe)[0]
        try:
            graft = attach(models[kept], recipe.adapter, name="real")
        except GraftworkError:  # asks for another storage
            continue
        stored = sum(t.numel() * t.itemsize for t in graft_tensors(graft).values())
        graft.detach()
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = build_model(recipe, fake=True)[0]
            planned = simulate._saved_bytes(fake, [attach(fake, recipe.adapter, name="fake")])
        assert planned == stored, info.name
        checked.append(info.name)
    assert len(checked) >= 30 and {"binary_lora", "sora", "prefix", "lora"} <= set(checked)


def test_seconds_are_the_roofline_of_each_operation():
    line = Roofline("r", {"float32": 100.0, "bfloat16": 400.0}, 10.0, 0.5, True, "")
    work = [["float32", 1000, 20, 2], ["bfloat16", 400, 200, 1], ["int8", 100, 0, 1], ["", 0, 30, 4]]
    assert line.seconds(work) == pytest.approx(2 * 10.5 + 20.5 + 1.5 + 4 * 3.5)


def test_the_roofline_is_measured_once_for_each_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path))
    calls, real = [], roofline.measure
    monkeypatch.setattr(roofline, "measure", lambda device: calls.append(device) or real(device, size=64, numbers=2**12))
    first = roofline.here("cpu")
    assert first.measured and first.rates["float32"] > 0 and first.bandwidth > 0 and first.overhead > 0
    assert roofline.here("cpu") == first and calls == ["cpu"]
    monkeypatch.setattr(roofline, "machine_key", lambda device: ["another", device, "name"])
    roofline.here("cpu")
    assert calls == ["cpu", "cpu"]


def test_cards_are_published_and_say_so():
    for name, known in roofline.published()["cards"].items():
        made = roofline.card(name)
        assert not made.measured and "published" in made.basis and made.memory == known["memory_gb"] * 10**9
        assert made.rates["bfloat16"] == pytest.approx(known["tflops"]["bfloat16"] * 1e12 * roofline.published()["shares"]["flops"])
    assert roofline.card(roofline.smallest_card(24 * 2**30)).memory == 24 * 10**9
    assert roofline.card(roofline.smallest_card(60 * 2**30)).memory == 80 * 10**9
    with pytest.raises(UsageError, match="did you mean 'h100'"):
        roofline.card("h10")


# -- evidence ----------------------------------------------------------------------------------------------------------
def made_up():
    rows = [("adapter", "lora", "lm", 0.0, 0.0, 0.0, 1e-2), ("adapter", "vera", "lm", 0.05, 0.01, 0.09, 1e-1),
            ("adapter", "vera", "lm2", 0.02, -0.01, 0.05, 1e-3), ("adapter", "lora", "lm2", 0.0, 0.0, 0.0, 1e-3),
            ("adapter", "dora", "enc", -0.3, -0.4, -0.2, 1e-2), ("adapter", "bat", "enc", 0.3, 0.1, 0.4, 1e-2),
            ("optimizer", "lion", "scratch", -0.2, -0.3, -0.1, 1e-4)]
    table = [{"axis": a, "method": m, "task": t, "section": {}, "relative": r, "low": low, "high": h, "rate": rate}
             for a, m, t, r, low, h, rate in rows]
    table.append({"axis": "adapter", "method": "miss", "task": "lm", "section": {}, "relative": None, "rate": 1e-3})
    tasks = {"lm": ("causal_lm", "adapter"), "lm2": ("causal_lm", "adapter"), "enc": ("sequence_classification", "adapter"),
             "scratch": ("causal_lm", "scratch")}
    return Evidence({"baselines": {"adapter": "lora", "optimizer": "adamw", "storage": "dense", "estimator": "adamw", "selection": "adamw"},
                     "tasks": {n: {"kind": k, "trains": t, "what": n} for n, (k, t) in tasks.items()}, "rows": table})


def test_methods_are_judged_by_what_was_measured():
    kind, table = ("causal_lm", "adapter"), made_up()
    assert (table.judge("adapter", "lora", kind).doubt, table.judge("adapter", "lora", kind).gap) == (0, 0.0)
    vera = table.judge("adapter", "vera", kind)
    assert vera.doubt == 0 and vera.gap == pytest.approx(0.05 / 2) and "+5.0% loss on lm, no different on lm2" in vera.text
    dora, bat = table.judge("adapter", "dora", kind), table.judge("adapter", "bat", kind)
    assert (dora.doubt, dora.gap) == (1, 0.0) and (bat.doubt, bat.gap) == (1, 0.3) and "measured elsewhere" in bat.text
    assert table.judge("adapter", "dora", ("sequence_classification", "adapter")).gap == -0.3
    assert table.judge("adapter", "miss", kind).gap == FAILED and table.judge("optimizer", "lion", kind).gap == 0.0
    unknown = table.judge("adapter", "oft", kind)
    assert unknown.doubt == 2 and "no measurement" in unknown.text
    assert table.rate("adapter", "vera", kind) == pytest.approx((10 * 1) ** 0.5) and table.rate("adapter", "oft", kind) == 1.0


def test_the_packaged_table_is_of_methods_that_exist():
    table = packaged()
    for (axis, method), rows in table.rows.items():
        info = registry.lookup(axis, method)
        for row in rows:
            assert row["task"] in table.tasks and set(row["section"]) <= set(info.config.model_fields)
            assert gap_of(row) == 0 or row["relative"] is None or row["low"] <= row["relative"] <= row["high"]
    assert table.judge("adapter", "lora", ("causal_lm", "adapter")).doubt == 0
    # docs/choosing.md: vera is behind on both tasks of the language model, and ahead on both of the encoder
    assert table.judge("adapter", "vera", ("causal_lm", "adapter")).gap > 0 > table.judge(
        "adapter", "vera", ("sequence_classification", "adapter")).gap


# -- Pareto ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(5))
def test_the_front_is_that_of_brute_force(seed):
    draw = random.Random(seed)
    points = [(draw.randint(0, 4), draw.randint(0, 4), (draw.randint(0, 2), draw.randint(0, 2)), draw.randint(0, 2)) for _ in range(120)]
    expected = []
    for i, p in enumerate(points):
        beaten = any(all(x <= y for x, y in zip(q, p)) and (q != p or j < i) for j, q in enumerate(points) if j != i)
        expected += [] if beaten else [p]
    assert pareto.front(points, lambda p: p) == expected
    assert 0 < len(expected) < len(points)


def test_picks_take_turns_and_spread():
    items = [(g, i) for g in "ab" for i in range(3)]
    chosen = pareto.pick(items, [lambda x: x[1], lambda x: -x[1]], lambda x: x[0], 4)
    assert chosen == [("a", 0), ("b", 2), ("b", 0), ("a", 2)]  # lowest; highest of the other group; lowest; highest of the one taken less
    assert pareto.pick(items, [lambda x: x[1]], lambda x: x[0], 99) != [] and len(pareto.pick(items, [lambda x: 0], lambda x: 0, 99)) == 6


# -- the search --------------------------------------------------------------------------------------------------------
CALLS: list[dict] = []


def by_formula(document, device):
    """A plan without a simulation: memory laws of the kind that a step has."""
    CALLS.append(document)
    train, adapter = document["train"], document["adapter"]
    size = {"bf16": 2, "fp32": 4}[train["precision"]]
    values = 100 * MIB if adapter is None else {"vera": MIB // 8, "paca": MIB, "lora": MIB}[adapter["method"]]
    weights = 100 * MIB * (0.5 if document["storage"]["method"] == "nf4" else size)
    state = values * {"adamw": 8, "lion": 4}[document["optimizer"]["method"]] if document["optimizer"] else 0
    rows = train["batch_size"] * 10 * MIB * size * (0.8 if adapter and adapter["method"] == "paca" else 1)
    activations = rows / 4 if train["gradient_checkpointing"] else rows
    total = int(weights + 4 * values + state + activations)
    steps = 3 if train["gradient_checkpointing"] else 2
    return {"peak_bytes": total, "categories": {"activations": int(activations), "logits": 0, "other": 0}, "trained": values,
            "device": expected_device_bytes(total, device), "flops": steps * 10**9, "saved_bytes": 4 * values,
            "work": [["float32", steps * 10**9, 0, 1]] + [["", 0, 10**9 // 4, train["grad_accumulation"]]], "batch": {}, "notes": []}


AMONG = {"adapter": ["lora", "vera", "paca", "full"], "optimizer": ["adamw", "lion"], "storage": ["dense", "nf4"],
         "estimator": ["backprop"]}


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """The config of a Llama whose blocks hold 101M values, without weights."""
    path = tmp_path_factory.mktemp("advise") / "large.json"
    tiny.llama_config(gqa=False, hidden_size=1024, intermediate_size=2752, num_hidden_layers=8, num_attention_heads=8,
                      num_key_value_heads=8, architectures=["LlamaForCausalLM"]).to_json_file(path, use_diff=False)
    return str(path)


@cache
def found_for(folder, wishes, budget, plans=40):
    recipe = load_recipe({"model": folder, "data": {"train": "x.jsonl", "max_length": 32},
                          "train": {"batch_size": 4, "precision": "fp32", "max_steps": 5}})
    return search.advise(recipe, budget=budget, device="cpu", roofline=FLAT, wishes=list(wishes), among=AMONG, plans=plans,
                         evidence=made_up(), planner=by_formula)


def test_budgets_are_respected_and_rows_beat_each_other_nowhere(large):
    everything = found_for(large, ("quality",), 10**10)
    for budget in (10**10, 900 * MIB, 680 * MIB):
        found = found_for(large, ("quality",), budget)
        assert found.rows and all(row.total <= budget and row.reason for row in found.rows)
        assert budget == 10**10 or any(row.total > budget for row in everything.rows)
        vectors = [row.vector() for row in found.rows]
        assert not any(pareto.dominates(a, b) for a in vectors for b in vectors)
        for row in found.rows:  # the rows that a step learns from and the data stay
            train = load_recipe(row.document).train
            assert train.batch_size * train.grad_accumulation == 4 and row.document["data"]["max_length"] == 32
    nothing = found_for(large, ("quality",), 540 * MIB)
    assert not nothing.rows and nothing.planned
    assert nothing.smallest.total == min(row.total for row in nothing.planned) > 540 * MIB


def test_what_matters_decides_the_order(large):
    quality, small, quick = (found_for(str(large), (wish,), 10**10).rows for wish in ("quality", "file-size", "speed"))
    assert quality[0].candidate.names()["adapter"] == "lora" and quality[0].quality.key == min(r.quality.key for r in quality)
    assert small[0].candidate.names()["adapter"] == "vera" and small[0].saved == min(r.saved for r in small)
    assert quick[0].seconds == min(r.seconds for r in quick)
    both = found_for(str(large), ("mergeable", "file-size"), 10**10).rows
    merging = [r.saved for r in both if r.vector()[4] == both[0].vector()[4]]
    assert merging == sorted(merging) and both[0].vector()[4] == min(r.vector()[4] for r in both)
    with pytest.raises(UsageError, match="did you mean 'quality'"):
        found_for(str(large), ("qualty",), 10**10)


def test_unmeasured_comes_after_measured(large):
    rows = found_for(str(large), ("quality",), 10**10).rows
    assert [r.quality.doubt for r in rows] == sorted(r.quality.doubt for r in rows)
    assert all("no measurement" in r.quality.text for r in rows if r.quality.doubt >= 2)


def test_rates_of_recipes_follow_the_benchmarks(large):
    rows = {r.candidate.names().get("adapter", "full"): r for r in found_for(str(large), ("file-size",), 10**10).rows
            if r.candidate.names()["optimizer"] == "adamw"}
    assert rows["vera"].document["optimizer"]["lr"] == pytest.approx(1e-3 * 10**0.5, rel=0.02)


def test_fleets_and_saved_adapters_are_refused(folder):
    recipe = load_recipe({"model": str(folder), "data": {"train": "customers/*.jsonl", "max_length": 32}})
    with pytest.raises(UsageError, match="fleet"):
        search.advise(recipe, budget=None, device="cpu", roofline=FLAT)


def test_a_plan_is_made_once(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path))
    calls = []
    monkeypatch.setattr(search, "plan", lambda recipe, **_: calls.append(1) or plan(recipe, use_data=False, estimate_time=False))
    document = {"model": str(folder), "data": {"train": "x.jsonl", "max_length": 16}, "train": {"batch_size": 1}, "output_dir": "a"}
    first = search.planned(document, "cpu")
    assert search.planned({**document, "output_dir": "b"}, "cpu") == json.loads(json.dumps(first)) and len(calls) == 1
    assert search.planned({**document, "adapter": "lora_ggpo"} | {"storage": "nf4", "adapter": None}, "cpu")["refused"]


def test_reasons_name_what_a_row_is_best_at(large):
    rows = found_for(str(large), ("quality",), 10**10).rows
    reasons(rows)
    least, quickest = min(rows, key=lambda r: r.total), min(rows, key=lambda r: r.seconds)
    assert "least memory" in least.reason and "quickest step" in quickest.reason


# -- the verb ----------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_the_verb_writes_recipes_that_plan_as_it_said(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "recipes"
    arguments = ("plan", "train.batch_size=2", "--advise", "--model", folder, "--length", 32, "--budget", "2GiB", "--device", "cpu",
                 "--plans", 2, "--among", "adapter=lora,vera", "--among", "storage=dense", "--among", "optimizer=adamw",
                 "--among", "estimator=backprop", "--for", "file-size,quality")
    code, text, err = graft(capsys, *arguments, "-o", out, "--json")
    made = json.loads(text)
    assert code == 0 and "[1/2]" in err and made["written"] == sorted(map(str, out.iterdir())) and made["rows"]
    assert made["rows"][0]["adapter"] == "vera" and made["rows"][0]["mergeable"] == "yes"
    for path, row in zip(made["written"], made["rows"]):
        assert plan(load_recipe(path), use_data=False, estimate_time=False, device="cpu").peak_bytes == row["peak_bytes"]
    monkeypatch.setattr(search, "plan", None)  # all from the cache
    code, text, _ = graft(capsys, *arguments)
    assert code == 0 and "why:" in text and "written" not in text
    assert graft(capsys, *arguments, "-o", out)[0] == 2  # never over other files
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({"model": str(folder), "data": {"train": "x.jsonl"}}))
    for wrong in (("plan",), ("plan", "--advise"), ("plan", path, "--for", "speed"), ("plan", path, "--advise", "--among", "color=red"),
                  ("plan", path, "--advise", "--gpu", "tpu"), ("plan", path, "--advise", "--gpu", "l4", "--device", "cpu")):
        assert graft(capsys, *wrong)[0] == 2, wrong
