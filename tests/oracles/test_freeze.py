"""Freezing: the sets of each stage, equality with a torch optimizer over the active ones alone, and what is held."""

import pytest
import torch

import graftwork
import tiny
from graftwork.artifact import attach_saved
from graftwork.data.collate import Collator
from graftwork.errors import UsageError
from graftwork.estimators.backprop import Backprop, BackpropEstimator
from graftwork.objectives.causal_lm import CausalLMObjective
from graftwork.selection.freeze import Freeze, FreezeSelection
from graftwork.training.step import TrainStep
from training_support import completions, folder, recipe, run

LAYERS, TOTAL = 3, 10


def batch_of(seed=0):
    ids = tiny.tokens(2, 8, seed).tolist()
    return Collator(0).collate([{"input_ids": row, "labels": [-100, -100, *row[2:]]} for row in ids])


def built(config, *, tied=True):
    model = tiny.llama(num_hidden_layers=LAYERS, tied=tied).requires_grad_(True).train()
    made = graftwork.optimizer("adamw", model, lr=1e-3, eps=1e-3)  # smooth where gradients are noise
    return TrainStep(model, CausalLMObjective(), BackpropEstimator(Backprop()), list(model.named_parameters()), (),
                     [FreezeSelection(config)], made, 0.0, (), TOTAL, 5)


#: options -> which of embeddings e, layers 0 1 2, head side h train in each of the ten steps
CASES = {
    "unfreeze": (dict(interval=2), ["2h"] * 2 + ["12h"] * 2 + ["012h"] * 2 + ["e012h"] * 4),
    "by two": (dict(interval=0.3, layers=2), ["12h"] * 3 + ["012h"] * 3 + ["e012h"] * 4),
    "freeze": (dict(gradual="freeze", interval=3), ["e012h"] * 3 + ["012h"] * 3 + ["12h"] * 3 + ["2h"]),
    "windows": (dict(gradual=None, windows={r"layers\.1\.": (0.2, 0.5), r"layers": (0, 0), "norm": (4, None), "embed": (0, 7)}),
                ["e"] * 2 + ["1e"] * 2 + ["1eh"] + ["eh"] * 2 + ["h"] * 3),
    "both": (dict(interval=4, windows={"embed": (0, 0), r"layers\.0": (0, 3)}), ["02h"] * 3 + ["2h"] + ["12h"] * 6),
}


def part_of(name):
    return name.split(".")[2] if ".layers." in name else "e" if "embed" in name else "h"


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_equals_torch_optimizers_over_what_is_active_and_holds_nothing_else(case):
    options, expected = CASES[case]
    step, other = built(Freeze(**options)), tiny.llama(num_hidden_layers=LAYERS).requires_grad_(True).train()
    reference = {}  # one torch optimizer a parameter, which lives as long as the parameter is active
    for at in range(TOTAL):
        before = {n: p.detach().clone() for n, p in step.parameters}
        step.compute([batch_of(at)], at)
        active = {n for n, _ in step.parameters if part_of(n) in expected[at]}
        assert {n for n, p in step.parameters if p.grad is not None} == active
        step.optimizer.step()
        for _, p in step.parameters:
            p.grad = None
        assert {n for n, p in step.parameters if not torch.equal(p, before[n])} == active  # all else to the last bit
        nbytes = sum(t.nbytes for state in step.optimizer.state.values() for t in state.values())
        assert nbytes == sum(step.optimizer.state_bytes(p.shape, p.dtype) for n, p in step.parameters if n in active)
        reference = {n: reference.get(n) or torch.optim.AdamW([p], lr=1e-3, eps=1e-3, weight_decay=0.0)
                     for n, p in other.named_parameters() if n in active}
        other.zero_grad()
        batch = batch_of(at)
        CausalLMObjective().loss(other, batch, 1 / batch["n_targets"]).loss.backward()
        for optimizer in reference.values():
            optimizer.step()
    for (_, p), q in zip(step.parameters, other.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_the_head_is_with_the_embeddings_when_tied_and_on_top_when_not():
    for tied in (True, False):
        step = built(Freeze(interval=2), tied=tied)
        step.selections[0].begin(step.context(0))
        active = step.selections[0].active(0)
        assert ({n for n, p in step.parameters if id(p) in active and ".layers." not in n}
                == {"model.norm.weight"} | (set() if tied else {"lm_head.weight"}))


@pytest.mark.parametrize("options, match", [
    (dict(gradual=None, windows={"layers": (0, 0), "embed": (0, 0), "norm": (2, None)}), "nothing to train in step 1"),
    (dict(gradual=None, windows={"": (0, 0.5)}), "nothing to train in step 6"),
    (dict(windows={"lay0r": (0, 0)}), "no trained parameter has 'lay0r'"), (dict(windows={"norm": (0.5, 0.2)}), "before it starts")])
def test_schedules_that_cannot_be_meant_are_refused(options, match):
    with pytest.raises(UsageError, match=match) as caught:
        built(Freeze(**options)).compute([batch_of()], 0)
    assert caught.value.remedy


@pytest.mark.parametrize("options, match", [
    (dict(gradual=None), "nothing would ever be frozen"), (dict(gradual=None, windows={"a": (0, 1)}, interval=3), "interval"),
    (dict(windows={"(": (0, 1)}), "no regular expression"), (dict(windows={"a": (-1, 1)}), "negative")])
def test_options_that_say_nothing_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        Freeze(**options)


@pytest.mark.slow
def test_an_adapter_is_frozen_by_layer_saved_whole_and_planned_at_its_largest(tmp_path):
    model, file = folder(tmp_path), completions(tmp_path / "d.jsonl")
    unfreeze = [{"method": "freeze", "interval": 3, "layers": 1}]
    done = run(recipe(model, file, tmp_path / "a", selection=unfreeze))
    loaded = attach_saved(tiny.llama(), tmp_path / "a" / "graft")
    mine = dict(done.grafts[0].named_parameters(trainable=False))
    assert mine.keys() == dict(loaded.named_parameters(trainable=False)).keys()
    moved = {n.split(".")[2] for n, p in loaded.named_parameters(trainable=False) if n.endswith("lora_B") and p.abs().max() > 0}
    assert moved == {"0", "1"}
    kept = [{"method": "freeze", "gradual": None, "windows": {r"layers\.0\.": [0, 0]}}]
    done = run(recipe(model, file, tmp_path / "b", selection=kept))
    moved = {n.split(".")[2] for n, p in done.grafts[0].named_parameters(trainable=False) if n.endswith("lora_B") and p.abs().max() > 0}
    assert moved == {"1"}

    def state(selection):
        return graftwork.plan(recipe(model, file, tmp_path / "c", selection=selection), estimate_time=False).categories["optimizer_state"]

    assert state(unfreeze) == state([]) and state(kept) < 0.55 * state([])
