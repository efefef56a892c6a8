"""The kinds of claims: each holds for what is right, and a method that is broken on purpose does not hold."""

from __future__ import annotations

import gzip
import random

import pytest
import torch

import tiny
from claims_support import made, tiny_config, verdict
from graftwork.claims.run import run_claim
from graftwork.claims.table import describe
from graftwork.errors import DataError


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_config(tmp_path_factory.mktemp("config"))


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
                                          (lambda v: 7e10 + 3e10 * (v > 1000), 18), (lambda v: 9e10, 1),
                                          (lambda v: max(7e10 + v, 5e10 + 1e6 * v), 21),
                                          (lambda v: max(3e10 + 2e5 * v, 2e10 + 3e7 * v), 9)])
def test_the_largest_that_fits(curve, plans, tmp_path, monkeypatch):
    """By a line, a parabola, a cliff, what never fits, and two plains before a slope, in place of plans."""
    seen = []
    monkeypatch.setattr("graftwork.claims.kinds.memory_true_scale.simulate", lambda recipe: (
        seen.append(recipe["data"]["max_length"]) or {"device": curve(recipe["data"]["max_length"])}))
    arms = {"base": {"largest": {"of": "data.max_length", "within": "80 GB", "step": 8}}}
    found = run_claim(made("memory_true_scale", "base.largest >= 0", arms), tmp_path)["figures"]["base"]["largest"]
    assert found == next((v for v in range(80_000, 0, -8) if curve(v) <= 80e9), 0) and len(seen) <= plans
    assert max(seen) <= 80_000


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
    cells = {p.name for p in (tmp_path / "good" / "cells" / "trained" / "shakespeare").glob("*")}
    assert len(cells) == (1 + 1) + (3 + 1)  # of each arm the rates with seed 0, and the other seed at the best
    with monkeypatch.context() as never:
        never.setattr("graftwork.training.run.train_recipe", None)
        assert verdict(claim, tmp_path / "good") == "holds at this scale"  # from the cells
    frozen = {**lora, "rates": [0.0]}
    still = made("quality_scaled", "lora.loss < base.loss", {"base": frozen, "lora": frozen}, check=LEARNS)
    assert verdict(still, tmp_path / "rate 0") == "does not hold here"
    wild = made("quality_scaled", "lora.loss < base.loss", {"base": frozen, "lora": {**lora, "rates": [1e30]}}, check=LEARNS)
    diverged = run_claim(wild, tmp_path / "wild")
    assert diverged["verdict"] == "does not hold here" and "no number" in describe(diverged)
    from graftwork.adapters.lora import LoRAAdapter

    own = LoRAAdapter.factors
    monkeypatch.setattr(LoRAAdapter, "factors", lambda self, base=None: tuple(0 * f for f in own(self, base)))
    quick = run_claim(claim, tmp_path / "discarded", quick=True)
    assert quick["verdict"] == "does not hold here" and quick["quick"] and (tmp_path / "discarded" / "made.quick.json").exists()


def test_runs_are_shared_by_claims_and_by_search_and_finals(tmp_path, monkeypatch):
    """With runs that only say their loss: (rate, seed, whether test rows were scored) of every one that is made."""
    from graftwork.claims.kinds import quality_scaled

    ran, losses = [], {1e-3: 2.0, 3e-3: 1.0, 1e-2: 3.0, 3e-2: 0.5, 1e-1: float("nan")}

    def run(self, models, wanted=None):
        mean = losses[self.rate] + (self.sections["adapter"]["r"] == 8)
        asked = wanted is None or wanted(mean)
        ran.append((self.sections["adapter"]["r"], self.rate, self.seed, asked))
        return {"rate": self.rate, "seed": self.seed, "validation": None if wanted is None else mean, "trained": 1, "file": 1, "curve": [],
                "rows": [mean + 0.01 * self.seed + 0.001 * i for i in range(8)] if asked else None}

    monkeypatch.setattr(quality_scaled.Cell, "run", run)
    monkeypatch.setattr(quality_scaled, "data_files", lambda *sizes: dict.fromkeys(("train", "validation", "test"), "x/data/f"))

    def claim(**arms):
        arms = {name: {"adapter": {"method": "lora", "r": r}, "rates": rates} for name, (r, rates) in arms.items()}
        return made("quality_scaled", "own.loss < base.loss", arms, check={**LEARNS, "tasks": ["shakespeare"]})

    three = [1e-3, 3e-3, 1e-2]
    result = run_claim(claim(base=(8, three), own=(4, three)), tmp_path)
    search = [(3e-3, 0, True), (1e-3, 0, False), (1e-2, 0, False), (3e-3, 1, True)]  # the middle first; only the best needs test rows
    assert ran == [(8, *each) for each in search] + [(4, *each) for each in search]
    assert result["figures"]["own"]["loss"]["by_seed"] == pytest.approx([1.0035, 1.0135]) and result["figures"]["own"]["rate"] == 3e-3
    ran.clear()
    run_claim(claim(base=(8, [3e-3, 1e-2, 3e-2]), own=(4, three)), tmp_path)  # one rate is new, and one was not the best before
    assert ran == [(8, 1e-2, 0, True), (8, 3e-2, 0, True), (8, 3e-2, 1, True)]
    ran.clear()
    found = run_claim(claim(base=(8, [1e-1, 1e-1, 1e-1]), own=(4, [1e-3, 1e-1, 1e-2])), tmp_path)  # what is no number is never the best
    assert "no number" in found["verdict"] and (4, 1e-3, 1, True) in ran and not any(rate == 1e-1 and asked and seed == 0
                                                                                  for _, rate, seed, asked in ran)


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
