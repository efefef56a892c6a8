"""`graft claims`: bars and intervals against closed forms, resuming, and in each kind a broken method that must not hold."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

import tiny
from graftwork.claims.cells import Cells
from graftwork.claims.claim import Claim, Fields, claims, find, read
from graftwork.claims.expressions import judge
from graftwork.claims.kinds import kind_of, kinds
from graftwork.claims.kinds.base import merged
from graftwork.claims.run import run_claim
from graftwork.claims.samples import Samples, compare
from graftwork.claims.table import page, results
from graftwork.claims.training import Cell
from graftwork.errors import DataError, UsageError
from graftwork.recipe import load_recipe

BASIC = {"system": "X", "statement": "smaller", "source": "arXiv 0000.00000", "setting": "tiny", "refuted_by": "larger", "minutes": 1}


def made(kind, holds, arms, *, check=None, baseline="base", common=None, measure=None, **more) -> Claim:
    fields = {**BASIC, "kind": kind, "holds": holds, "arms": arms, "check": check or {}, "common": common or {},
              "baseline": baseline if arms else None, **more}
    return Claim("made", "tests", Fields(**fields), measure)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    tiny.llama_config(tied=False).save_pretrained(folder)
    return str(folder / "config.json")


def verdict(claim, folder, **options):
    return run_claim(claim, folder, **options)["verdict"]


# -- the language of bars -----------------------------------------------------------------------------------------------------
def test_bars():
    figures = {"a": {"x": 3.0, "y": 2.0}, "b": {"x": 4 * 2**30}}
    met, evidence = judge("a.x - 1 <= a.y and (b.x > 5 GiB or b.x >= 4 * GiB)".replace("5 GiB", "5 * GiB"), figures)
    assert met and [e.met for e in evidence] == [True, False, True] and evidence[0].left == evidence[0].right == 2
    assert judge("max(a.x, a.y) == abs(-3)", figures)[0] and judge("1 < a.y < a.x", figures)[0] and not judge("1 < a.x < a.y", figures)[0]
    for wrong, hint in (("a.z < 1", "x, y"), ("c.x < 1", "a, b"), ("a.x", "compares nothing"), ("a.x <", "no comparison"),
                        ("__import__('os').name < 1", "no meaning"), ("a.x != 1", "knows")):
        with pytest.raises(UsageError, match=hint):
            judge(wrong, figures)


def test_intervals_and_ties():
    values = np.random.default_rng(0).normal(1.0, 0.3, (7, 1))
    low, high = Samples(values).interval()
    expected = stats.t.interval(0.95, 6, loc=values.mean(), scale=stats.sem(values[:, 0]))
    assert np.allclose((low, high), expected)
    rows = np.random.default_rng(1).normal(0, 1, (1, 400))
    low, high = Samples(rows).interval()  # of one seed: an ordinary bootstrap over rows, as scipy's
    other = stats.bootstrap((rows[0],), np.mean, method="percentile", n_resamples=2000, random_state=0).confidence_interval
    assert abs(low - other.low) < 0.02 and abs(high - other.high) < 0.02
    same, better = Samples([[1.0, 2, 3], [2, 3, 4]]), Samples([[0.8, 1.8, 2.7], [1.9, 2.8, 3.8]])
    assert not compare(same, "<", same)[0] and compare(same, "<=", same)[0] and compare(better, "<", same)[0]
    assert compare(better, "<", 0.99 * same)[0] and not compare(same, "<=", better)[0]
    assert not compare(Samples([[float("nan"), 1.0]]), "<=", Samples([[2.0, 3.0]]))[0]
    assert Samples([[1.0], [3.0]]).to_json() == {"mean": 2.0, "interval": Samples([[1.0], [3.0]]).interval(), "by_seed": [1, 3], "rows": 1}


def test_cells_are_kept_until_what_they_are_made_from_changes(tmp_path):
    calls, cells = [], Cells(tmp_path)
    for of in (1, 1, 2):
        cells.get("a/b", of, lambda of=of: calls.append(of) or of)
    assert calls == [1, 2]
    (tmp_path / "a" / "b.json").write_text("{half")
    assert cells.get("a/b", 2, lambda: 7) == 7
    with pytest.raises(UsageError):
        cells.get("../b", 1, lambda: 1)


# -- files --------------------------------------------------------------------------------------------------------------------
def test_every_claim_is_whole():
    for claim in claims().values():
        kind_of(claim.kind)(claim, False)
        assert claim.group != "rows" and claim.name.isidentifier() and len(claim.setting) > 10
    assert len(kinds()) == 8
    firsts = [c.first for c in claims().values() if c.first]
    assert set(firsts) <= set(range(1, 16))


@pytest.mark.full
def test_every_arm_is_a_recipe():
    """Names, options and the rules of combination; where an arm's learning rate goes."""
    models = {"scratch": "config:gpt2", "tiny": "config:gpt2"}
    for claim in claims().values():
        for name, arm in claim.arms.items():
            sections = merged(claim.common, {k: v for k, v in arm.items() if k not in ("rates", "largest")})
            base = claim.check.get("base", "smollm2-135m-instruct")
            tasks = claim.check.get("tasks")
            document = {"model": models.get(base, base), "train": {"precision": "fp32"}, "data": {"train": "rows.jsonl", "format": "text"}}
            if tasks:
                assert len(arm.get("rates", [1, 2, 3])) == 3, f"{claim.name}, {name}: both sides try three rates"
                cell = Cell(tasks[0], base, sections, 1e-3, 0, {"train": "rows.jsonl"}, "test", 1, 1, 8, 0, "cosine", 48, 1, None)
                document = {**cell.recipe(Path("models"), "run", model=document["model"]), "output_dir": None}
            recipe = load_recipe(merged(document, {} if tasks else sections))
            assert not tasks or (recipe.optimizer or recipe.estimator).lr == 1e-3


