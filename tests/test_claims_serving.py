"""Claims that serve something: true as the engine is, and `does not hold here` with a batch, a policy or a cache that is wrong."""

from __future__ import annotations

import pytest
import torch

from graftwork.claims.claim import Claim, find
from graftwork.claims.run import run_claim
from graftwork.serving.engine.adapters import Attached
from graftwork.serving.engine.policies import Fair
from graftwork.serving.engine.prefixes import Prefixes

pytestmark = pytest.mark.slow


def small(name: str, measure=None, **check) -> Claim:
    """A claim with fewer seeds, and another measurement where one is given."""
    claim = find(name)
    fields = claim.fields.model_copy(update={"check": {**claim.check, "seeds": 1, **check}})
    return Claim(claim.name, claim.group, fields, measure or claim.measure)


def test_a_batch_that_takes_the_wrong_adapter(tmp_path, monkeypatch):
    mixed = find("batch_exact").measure.__globals__["mixed"]
    kinds = [("lora", {"r": 2}), ("lora", {"r": 8})]
    claim = small("batch_exact", lambda seed, quick: mixed(seed, kinds, rows=4))
    assert run_claim(claim, tmp_path / "good")["verdict"] == "holds"
    own = Attached.load
    monkeypatch.setattr(Attached, "load", lambda self, digest, place: ("a0", own(self, digest, place)[1]))
    assert run_claim(claim, tmp_path / "broken")["verdict"] == "does not hold here"


def test_a_fair_queue_that_counts_nothing(tmp_path, monkeypatch):
    claim = small("vtc_fair")
    good = run_claim(claim, tmp_path / "good")
    assert good["verdict"] == "holds" and 0 < good["figures"]["fair"]["gap"] < good["figures"]["fcfs"]["gap"]
    monkeypatch.setattr(Fair, "_charge", lambda self, tenant, cost: None)
    assert run_claim(claim, tmp_path / "broken")["verdict"] == "does not hold here"


def test_a_shared_prefix_of_another_adapter(tmp_path, monkeypatch):
    """A cache that forgets whose pages they are gives other answers. Rates are given: no test depends on the clock."""
    from graftwork.claims import serving_runs as serving

    def measure(seed, quick):
        model, tokenizer = serving.base(quick=True)
        start = serving.prompts(model, [64], 5)[0]
        ids = [[*start, *own] for own in serving.prompts(model, [4] * 6, seed)]
        answers = {}
        for arm in ("none", "cached"):
            own = serving.with_grafts(model, 2, r=8, target_modules=["q_proj", "v_proj"])
            for graft in own.graft_state.grafts.values():
                serving.fill(graft, 7 if graft.name == "a0" else 8, 0.3)
            run = serving.Run(own, tokenizer, ids, ["a0", "a1"] * 3, 6, running=1, prefix_cache=arm == "cached").finish()
            answers[arm] = [r.output for r in run.requests]
        different = sum(a != b for a, b in zip(answers["none"], answers["cached"]))
        return {"none": {"rate": 1.0}, "cached": {"rate": 2.0, "different": different}}

    claim = small("prefix_reuse", measure)
    assert run_claim(claim, tmp_path / "good")["verdict"] == "holds at this scale"
    own = Prefixes.keys
    monkeypatch.setattr(Prefixes, "keys", lambda self, digest, *rest, **more: own(self, "", *rest, **more))
    assert run_claim(claim, tmp_path / "broken")["verdict"] == "does not hold here"


def test_a_mask_that_is_not_the_rows_own(tmp_path, monkeypatch):
    from graftwork.adapters import flora

    claim = small("flora_examples")
    assert run_claim(claim, tmp_path / "good")["verdict"] == "holds"
    own = flora.gather
    monkeypatch.setattr(flora, "gather", lambda z, A, bias=None: own(z, A if A.dim() < 3 or A.shape[1] == 1 else A.roll(1, 1), bias))
    assert run_claim(claim, tmp_path / "broken")["verdict"] == "does not hold here"


def test_the_shared_direction_of_two_caches():
    """By the formula of spherical interpolation."""
    shared = find("minicache_layers").measure.__globals__["shared"]
    a, b = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    unit_a, unit_b = a / a.norm(dim=-1, keepdim=True), b / b.norm(dim=-1, keepdim=True)
    angle = torch.arccos((unit_a * unit_b).sum(-1, keepdim=True))
    expected = (torch.sin(0.4 * angle) * unit_a + torch.sin(0.6 * angle) * unit_b) / torch.sin(angle)
    low, high, cosine = shared(a, b)
    far = angle[:, 0].argmax()
    assert torch.equal(low[far], a[far]) and torch.equal(high[far], b[far])  # the farthest token is kept apart
    near = torch.arange(len(a)) != far
    assert torch.allclose(low[near], (expected * a.norm(dim=-1, keepdim=True))[near]) and torch.allclose(cosine, torch.cos(angle[..., 0]))
    assert torch.allclose(high[near], (expected * b.norm(dim=-1, keepdim=True))[near])
    assert torch.equal(shared(a, b, gamma=1.0)[0], a) and torch.allclose(shared(a, a)[1], a, atol=1e-5)
