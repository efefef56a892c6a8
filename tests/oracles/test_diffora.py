"""DiffoRA: gate gradients against autograd, a planted task whose modules it must find, what the choice leaves, and resuming."""

import json
import shutil

import pytest
import torch

import graftwork
import tiny
from graftwork.data.collate import Collator
from graftwork.errors import IncompatibleError, UsageError
from graftwork.estimators.backprop import BackpropEstimator
from graftwork.objectives.base import LossOutput
from graftwork.objectives.causal_lm import CausalLMObjective
from graftwork.selection.diffora import DiffoRA, DiffoRASelection
from graftwork.training.step import TrainStep
from training_support import completions, folder, recipe, run

SITES = 7  # of a layer of the tiny Llama


def batch_of(seed=0, rows=2, length=8):
    ids = tiny.tokens(rows, length, seed).tolist()
    return Collator(0).collate([{"input_ids": row, "labels": [-100, -100, *row[2:]]} for row in ids])


def built(total=20, model=None, objective=None, lr=1e-2, r=2, target_modules="all-linear", **options):
    model = model or tiny.llama()
    graft = graftwork.attach(model, "lora", r=r, alpha=2 * r, target_modules=target_modules)
    groups = [{k: v for k, v in g.items() if k != "names"} for g in graft.parameter_groups()]
    selection = DiffoRASelection(DiffoRA(**options))
    step = TrainStep(model.train(), objective or CausalLMObjective(), BackpropEstimator(None), list(graft.named_parameters()), [graft],
                     [selection], graftwork.optimizer("adamw", groups, lr=lr), 1.0, (), total, 3)
    return step, graft, selection


def trained(step, first, last, batches=batch_of):
    for at in range(first, last):
        step.run([batches(at)], at)


def logits(model):
    with torch.no_grad():
        return model.eval()(tiny.tokens()).logits


def test_the_gradient_of_a_gate_is_autograd_s_and_zero_while_b_is():
    step, graft, selection = built()
    step.compute([batch_of()], 0)
    assert not selection.slopes(graft).any()  # B = 0
    with torch.no_grad():
        for i, a in enumerate(graft.adapters.values()):
            a.lora_B.copy_(torch.randn(a.lora_B.shape, generator=torch.Generator().manual_seed(i)))
    selection.logits = torch.linspace(-2, 2, len(graft.adapters))
    for p in graft.parameters():
        p.grad = None
    selection.before_step(step.context(1))
    step.estimator.step(estimating(step, 1))
    got = selection.slopes(graft)
    gates = {n: g.clone().requires_grad_() for n, g in selection.gates.items()}
    for name, adapter in graft.adapters.items():
        adapter.scale = gates[name] * selection.plain[name]
    step.estimator.step(estimating(step, 1))
    for slope, (name, gate) in zip(got, gates.items()):
        a = graft.adapters[name]
        size = (selection.plain[name] * a.lora_B @ a.lora_A).norm()
        torch.testing.assert_close(slope, (gate.grad / size).detach(), rtol=1e-3, atol=1e-7)


def estimating(step, at):
    from graftwork.estimators.base import StepContext
    from graftwork.modeling.state import state_of

    batches = [batch_of()]
    return StepContext(step.model, step.objective, step.parameters, batches, step.row_scales(batches), state_of(step.model), at, 3)


def test_weights_and_gates_take_turns_and_gates_wait():
    step, graft, selection = built(total=20, search=0.5, settle=0.2, every=3)
    for at in range(10):
        weights, before = [p.detach().clone() for p in graft.parameters()], None if selection.logits is None else selection.logits.clone()
        trained(step, at, at + 1)
        moved = any(not torch.equal(p, w) for p, w in zip(graft.parameters(), weights))
        turned = before is not None and not torch.equal(before, selection.logits)
        assert (moved, turned) == ((False, True) if at in (4, 7) else (True, False)), at
    assert all(torch.equal(a.scale, g * 2.0) for a, g in zip(graft.adapters.values(), list(selection.gates.values())))