def test_files_of_ones_own_and_their_errors(tmp_path, config):
    text = json.dumps({**BASIC, "kind": "parameter_count", "baseline": "a", "arms": {"a": {"model": config}}, "holds": "a.trained > 1"})
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert find(str(path)).name == "mine"
    for old, new, hint in (('"holds": "a.t', '"holds": "b.t', "speaks of b"), ('"minutes": 1', '"minuts": 1', "minuts"),
                           ("parameter_count", "parameters", "no kind"), ('"baseline": "a"', '"baseline": "b"', "is no arm")):
        path.write_text(text.replace(old, new))
        with pytest.raises(UsageError, match=hint):
            read(path)
    with pytest.raises(UsageError, match="galore_state"):
        find("galore_stat")


# -- memory -------------------------------------------------------------------------------------------------------------------
GALORE = {"base": {"optimizer": {"method": "adamw"}}, "galore": {"optimizer": {"method": "galore", "rank": 4}}}


@pytest.mark.slow
def test_memory_at_true_scale_and_an_optimizer_with_a_hidden_state(config, tmp_path, monkeypatch):
    claim = made("memory_true_scale", "galore.optimizer_state <= 0.75 * base.optimizer_state", GALORE,
                 common={"model": config, "adapter": None, "data": {"max_length": 16}})
    result = run_claim(claim, tmp_path / "good")
    assert result["verdict"] == "holds" and result["figures"]["base"]["trained"] == result["figures"]["galore"]["trained"]
    # AdamW: two fp32 moments a weight, and a counter a tensor
    assert 0 <= result["figures"]["base"]["optimizer_state"] - 8 * result["figures"]["base"]["trained"] <= 4 * 40
    (tmp_path / "good" / "made.json").unlink()
    monkeypatch.setattr("graftwork.claims.kinds.memory_true_scale.simulate", None)  # a second run plans nothing
    assert verdict(claim, tmp_path / "good") == "holds"
    monkeypatch.undo()
    from graftwork.optim.galore import GaLoreOptimizer

    own = GaLoreOptimizer.slots.__func__
    monkeypatch.setattr(GaLoreOptimizer, "slots", classmethod(lambda cls, config, shape, dtype, role: {
        **own(cls, config, shape, dtype, role), "hidden": (shape, torch.float32)}))
    assert verdict(claim, tmp_path / "broken") == "does not hold here"


@pytest.mark.parametrize("curve, plans", [(lambda v: 10e9 + 3e6 * v, 4), (lambda v: 10e9 + 1e6 * v + 50 * v * v, 24),
                                          (lambda v: 7e10 + 3e10 * (v > 1000), 18), (lambda v: 9e10, 1)])
def test_the_largest_that_fits(curve, plans, tmp_path, monkeypatch):
    """By a line, a parabola, a cliff and what never fits, in place of plans."""
    seen = []
    monkeypatch.setattr("graftwork.claims.kinds.memory_true_scale.simulate", lambda recipe: (
        seen.append(recipe["data"]["max_length"]) or {"device": curve(recipe["data"]["max_length"])}))
    arms = {"base": {"largest": {"of": "data.max_length", "within": "80 GB", "step": 8}}}
    found = run_claim(made("memory_true_scale", "base.largest >= 0", arms), tmp_path)["figures"]["base"]["largest"]
    assert found == next((v for v in range(80_000, 0, -8) if curve(v) <= 80e9), 0) and len(seen) <= plans


