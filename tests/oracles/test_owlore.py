"""OwLore: scores against a direct computation, the law of the draw against numpy's, equality with LISA, and fresh state at each turn."""

import shutil

import numpy as np
import pytest
import torch
from scipy import stats

import graftwork
import tiny
from graftwork.data.collate import Collator
from graftwork.errors import UsageError
from graftwork.estimators.backprop import Backprop, BackpropEstimator
from graftwork.objectives.causal_lm import CausalLMObjective
from graftwork.selection.lisa import LISA, LISASelection
from graftwork.selection.owlore import SCORED, OwLore, OwLoreSelection, outlier_shares
from graftwork.training import checkpoint as ckpt
from graftwork.training.step import TrainStep
from training_support import completions, folder, recipe, run

LAYERS = 4


def batch_of(seed=0, lengths=(8, 6)):
    rows = [tiny.tokens(1, n, seed + n)[0].tolist() for n in lengths]
    return Collator(0).collate([{"input_ids": row, "labels": [-100, *row[1:]]} for row in rows])


def built(selection, optimizer="galore", **options):
    model = tiny.llama(num_hidden_layers=LAYERS).requires_grad_(True).train()
    made = graftwork.optimizer(optimizer, model, lr=1e-3, **options)
    return TrainStep(model, CausalLMObjective(), BackpropEstimator(Backprop()), list(model.named_parameters()), (), [selection],
                     made, 1.0, (), 100, 3)


def direct_shares(model, batches, tau):
    """The definition, from the inputs that a full forward pass shows, row by row without padding."""
    seen = {}
    handles = [m.register_forward_hook(lambda m, args, y, n=n: seen.setdefault(n, []).append(args[0].detach().double()))
               for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n]
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"]):
            model(input_ids=ids[mask.bool()][None])
    for handle in handles:
        handle.remove()
    shares = []
    for layer in range(LAYERS):
        A = torch.cat([(m.weight.detach().double().abs() * torch.cat([x[0] for x in seen[n]]).norm(dim=0)).flatten()
                       for n, m in model.named_modules() if n in seen and f".layers.{layer}." in n])
        shares.append(float((A > tau * A.mean()).double().mean()))
    return shares


@pytest.mark.slow
def test_scores_are_the_share_of_outliers_among_the_wanda_scores():
    model, batches = tiny.llama(num_hidden_layers=LAYERS), [batch_of(0), batch_of(9, (5, 3))]
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[:, 3] *= 30
        model.model.layers[3].input_layernorm.weight[5] *= 30
    model.train()
    for tau in (2.0, 5.0):
        got = outlier_shares(model, batches, tau=tau)
        assert got.dtype == torch.float64 and model.training and torch.equal(got, outlier_shares(model, batches, tau=tau))
        np.testing.assert_allclose(got, direct_shares(model.eval(), batches, tau), atol=2e-5)
        model.train()
    assert got[1] > got[0] and got[3] > got[0]


def probabilities(mode, scores):
    return OwLoreSelection(OwLore(mode=mode, scores=scores if mode in SCORED else None)).probabilities(len(scores))


@pytest.mark.parametrize("mode, expected", [
    ("owl", [0.1, 0.2, 0.3, 0.4]), ("owl_reverse", [3 / 6, 2 / 6, 1 / 6, 0]), ("uniform", [0.25] * 4),
    ("increase", [0.1, 0.2, 0.3, 0.4]), ("decrease", [0.4, 0.3, 0.2, 0.1])])
def test_probabilities_of_each_mode(mode, expected):
    np.testing.assert_allclose(probabilities(mode, [1, 2, 3, 4]), expected)


def test_norm_follows_the_weights_and_no_outlier_at_all_is_uniform():
    step = built(OwLoreSelection(OwLore(mode="norm", layers=2)))
    with torch.no_grad():
        for p in step.model.model.layers[2].parameters():
            p.mul_(5)
    step.selections[0].begin(step.context(0))
    squares = [sum(float(p.detach().double().square().sum()) for p in layer.parameters() if p.dim() > 1)
               for layer in step.model.model.layers]
    np.testing.assert_allclose(step.selections[0].scores, np.sqrt(squares))
    assert np.argmax(step.selections[0].probabilities(LAYERS)) == 2
    assert probabilities("owl", [0, 0, 0]) == [1 / 3] * 3


@pytest.mark.slow
def test_the_draw_has_the_law_of_numpys_choice_without_replacement():
    scores, gamma, draws = [0.3, 0.05, 0.02, 0.1, 0.53], 2, 3000
    selection = OwLoreSelection(OwLore(layers=gamma, scores=scores))
    p, source = np.array(selection.probabilities(5)), np.random.default_rng(0)
    mine, theirs = {}, {}
    for interval in range(draws):
        drawn = tuple(selection.active_layers(11, interval, 5))
        mine[drawn] = mine.get(drawn, 0) + 1
        other = tuple(sorted(source.choice(5, gamma, replace=False, p=p)))
        theirs[other] = theirs.get(other, 0) + 1
    exact = {(i, j): p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j]) for i in range(5) for j in range(i + 1, 5)}
    for counts in (mine, theirs):
        assert stats.chisquare([counts.get(k, 0) for k in exact], [draws * v for v in exact.values()]).pvalue > 1e-3
    zero = OwLoreSelection(OwLore(layers=2, scores=[0, 1, 0, 1]))
    assert {tuple(zero.active_layers(1, k, 4)) for k in range(50)} == {(1, 3)}
    used_up = OwLoreSelection(OwLore(layers=3, scores=[0, 1, 0, 1]))
    assert {tuple(used_up.active_layers(1, k, 4)) for k in range(50)} == {(0, 1, 3), (1, 2, 3)}