def test_scaling_b_against_a_ranks_nothing():
    """(c B, A / c) is the same change: its slope is the same; a larger B alone does not raise it either."""
    step, graft, selection = built()
    step.compute([batch_of()], 0)
    adapter = next(iter(graft.adapters.values()))
    with torch.no_grad():
        adapter.lora_B.normal_(generator=torch.Generator().manual_seed(1))
        found = []
        for b, a, g in ((1, 1, 1), (8, 1 / 8, 1 / 8), (8, 1, 1)):  # the last: another B, the same gradient of the whole change
            adapter.lora_B.mul_(b)
            adapter.lora_A.mul_(a)
            adapter.lora_B.grad = torch.ones_like(adapter.lora_B) * g
            found.append(float(selection.slopes(graft)[0]))
            adapter.lora_B.div_(b)
            adapter.lora_A.div_(a)
    assert found[0] == pytest.approx(found[1], rel=1e-4) == pytest.approx(found[2], rel=1e-4)


class Planted:
    """Squared distance to the logits of a model that differs from the base in known modules."""

    targets = staticmethod(lambda batch: 1)

    def __init__(self, changed):
        self.teacher = tiny.llama()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name in changed:
                W = self.teacher.get_submodule(name).weight
                change = torch.randn(W.shape[0], 1, generator=generator) @ torch.randn(1, W.shape[1], generator=generator)
                W += change * (1.5 * W.norm() / change.norm())

    def loss(self, model, batch, scale):
        with torch.no_grad():
            wanted = self.teacher(batch["input_ids"]).logits
        loss = (model(input_ids=batch["input_ids"]).logits - wanted).square().mean() * scale
        return LossOutput(loss, loss.detach()[None], torch.ones(1))