@pytest.mark.slow
def test_memory_of_real_steps_and_an_adapter_that_keeps_more_than_it_says(tmp_path, monkeypatch):
    claim = made("memory_small", "paca.saved < 0.9 * base.saved and paca.peak < base.peak", {
        "base": {"adapter": {"method": "lora", "r": 4, "target_modules": "all-linear"}},
        "paca": {"adapter": {"method": "paca", "r": 8, "target_modules": "all-linear"}}},
        check={"width": 48, "blocks": 2, "rows": 2, "length": 32})
    assert verdict(claim, tmp_path / "good") == "holds at this scale"
    from graftwork.adapters.paca import PaCAAdapter

    own = PaCAAdapter.delta
    monkeypatch.setattr(PaCAAdapter, "delta", lambda self, x, base: own(self, x, base) + 0 * (
        x.clone() * torch.ones(x.shape[-1], requires_grad=True)).sum())
    assert verdict(claim, tmp_path / "broken") == "does not hold here"


# -- counts and identities ----------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_counts_and_an_adapter_with_a_dense_change(config, tmp_path, monkeypatch):
    # hidden 64, feed-forward 96, 4 heads on 2: a block's seven maps
    shapes = [(64, 64), (32, 64), (32, 64), (64, 64), (96, 64), (96, 64), (64, 96)]
    lora, xs = 2 * sum(o + i for o, i in shapes), 2 * 7 * 4 * 4
    claim = made("parameter_count", f"base.trained == {lora} and xs.trained == {xs} and xs.file <= 0.5 * base.file", {
        "base": {"adapter": {"method": "lora", "r": 1}}, "xs": {"adapter": {"method": "lora_xs", "r": 4}}},
        common={"model": config, "adapter": {"target_modules": "all-linear"}, "storage": "nf4"})
    result = run_claim(claim, tmp_path / "good")
    assert result["verdict"] == "holds", result["evidence"]
    assert result["figures"]["base"]["base"] == sum(p.numel() for p in tiny.llama(tied=False).parameters())
    assert 4 < result["figures"]["base"]["bits"] < 5
    from graftwork.adapters.lora_xs import LoRAXSAdapter

    own = LoRAXSAdapter.__init__

    def dense(self, site, config, **more):
        own(self, site, config, **more)
        self.change = torch.nn.Parameter(torch.zeros(site.out_features, site.in_features))

    monkeypatch.setattr(LoRAXSAdapter, "__init__", dense)
    assert verdict(claim, tmp_path / "broken") == "does not hold here"


@pytest.mark.slow
def test_stacking_is_exact_and_a_sum_without_weights_is_not(tmp_path, monkeypatch):
    claim = find("flora_stacking")
    result = run_claim(claim, tmp_path / "good")
    assert result["verdict"] == "holds" and result["seeds"] == 3
    from graftwork.interchange import combine

    own = combine._sums
    monkeypatch.setattr(combine, "_sums", lambda grafts, weights, rank: own(grafts, [1.0 for _ in weights], rank))
    assert verdict(claim, tmp_path / "broken") == "does not hold here"


# -- quality, speed, serving ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pack")
    (folder / "lm" / "tinyshakespeare").mkdir(parents=True)
    words = random.Random(0).choices(["to be ", "or not ", "a horse ", "my kingdom "], k=1200)
    for split, part in (("train", words[:1000]), ("validation", words[1000:1100]), ("test", words[1100:])):
        with gzip.open(folder / "lm" / "tinyshakespeare" / f"{split}.txt.gz", "wt") as file:
            file.write("".join(part))
    return folder


LEARNS = {"tasks": ["shakespeare"], "base": "scratch", "steps": 8, "batch": 4, "length": 32, "train": 64, "validation": 4, "test": 8,
          "width": 48, "blocks": 1, "seeds": 2, "rates": [1e-2, 2e-2, 3e-2]}