@pytest.mark.slow
@pytest.mark.parametrize("always_on", [True, False])
def test_uniform_is_lisa(always_on):
    mine = built(OwLoreSelection(OwLore(layers=2, interval=2, mode="uniform", always_on=always_on)), rank=64)
    lisa = built(LISASelection(LISA(layers=2, interval=2, always_on=always_on)), rank=64)
    for at in range(6):
        a, b = mine.run([batch_of(at)], at), lisa.run([batch_of(at)], at)
        assert torch.equal(a.loss, b.loss)
    assert all(torch.equal(p, q) for (_, p), (_, q) in zip(mine.parameters, lisa.parameters))


@pytest.mark.slow
def test_projector_and_moments_of_a_layer_drawn_again_are_new():
    config = OwLore(layers=1, interval=2, tau=2.0, max_batches=1, always_on=False)
    step, begun, bases = built(OwLoreSelection(config), rank=4, update_proj_gap=50), {}, {}
    roles = {p: group["role"] for group in step.optimizer.param_groups for p in group["params"]}
    for at in range(12):
        step.run([batch_of(at)], at)
        if at == 0:  # without other data the batches of the first step are looked at
            expected = outlier_shares(tiny.llama(num_hidden_layers=LAYERS), [batch_of(0)], tau=2.0)
            np.testing.assert_allclose(step.selections[0].scores, expected)
        active = set(step.selections[0].active_layers(3, at // 2, LAYERS))
        begun = {layer: begun.get(layer, at) for layer in active}
        held = {n: s for n, p in step.parameters if (s := step.optimizer.state.get(p))}
        assert {int(n.split(".")[2]) for n in held} == active  # nothing of any other layer is left
        assert {int(s["step"]) for s in held.values()} == {at - begun[layer] + 1 for layer in active}
        nbytes = sum(t.nbytes for state in held.values() for t in state.values())
        assert nbytes == sum(step.optimizer.state_bytes(p.shape, p.dtype, role=roles[p], rank=4, update_proj_gap=50)
                             for n, p in step.parameters if n in held)
        for n, state in held.items():
            now = [t.clone() for key, t in state.items() if "proj" in key or "basis" in key]
            if n in bases and bases[n][0] == begun[int(n.split(".")[2])]:
                assert all(torch.equal(x, y) for x, y in zip(bases[n][1], now))  # kept within a turn: the gap is longer
            elif n in bases:
                assert not any(torch.equal(x, y) for x, y in zip(bases[n][1], now))
            bases[n] = begun[int(n.split(".")[2])], now
    assert len({layer.split(".")[2] for layer in bases}) > 1 and any(now for _, now in bases.values())


@pytest.mark.parametrize("options, match", [(dict(mode="uniform", tau=3.0), "tau: mode uniform looks at no data"),
                                            (dict(mode="norm", max_batches=2), "max_batches: mode norm"),
                                            (dict(tau=3.0, scores=[1.0]), "tau: scores are given"),
                                            (dict(mode="decrease", scores=[1.0]), "scores: finite numbers"),
                                            (dict(scores=[-1.0]), "scores: finite numbers")])
def test_options_that_no_mode_reads_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        OwLore(**options)


def test_bad_numbers_of_layers_and_missing_data_are_refused():
    step = built(OwLoreSelection(OwLore(layers=9)))
    with pytest.raises(UsageError, match="the model has 4"):
        step.selections[0].begin(step.context(0))
    step.selections = [OwLoreSelection(OwLore(layers=2, scores=[1, 2]))]
    with pytest.raises(UsageError, match="scores of 2 layers"):
        step.selections[0].begin(step.context(0))
    with pytest.raises(UsageError, match="scores of 2 layers"):
        step.heaviest_steps()  # what a plan and the meter of a run ask first
    step.selections = [OwLoreSelection(OwLore(layers=2))]
    with pytest.raises(UsageError, match="offers none") as caught:
        step.selections[0].begin(step.context(0))
    assert "mode: decrease" in caught.value.remedy
    OwLoreSelection(OwLore(layers=2, mode="decrease")).begin(step.context(0))


@pytest.mark.slow
def test_a_recipe_calibrates_on_its_data_plans_and_resumes(tmp_path):
    sections = {"adapter": None, "selection": [{"method": "owlore", "layers": 1, "interval": 2, "tau": 3.0, "max_batches": 2}],
                "optimizer": {"method": "galore", "rank": 4, "lr": 1e-3}}
    model, file = folder(tmp_path), completions(tmp_path / "d.jsonl")
    document = recipe(model, file, tmp_path / "a", train={"save_steps": 3}, **sections)  # two steps are an interval
    whole = run(document)
    shutil.rmtree(whole.graft)
    for later in ckpt.complete(tmp_path / "a")[1:]:
        shutil.rmtree(later)
    again = run(document, resume=True)
    assert all(torch.equal(p, q) for p, q in zip(whole.model.parameters(), again.model.parameters()))
    made = graftwork.plan(recipe(model, file, tmp_path / "p", **sections), estimate_time=False)
    assert made.categories["optimizer_state"] > 0 and not made.notes
