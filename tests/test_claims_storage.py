"""Claims about stored weights and estimators, and what breaks them: a calibration that is ignored, a gradient with a wrong sign."""

from __future__ import annotations

import gzip
import random

import pytest
import torch

from graftwork.claims import probes, storage_runs
from graftwork.claims.claim import Claim, Fields, find
from graftwork.claims.run import run_claim

pytestmark = pytest.mark.slow
BASIC = {"system": "X", "statement": "better", "source": "arXiv 0000.00000", "setting": "tiny model", "refuted_by": "worse", "minutes": 1}


class Rows:
    """What a calibration reads."""

    def __init__(self, count: int):
        self.count = count

    def batches(self):
        return ({k: v for k, v in batch.items() if k != "labels"} for batch in probes.batches(self.count, 3, rows=4, length=24))


def tiny_base(monkeypatch) -> None:
    """The base of the storage claims as a small Llama whose inputs are correlated, as those of trained models are."""

    def init(self, *args, **more):
        self.dense = probes.model(0)
        with torch.no_grad():
            basis = probes.normal(1, 6, 48)
            self.dense.get_input_embeddings().weight.copy_(probes.normal(2, probes.VOCABULARY, 6) @ basis)
        self.calibration, self.test = Rows(4), torch.cat([b["input_ids"] for b in probes.batches(4, 9, rows=4, length=24)])

    monkeypatch.setattr(storage_runs.Base, "__init__", init)


def errors(seed: int, quick: bool) -> dict:
    """Relative error of the hidden states, by row."""
    base, found = storage_runs.Base(), {}
    wanted = base.hidden(base.dense)
    for name in ("rtn", "gptq"):
        got = base.hidden(base.stored({"method": "int2", "group_size": 16, "calibration": name}))
        found[name] = {"error": ((got - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)).tolist()}
    return found


def test_a_calibration_that_is_ignored(tmp_path, monkeypatch):
    tiny_base(monkeypatch)
    fields = Fields(**BASIC, kind="quality_scaled", holds="gptq.error < rtn.error", check={"tasks": [], "seeds": 1})
    claim = Claim("made", "tests", fields, errors)
    good = run_claim(claim, tmp_path / "good")
    assert good["verdict"] == "holds at this scale" and good["n"] == 16, good["evidence"]
    from graftwork.storage.calibration.gptq import GPTQCalibration
    from graftwork.storage.calibration.rtn import RTNCalibration

    monkeypatch.setattr(GPTQCalibration, "calibrate", RTNCalibration.calibrate)
    assert run_claim(claim, tmp_path / "broken")["verdict"] == "does not hold here"
    committed = find("gptq_rtn")
    assert run_claim(committed, tmp_path / "broken", quick=True)["verdict"] == "does not hold here"  # a tie is no order


def test_planted_outliers_change_no_output():
    model = probes.model(0)
    ids = next(probes.batches(1))["input_ids"]
    with torch.no_grad():
        before = model(ids).logits
        before_largest = float(model.model.layers[0].input_layernorm.weight.max())
        storage_runs.planted(model, channels=(1, 7, 30))
        assert torch.allclose(model(ids).logits, before, atol=1e-5) and float(model.model.layers[0].input_layernorm.weight.max()) == \
            20 * before_largest


@pytest.mark.full
def test_an_estimate_with_the_wrong_sign(tmp_path, monkeypatch):
    """DeepZero on adapters of 48 numbers learns; with its slopes turned round it is worse than the model as it was."""
    folder = tmp_path / "pack" / "lm" / "tinystories"
    folder.mkdir(parents=True)
    words = random.Random(0).choices(["the fox ", "a hen ", "ran off "], k=900)
    for split, part in (("train", words[:700]), ("validation", words[700:800]), ("test", words[800:])):
        with gzip.open(folder / f"{split}.jsonl.gz", "wt") as file:
            file.write("".join(f'{{"text": "{"".join(part[i:i + 20])}"}}\n' for i in range(0, len(part), 20)))
    monkeypatch.setenv("GRAFTWORK_DATA", str(tmp_path / "pack"))
    committed = find("deepzero_coordinates")
    arms = {"start": {"optimizer": {"method": "sgd", "momentum": 0.0}, "rates": [0.0]},
            "coordinates": {**committed.arms["coordinates"], "rates": [3.0]}}
    common = {"adapter": {**committed.common["adapter"], "target_modules": ["v_proj", "o_proj", "down_proj"]}}
    check = {**committed.check, "base": "scratch", "blocks": 1, "steps": 4, "batch": 2, "length": 24, "train": 16, "validation": 4,
             "test": 8, "seeds": 1}
    claim = Claim("made", "tests", Fields(**BASIC, kind="quality_scaled", baseline="start", arms=arms, check=check, common=common,
                                          holds="coordinates.loss < start.loss"))
    assert run_claim(claim, tmp_path / "good")["verdict"] == "holds at this scale"
    from graftwork.estimators.deepzero import DeepZeroEstimator

    own = DeepZeroEstimator._slope
    monkeypatch.setattr(DeepZeroEstimator, "_slope", lambda self, *rest: -own(self, *rest))
    assert run_claim(claim, tmp_path / "broken")["verdict"] == "does not hold here"
