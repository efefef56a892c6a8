"""Grafts combined on their exact changes: closed forms, PEFT's functions on tensors, artifacts and the verb."""

import json

import pytest
import torch
from peft.utils import merge_utils

import graftwork
import tiny
from adapter_support import attach, close, output
from graftwork.errors import IncompatibleError, UsageError
from graftwork.interchange import combine as module
from graftwork.interchange.combine import combine

TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": "q,v,c_fc", "mixtral": ["q_proj", "down_proj"]}


def pair(kind="llama", first="lora", second="paca", **more):
    model = tiny.CAUSAL[kind]()
    targets = {"target_modules": TARGETS[kind]}
    return model, [attach(model, first, name="one", seed=1, **targets, **more), attach(model, second, name="two", seed=2, **targets)]


def deltas(graft):
    return {name: change.double() for name, change in graft.delta_weights().items()}


@pytest.mark.parametrize("rule", ["linear", "ties", "dare"])
def test_rules_on_tensors_are_peft_s(rule):
    generator = torch.Generator().manual_seed(0)
    changes, weights = [torch.randn(7, 9, generator=generator) for _ in range(3)], [0.5, 1.0, -0.25]
    if rule == "linear":
        wanted = merge_utils.task_arithmetic(changes, torch.tensor(weights))
    elif rule == "ties":
        wanted = merge_utils.ties(changes, torch.tensor(weights), 0.4)
    else:
        draws = torch.Generator().manual_seed(3)
        masks = [torch.rand(7, 9, generator=draws) < 0.4 for _ in changes]
        wanted = sum(w * torch.where(m, c / 0.4, 0.0) for w, m, c in zip(weights, masks, changes))
    density = 1.0 if rule == "linear" else 0.4
    torch.testing.assert_close(module.RULES[rule](changes, weights, density, torch.Generator().manual_seed(3)), wanted)


def test_dare_keeps_the_expectation():
    change = torch.ones(400, 400)
    thinned = module.dare([change], [1.0], 0.25, torch.Generator().manual_seed(0))
    assert set(thinned.unique().tolist()) == {0.0, 4.0} and abs(thinned.mean().item() - 1) < 0.02


@pytest.mark.parametrize("kind", TARGETS)
def test_a_sum_of_low_rank_grafts_is_exact(kind, tmp_path):
    """Logits of the combined graft are those of both grafts together, weighted; also on slices, biases and experts."""
    model, grafts = pair(kind, **({"bias": "lora_only"} if kind == "gpt2" else {}))
    grafts[0].scale(0.7)
    grafts[1].scale(-0.4)
    with torch.no_grad():
        wanted = output(model, tiny.tokens())
    for graft in grafts:
        graft.scale(1.0)
    made, error = combine(grafts, weights=[0.7, -0.4])
    assert error == 0 and made.method == "lora"
    made.save(tmp_path / "both")
    for graft in grafts:
        graft.detach()
    graftwork.attach_saved(model, tmp_path / "both", name="both")
    with torch.no_grad():
        close(output(model, tiny.tokens()), wanted, 1e-5)


@pytest.mark.parametrize("rule", ["ties", "dare", "linear"])
def test_truncation_is_the_best_of_its_rank_and_its_error_is_reported(rule):
    model, grafts = pair(second="flora" if rule == "linear" else "paca")
    density = None if rule == "linear" else 0.5
    made, error = combine(grafts, rule, weights=[1.0, 0.5], density=density, rank=3, seed=4)
    lost = total = 0.0
    one, two, got = (deltas(g) for g in (*grafts, made))
    for name in got:
        change = module.RULES[rule]([one[name].float(), two[name].float()], [1.0, 0.5], density or 1.0, module._generator(4, name)).double()
        U, S, Vh = torch.linalg.svd(change)
        close(got[name], U[:, :3] * S[:3] @ Vh[:3], 1e-5)
        lost, total = lost + (S[3:] ** 2).sum(), total + (S**2).sum()
    assert error == pytest.approx(float((lost / total) ** 0.5), rel=1e-4) and error > 0.01


def test_one_graft_at_weight_one_is_itself():
    model, grafts = pair()
    assert combine(grafts[:1]) == (grafts[0], 0.0)
    for rule in ("ties", "dare"):
        made, error = combine(grafts[:1], rule, density=1.0, rank=16)
        assert error < 1e-5
        for name, change in deltas(made).items():
            close(change, deltas(grafts[0])[name], 1e-5)


def test_a_rank_bounds_a_sum():
    model, grafts = pair()
    made, error = combine(grafts, rank=2)
    assert {a.r for a in made.adapters.values()} == {2} and 0 < error < 1


@pytest.mark.parametrize("options, words", [
    (dict(method="tie"), "did you mean 'ties'"), (dict(weights=[1.0]), "1 weights are given for 2 grafts"),
    (dict(density=0.5), "density does nothing"), (dict(method="ties", density=1.5, rank=2), "no share"),
    (dict(method="ties"), "full rank")])
def test_bad_requests(options, words):
    model, grafts = pair()
    with pytest.raises(UsageError, match=words):
        combine(grafts, **options)


def test_whole_modules_have_no_sum():
    model, grafts = pair(modules_to_save=["lm_head"])
    with pytest.raises(IncompatibleError, match="lm_head"):
        combine(grafts)


def test_the_verb(tmp_path, capsys):
    from test_interchange import graft_command

    tiny.save(tiny.llama(), tmp_path / "base")
    model, _ = graftwork.load(tmp_path / "base", dtype="fp32")
    grafts = [attach(model, method, name=name, seed=seed, target_modules=["q_proj"])
              for name, method, seed in (("one", "lora", 1), ("two", "paca", 2))]
    for graft in grafts:
        graft.save(tmp_path / graft.name)
    parts = (tmp_path / "one", tmp_path / "two")
    code, out, err = graft_command(capsys, "merge", *parts, "--method", "linear", "--weights", "0.5,1", "-o", tmp_path / "both", "--json")
    assert code == 0, err
    assert json.loads(out)["error"] == 0 and json.loads(out)["to"] == "lora"
    again, _ = graftwork.load(tmp_path / "base", dtype="fp32")
    one, two, both = (deltas(g) for g in (*grafts, graftwork.attach_saved(again, tmp_path / "both", name="both")))
    for name, change in both.items():
        close(change, 0.5 * one[name] + two[name], 1e-5)
    for arguments, words in [((*parts,), "2 grafts are named"), ((parts[0], "--rank", "3"), "--rank does nothing"),
                             ((*parts, "--method", "ties"), "--rank 16"), ((*parts, "--method", "linear", "--dtype", "bf16"), "--dtype"),
                             ((*parts, "--method", "linear", "--weights", "a,b"), "0.7,0.3"),
                             ((*parts, "--method", "linear", "--seed", "1"), "--seed does nothing")]:
        code, _, err = graft_command(capsys, "merge", *arguments, "-o", tmp_path / "no")
        assert code == 2 and words in err, err
        assert not (tmp_path / "no").exists()