@pytest.mark.slow
@pytest.mark.parametrize("per, changed", [
    ("layer", ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj"]),
    ("model", ["model.layers.1.self_attn.v_proj", "model.layers.1.mlp.down_proj"])])
def test_it_finds_the_modules_that_were_changed(per, changed):
    step, graft, selection = built(total=120, objective=Planted(changed), search=0.5, settle=0.1, keep=2 / 14, per=per, lr=5e-3)
    trained(step, 0, 61, lambda at: batch_of(at, 4, 16))
    assert sorted(selection.kept) == sorted(changed)  # 1 in 7 of a layer, or 1 in 7 of all


@pytest.mark.parametrize("build, targets", [(tiny.llama, "all-linear"), (tiny.gpt2, ["q", "v", "c_fc"])])
def test_after_the_choice_the_graft_is_the_chosen_sites(build, targets, tmp_path):
    step, graft, selection = built(total=10, model=build(), target_modules=targets, search=0.5, settle=0.2, keep=0.4)
    trained(step, 0, 5)
    plain = logits(step.model)
    gates, all_sites = dict(selection.gates), dict(graft.sites)
    factors = {n: (a.lora_B.detach().clone(), a.lora_A.detach().clone()) for n, a in graft.adapters.items()}
    step.model.train()
    selection.before_step(step.context(5))
    count = round(0.4 * len(all_sites) / 2)
    assert list(graft.adapters) == list(graft.sites) == selection.kept and len(selection.kept) == 2 * count
    assert graft.parameter_count() == sum(2 * (s.in_features + s.out_features) for s in graft.sites.values())
    for name, adapter in graft.adapters.items():  # goes on from where it was
        torch.testing.assert_close(adapter.factors()[0], factors[name][0] * 2.0 * gates[name])
        ranks = [float(gates[n]) for n, s in all_sites.items() if s.layer == graft.sites[name].layer]
        assert float(gates[name]) >= sorted(ranks)[-count]
    assert not torch.equal(logits(step.model), plain)
    step.model.train()
    trained(step, 5, 10)
    assert {n for n, p in step.parameters if step.optimizer.state.get(p)} == {n for n, _ in graft.named_parameters()}
    after = logits(step.model)
    graft.save(tmp_path / "graft")
    card = json.loads((tmp_path / "graft" / "graft.json").read_text())
    assert sorted(card["sites"]) == sorted(selection.kept)
    pairs, _ = graft.to_lora()
    graft.merge()
    torch.testing.assert_close(logits(step.model), after, atol=1e-5, rtol=1e-4)
    graft.unmerge()
    again = build()
    graftwork.attach_saved(again, tmp_path / "graft")
    assert torch.equal(logits(again), after) and set(pairs) == set(selection.kept)
    graft.detach()
    fresh = build()
    assert torch.equal(logits(step.model), logits(fresh))
    assert [type(m) for m in step.model.modules()] == [type(m) for m in fresh.modules()]


@pytest.mark.slow
def test_each_option_shows():
    def gates(**options):
        step, graft, selection = built(total=20, search=0.5, settle=0.2)
        selection.config = selection.config.model_copy(update=options)
        trained(step, 0, 10)
        before = selection.logits.clone()
        trained(step, 10, 11)
        return before, selection.kept

    plain, kept = gates()
    assert len(kept) == 2 * round(0.5 * SITES)
    assert len(gates(keep=0.2)[1]) == 2 and gates(search=0.9)[1] is None
    for options in ({"settle": 0.05}, {"every": 3}, {"lr": 0.5}):
        assert not torch.equal(gates(**options)[0], plain)
    step, graft, selection = built()
    selection.begin(step.context(0))
    selection.logits = torch.arange(2.0 * SITES)
    everywhere = selection.choice(graft)
    selection.config = DiffoRA(per="model")
    assert {graft.sites[n].layer for n in everywhere} == {0, 1} and {graft.sites[n].layer for n in selection.choice(graft)} == {1}


@pytest.mark.slow
def test_a_run_resumes_in_the_search_and_after_the_choice(tmp_path):
    base, file, out = folder(tmp_path), completions(tmp_path / "d.jsonl"), tmp_path / "o"
    document = recipe(base, file, out, adapter={"method": "lora", "r": 2}, train={"max_steps": 6, "save_steps": 1, "save_total_limit": 9},
                      selection=[{"method": "diffora", "search": 0.6, "settle": 0.2, "keep": 0.3}])
    whole = run(document).grafts[0]
    expected = {n: p.detach().clone() for n, p in whole.named_parameters()}
    assert len(whole.adapters) == 2 * round(0.3 * SITES)
    for last in (5, 3):  # the choice is before step 4
        for checkpoint in (out / "checkpoints").iterdir():
            if not checkpoint.name.endswith(tuple(f"-{i}" for i in range(1, last + 1))):
                shutil.rmtree(checkpoint)
        again = dict(run(document, resume=True).grafts[0].named_parameters())
        assert again.keys() == expected.keys() and all(torch.equal(again[n], expected[n]) for n in expected)
    made = graftwork.plan(document, estimate_time=False)
    assert made.categories["adapters"] > 0 and not made.notes


def test_refusals():
    with pytest.raises(IncompatibleError, match="not on 'paca'"):
        step, _, selection = built()
        step.grafts = [graftwork.attach(tiny.llama(), "paca", r=2)]
        selection.begin(step.context(0))
    step, _, selection = built()
    step.grafts = []
    with pytest.raises(IncompatibleError, match="full tuning"):
        selection.begin(step.context(0))
    step, graft, selection = built()
    step.parameters = [*step.parameters, ("other", torch.nn.Parameter(torch.zeros(2)))]
    with pytest.raises(IncompatibleError, match="several"):
        selection.begin(step.context(0))
    step, _, selection = built()
    step.grafts = [graftwork.attach(tiny.llama(), "lora", r=2, initializer="pissa")]
    step.parameters = list(step.grafts[0].named_parameters())
    with pytest.raises(IncompatibleError, match="part of W"):
        selection.begin(step.context(0))
    step, _, selection = built(total=2)
    with pytest.raises(UsageError, match="of 2 steps"):
        selection.begin(step.context(0))
    with pytest.raises(ValueError, match="settle"):
        DiffoRA(search=0.2, settle=0.3)
    graft = graftwork.attach(tiny.llama(), "lora", r=2)
    graft.merge()
    with pytest.raises(UsageError, match="merged"):
        graft.remove(next(iter(graft.sites)))
