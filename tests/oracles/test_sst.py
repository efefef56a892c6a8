"""SST: function-preserving starts and decompositions, the enhanced gradient, what a step leaves alone, the draws, resume, refusals."""

from __future__ import annotations

import pytest
import torch

import graftwork
import tiny
from adapter_support import close, output
from graftwork.adapters.sst import drawn
from graftwork.data.collate import Collator
from graftwork.errors import GraftworkError
from graftwork.estimators.backprop import Backprop, BackpropEstimator
from graftwork.objectives.causal_lm import CausalLMObjective
from graftwork.selection.sst import SSTSampling, SSTSelection
from graftwork.training.step import TrainStep

IDS = tiny.tokens(2, 7)
TARGETS = ["q_proj", "k_proj", "up_proj", "down_proj"]  # square, wide and tall


def built(optimizer="adamw", r=4, **options):
    model = tiny.llama()
    graft = graftwork.attach(model, "sst", r=r, target_modules=TARGETS)
    groups = [{k: v for k, v in g.items() if k != "names"} for g in graft.parameter_groups()]
    made = graftwork.optimizer(optimizer, groups, lr=1e-2)
    model.train()
    return graft, TrainStep(model, CausalLMObjective(), BackpropEstimator(Backprop()), list(graft.named_parameters()), [graft],
                            [SSTSelection(SSTSampling(**options))], made, 0.0, (), 12, 0)


def batch_of(seed):
    ids = tiny.tokens(2, 8, seed).tolist()
    return Collator(0).collate([{"input_ids": row, "labels": row} for row in ids])


def test_the_start_is_the_svd_of_the_weight():
    before = output(tiny.llama(), IDS)
    model = tiny.llama()
    graft = graftwork.attach(model, "sst", r=4, target_modules=TARGETS)
    close(output(model, IDS), before, 1e-5)
    for name, a in graft.adapters.items():
        S = torch.linalg.svdvals(model.get_submodule(name).weight.double())
        torch.testing.assert_close(a.sigma.double(), S, rtol=1e-5, atol=1e-6)
        for basis in (a.U.T @ a.U, a.V @ a.V.T):
            torch.testing.assert_close(basis, torch.eye(a.modes), atol=1e-5, rtol=0)
        assert a.columns.unique().numel() == 4


@pytest.mark.slow
def test_the_enhanced_gradient_is_autograds_over_sigma():
    """Against G = dL/dW of the dense weight in float64, and against autograd through U diag(sigma) V."""
    model = tiny.llama().double()
    graft = graftwork.attach(model, "sst", r=4, target_modules=TARGETS)
    for a in graft.adapters.values():
        a.double()
        with torch.no_grad():
            a.u.add_(0.05)  # the active pairs are read from u and v, not from U and V
            a.v.sub_(0.05)
    weights = {f"{n}.weight": a.weight().detach().requires_grad_() for n, a in graft.adapters.items()}
    torch.func.functional_call(tiny.llama().double(), weights, (IDS,)).logits.square().mean().backward()
    output(model, IDS).square().mean().backward()
    for name, a in graft.adapters.items():
        G, at = weights[f"{name}.weight"].grad, a.columns.long()
        U, V = a._whole()
        close(a.sigma.grad, torch.diagonal(U.T @ G @ V.T), 1e-9)
        u, v = a.u.detach().clone().requires_grad_(), a.v.detach().clone().requires_grad_()
        plain = (U.index_copy(1, at, u) * a.sigma.detach()) @ V.index_copy(0, at, v)
        (plain * G).sum().backward()
        sigma = a.sigma.detach()[at]
        close(a.u.grad, u.grad / sigma, 1e-9)
        close(a.v.grad, v.grad / sigma[:, None], 1e-9)
        close(a.u.grad, G @ v.detach().T, 1e-9)


@pytest.mark.slow
def test_draws_follow_p():
    """r = 1: frequencies are p. r = 3: no index twice, and the first-order inclusion of successive sampling, by enumeration."""
    sigma = torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0, 0.0])
    p = 0.5 / 6 + 0.5 * sigma / sigma.sum()
    generator, n = torch.Generator().manual_seed(0), 3000
    counts = torch.zeros(6)
    for _ in range(n):
        counts[drawn(sigma, 1, generator).long()] += 1
    assert ((counts / n - p).abs() < 4 * (p * (1 - p) / n).sqrt()).all()
    wanted, counts = torch.zeros(6), torch.zeros(6)
    for i in range(6):
        for j in set(range(6)) - {i}:
            chance = p[i] * p[j] / (1 - p[i])
            wanted[i] += chance
            wanted[j] += chance
    for _ in range(n):
        two = drawn(sigma, 2, generator).long()
        assert two[0] < two[1]
        counts[two] += 1
    assert ((counts / n - wanted).abs() < 4 * (wanted * (1 - wanted) / n).sqrt()).all()


