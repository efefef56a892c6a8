"""Plans that note how a weight is decoded against those that simulate every decoding."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

import tiny
from graftwork import registry
from graftwork.planning import decodings, simulate
from graftwork.planning.ledger import Ledger
from graftwork.planning.work import Work
from graftwork.storage.base import make_storage
from test_plan import document, planned

SIZES = dict(hidden_size=64, intermediate_size=192, num_hidden_layers=4, vocab_size=512)
CASES = {f"{info.name} lora": {"storage": info.name, "adapter": {"method": "lora", "r": 4}} for info in registry.methods("storage")}
CASES |= {f"{storage} {adapter}": {"storage": storage, "adapter": {"method": adapter, **options}} for storage, adapter, options in (
    ("nf4", "bat", {"r": 16}), ("int3", "dora", {}), ("fp8", "oft", {}), ("int4", "qa_lora", {}), ("nf4", "mos", {"r": 4}),
    ("mixed", "nola", {}), ("int8", "ia3", {}))}
CASES["nf4 mezo"] = {"storage": "nf4", "adapter": {"method": "lora", "r": 4}, "estimator": "mezo"}
CASES["int4 forward_gradient"] = {"storage": "int4", "adapter": {"method": "lora", "r": 4}, "estimator": "forward_gradient"}
#: those of every run; the rest is for `make test-all`
EVERYWHERE = ("nf4 lora", "mixed lora", "nf4 bat", "int4 forward_gradient")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tiny.llama(**SIZES), tmp_path_factory.mktemp("decodings") / "model", with_tokenizer=False)


@pytest.fixture
def replays(monkeypatch):
    """How often a ledger replayed."""
    counted, replay = [], Ledger.replay
    monkeypatch.setattr(Ledger, "replay", lambda self, course: (counted.append(course), replay(self, course)) and None)
    return counted


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in EVERYWHERE else pytest.mark.full) for n in CASES])
def test_noted_decodings_are_as_simulated_ones(folder, monkeypatch, replays, name, device):
    doc = document(folder, data={"max_length": 24}, **CASES[name])
    doc["train"] |= {"gradient_checkpointing": "estimator" not in doc, "batch_size": 2}
    few, noted = planned(doc, device=device), len(replays)
    monkeypatch.setattr(simulate, "alike", lambda *_: nullcontext())
    whole = planned(doc, device=device)
    assert len(replays) == noted and (noted > 0) == (name.split()[0] != "dense" and "forward" not in name)  # whose weights have tangents
    for figure in ("peak_bytes", "categories", "device", "trained", "flops", "work"):
        assert getattr(few, figure) == getattr(whole, figure), figure
    highest = [max(sum(of.values()) for _, _, of in made.timeline) for made in (few, whole)]
    assert highest[0] == highest[1]


@pytest.mark.parametrize("leaves", ["nothing", "a tensor", "its argument"])
def test_calls_that_leave_more_than_a_result_are_simulated(leaves, replays, monkeypatch):
    """A call that keeps a tensor, or returns one that was there."""
    kept, model = [], torch.nn.ModuleList(make_storage(torch.zeros(8, 8), "nf4", registry.make_config("storage", "nf4")) for _ in range(6))

    def forward_product(self, x):
        if leaves == "a tensor":
            kept.append(torch.empty(1000))
        return x if leaves == "its argument" else x @ torch.zeros(8, 8)

    monkeypatch.setattr(type(model[0]), "forward_product", forward_product)
    ledger, work, x = Ledger(), Work(), torch.zeros(4, 8)
    ledger.on_operation = work
    with torch.no_grad(), ledger, decodings.alike(model, ledger, work):
        got = [stored.forward_product(x) for stored in model]
    assert len(replays) == (4 if leaves == "nothing" else 0)
    assert len(kept) == (6 if leaves == "a tensor" else 0) and all(t.shape == (4, 8) for t in got)
    assert all("forward_product" not in vars(stored) for stored in model)
    assert work.flops == (0 if leaves == "its argument" else 6 * 2 * 4 * 8 * 8)