@pytest.mark.slow
def test_quality_and_methods_that_learn_nothing(pack, tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFTWORK_DATA", str(pack))
    lora = {"adapter": {"method": "lora", "r": 4, "target_modules": "all-linear", "use_rslora": True}}
    claim = made("quality_scaled", "lora.loss < base.loss", {"base": {**lora, "rates": [0.0, 0.0]}, "lora": lora}, check=LEARNS)
    result = run_claim(claim, tmp_path / "good")
    assert result["verdict"] == "holds at this scale" and (result["seeds"], result["n"]) == (2, 8)
    cells = {p.name for p in (tmp_path / "good" / "cells" / "made").glob("*")}
    assert len(cells) == (1 + 2) + (3 + 2)  # searched rates and finals of each arm
    with monkeypatch.context() as never:
        never.setattr("graftwork.training.run.train_recipe", None)
        assert verdict(claim, tmp_path / "good") == "holds at this scale"  # from the cells
    frozen = {**lora, "rates": [0.0]}
    still = made("quality_scaled", "lora.loss < base.loss", {"base": frozen, "lora": frozen}, check=LEARNS)
    assert verdict(still, tmp_path / "rate 0") == "does not hold here"
    from graftwork.adapters.lora import LoRAAdapter

    own = LoRAAdapter.factors
    monkeypatch.setattr(LoRAAdapter, "factors", lambda self, base=None: tuple(0 * f for f in own(self, base)))
    quick = run_claim(claim, tmp_path / "discarded", quick=True)
    assert quick["verdict"] == "does not hold here" and quick["quick"] and (tmp_path / "discarded" / "made.quick.json").exists()


def test_quality_needs_the_data_pack(tmp_path, monkeypatch):
    claim = made("quality_scaled", "base.loss < 1", {"base": {}}, check=LEARNS)
    for value in (None, str(tmp_path / "nowhere")):
        monkeypatch.delenv("GRAFTWORK_DATA", raising=False) if value is None else monkeypatch.setenv("GRAFTWORK_DATA", value)
        with pytest.raises(DataError, match="GRAFTWORK_DATA"):
            run_claim(claim, tmp_path)


def test_speed_by_a_clock_of_ours(tmp_path, monkeypatch):
    """Steps that take 1 and 0.8 s by turns; then a method that is slower than it claims."""
    now = [0.0]

    class Step:
        def __init__(self, takes):
            self.takes, self.parameters = takes, []

        def run(self, batches, number):
            now[0] += self.takes * (1 + 0.01 * (number % 3))

    monkeypatch.setattr("graftwork.claims.kinds.speed_ratio.time.perf_counter", lambda: now[0])
    claim = made("speed_ratio", "fast.seconds <= 0.9 * base.seconds", {"base": {"takes": 1.0}, "fast": {"takes": 0.8}})
    for takes, expected in (({}, "holds at this scale"), ({0.8: 0.97}, "does not hold here")):
        monkeypatch.setattr("graftwork.claims.kinds.speed_ratio.real_step", lambda check, arm, folder, takes=takes: (
            Step(takes.get(arm["takes"], arm["takes"])), {}))
        assert verdict(claim, tmp_path / str(len(takes))) == expected


def test_serving_and_a_tie(tmp_path):
    def measure(better):
        return lambda seed, quick: {"base": {"rate": [5.0 + 0.1 * seed, 6.0]}, "own": {"rate": [5.0 + better + 0.1 * seed, 6.0 + better]}}

    for better, expected in ((1.0, "holds at this scale"), (0.0, "does not hold here")):
        claim = made("serving", "own.rate > base.rate", {}, measure=measure(better))
        result = run_claim(claim, tmp_path / str(better))
        assert result["verdict"] == expected and result["evidence"][0]["interval"] and result["seeds"] == 3


# -- verdicts and the table ----------------------------------------------------------------------------------------------------
def test_verdicts_and_the_table(tmp_path):
    def numbers(value):
        return lambda seed, quick: {"own": {"error": value}}

    for name, more, value, expected in (
            ("a", {}, 0.5, "holds"), ("b", {"holds_here": "own.error <= 2"}, 1.5, "holds at this scale"),
            ("c", {}, 1.5, "does not hold here"), ("d", {"headline": "no phone"}, 0.5, "not checkable here (no phone)")):
        claim = Claim(name, "tests", made("exactness", "own.error <= 1", {}, **more).fields, numbers(value))
        assert verdict(claim, tmp_path) == expected
    missed = Claim("f", "tests", made("exactness", "own.error <= 1", {}, refuted="own.error > 2").fields, numbers(1.5))
    assert verdict(missed, tmp_path) == "does not hold here"
    absent = Claim("e", "tests", Fields(**BASIC, kind="absent", headline="no cluster"))
    assert verdict(absent, tmp_path) == "not checkable here (no cluster)"
    text = page(results(tmp_path), "graft claims table")
    assert "2 x `not checkable here`" in text and "portable part: holds" in text and "`own.error <= 1` met: 0.5 against 1" in text
    assert text.count("missed, not refuted (larger)") == 1
    with pytest.raises(UsageError, match="no results"):
        results(tmp_path / "nothing")