@pytest.mark.slow
def test_a_step_leaves_the_other_pairs_alone_and_keeps_the_form():
    graft, step = built(interval=3, warmup=0)
    kept = {n: (a.U.clone(), a.V.clone(), a.columns.clone(), a.u.clone(), a.sigma.clone()) for n, a in graft.adapters.items()}
    for at in range(3):
        step.run([batch_of(at)], at)
        for name, a in graft.adapters.items():
            U, V, columns, u, sigma = kept[name]
            assert torch.equal(a.U, U) and torch.equal(a.V, V) and torch.equal(a.columns, columns)
            assert not torch.equal(a.u, u) and not torch.equal(a.sigma, sigma) and (a.sigma >= 0).all()
            torch.testing.assert_close(a.u.norm(dim=0), torch.ones(4), atol=1e-6, rtol=0)
            torch.testing.assert_close(a.v.norm(dim=1), torch.ones(4), atol=1e-6, rtol=0)
    learned = {n: a.u.clone() for n, a in graft.adapters.items()}
    ages = {n: float(step.optimizer.state[a.sigma]["step"]) for n, a in graft.adapters.items()}
    step.run([batch_of(3)], 3)
    changed = 0
    for name, a in graft.adapters.items():
        U, _, columns, _, _ = kept[name]
        rest = torch.ones(a.modes, dtype=torch.bool).index_fill(0, columns.long(), False)
        assert torch.equal(a.U[:, rest], U[:, rest]) and torch.equal(a.U[:, columns.long()], learned[name])
        changed += not torch.equal(a.columns, columns)
        assert step.optimizer.state[a.u]["step"] == 1 and step.optimizer.state[a.sigma]["step"] == ages[name] + 1
    assert changed == len(kept)


@pytest.mark.slow
def test_sigma_stays_positive():
    graft, step = built(optimizer="sgd", interval=50, warmup=0)
    step.optimizer.param_groups[0]["lr"] = 1e4
    step.run([batch_of(0)], 0)
    sigmas = torch.cat([a.sigma.detach() for a in graft.adapters.values()])
    assert (sigmas >= 0).all() and (sigmas == 0).any()


@pytest.mark.slow
def test_a_decomposition_keeps_the_function():
    graft, step = built(interval=2, warmup=0, iterations=1)
    for at in range(2):
        step.run([batch_of(at)], at)
    before = output(graft.model, IDS)
    orders = {n: torch.argsort(a.sigma.detach(), descending=True, stable=True) for n, a in graft.adapters.items()}
    step.selections[0].before_step(step.context(2))
    close(output(graft.model, IDS), before, 1e-4)
    for name, a in graft.adapters.items():
        torch.testing.assert_close(a.U.T @ a.U, torch.eye(a.modes), atol=1e-5, rtol=0)
        assert (a.sigma.detach()[orders[name]].diff() <= 0).all(), "the largest stands where the largest stood"
    selection = SSTSelection()
    assert [i for i in range(20) if selection.decomposes(i, 32, 5)] == [7, 14]


@pytest.mark.slow
def test_warmup_shortens_the_steps():
    def first(warmup):
        graft, step = built(interval=50, warmup=warmup)
        step.selections[0].after_step, keep = lambda ctx: None, step.selections[0].after_step
        before = {n: a.u.clone() for n, a in graft.adapters.items()}
        step.run([batch_of(0)], 0)
        raw = {n: a.u.clone() for n, a in graft.adapters.items()}
        keep(step.context(0))
        return before, raw, {n: a.u.detach() for n, a in graft.adapters.items()}

    for warmup in (0, 3):
        before, raw, after = first(warmup)
        for name in before:
            wanted = before[name] + (raw[name] - before[name]) / (warmup + 1)
            torch.testing.assert_close(after[name], wanted / wanted.norm(dim=0), atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_it_is_planned_resumes_in_mid_round_and_is_refused_alone(tmp_path):
    import training_support as support

    sections = {"adapter": {"method": "sst", "r": 3}, "selection": [{"method": "sst", "interval": 2, "iterations": 2, "warmup": 1}]}
    made, whole = support.plans_runs_and_resumes(tmp_path, save_steps=3, **sections)
    assert made.categories["adapters"] == sum(p.numel() * 4 for _, p in whole.grafts[0].named_parameters(trainable=False))
    model, file = support.folder(tmp_path), tmp_path / "d.jsonl"
    for wrong, why in (({"selection": []}, "selection sst the other"), ({"adapter": {"method": "lora"}}, "acts on adapter sst")):
        with pytest.raises(GraftworkError, match=why):
            support.run(support.recipe(model, file, tmp_path / "r", **{**sections, **wrong}))
    again = tiny.llama()
    loaded = graftwork.attach_saved(again, tmp_path / "a" / "graft")
    assert all(torch.equal(a.u, whole.grafts[0].adapters[n].u) for n, a in loaded.adapters.items())
    a = next(iter(loaded.adapters.values()))
    good = a.artifact_state()
    for bad in ({"columns": good["columns"] * 0}, {"columns": good["columns"] + 99}, {"extra": good["U"]}):
        with pytest.raises(RuntimeError):
            a.load_artifact_state({**good, **bad})
