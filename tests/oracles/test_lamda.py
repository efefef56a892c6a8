"""LaMDA: starts by closed form, activations and parameters before and after B is frozen, columns that stay to the bit, ranks by energy."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file

import graftwork
import tiny
from adapter_support import attach, close, fill, output
from graftwork.data.collate import Collator
from graftwork.errors import GraftworkError, UsageError
from graftwork.estimators.backprop import Backprop, BackpropEstimator
from graftwork.initializers.lamda_ranks import LaMDARanks, level
from graftwork.objectives.causal_lm import CausalLMObjective
from graftwork.registry import make_config
from graftwork.selection.lamda_freeze import LaMDAFreeze, LaMDAFreezeSelection
from graftwork.training import checkpoint as ckpt
from graftwork.training.step import TrainStep
from training_support import assert_identical, completions, folder, log_of, recipe, run, tensors_of

IDS = tiny.tokens(2, 7)
TARGETS = ["q_proj", "k_proj", "down_proj"]


@pytest.mark.parametrize("init", ["spectral", "residual", "random"])
def test_starts(init):
    model = tiny.llama()
    graft = graftwork.attach(model, "lamda", r=5, alpha=8.0, init=init, svd="exact", target_modules=TARGETS)
    close(output(model, IDS), output(tiny.llama(), IDS), 2e-6)
    for name, adapter in graft.adapters.items():
        assert not adapter.A.requires_grad and adapter.B.requires_grad and adapter.M.requires_grad
        if init == "random":
            assert not adapter.B.any() and adapter.base_edit() is None
            assert 0 < adapter.A.abs().max() <= adapter.in_features**-0.5 and 0 < adapter.M.abs().max() <= 5**-0.5
            continue
        U, S, Vh = torch.linalg.svd(model.get_submodule(name).weight.detach().double(), full_matrices=False)
        torch.testing.assert_close(adapter.A @ adapter.A.T, torch.eye(5), atol=1e-6, rtol=0)
        close(adapter.B @ torch.diag(S[:5].float()) @ adapter.A, U[:, :5] * S[:5] @ Vh[:5], 1e-5)
        if init == "spectral":
            assert not adapter.M.any() and adapter.base_edit() is None
        else:
            B0, A0 = adapter.base_edit()
            close(B0 @ A0, U[:, :5] * S[:5] @ Vh[:5], 1e-5)
            close(1.6 * adapter.B @ adapter.M @ adapter.A, B0 @ A0, 1e-5)


def test_change_by_hand():
    """s B S A, less the moved part with init=residual; rank r in both."""
    for init in ("spectral", "residual", "random"):
        model = tiny.llama()
        graft = fill(graftwork.attach(model, "lamda", r=4, alpha=6.0, init=init, target_modules=TARGETS))
        pairs, error = graft.to_lora()
        assert error == 0
        for name, change in graft.delta_weights().items():
            adapter = graft.adapters[name]
            wanted = 1.5 * adapter.B.detach() @ adapter.M.detach() @ adapter.A
            close(change, wanted if adapter.moved is None else wanted - adapter.moved @ adapter.A, 1e-5)
            assert pairs[name][1].shape[0] == 4


def test_options():
    with pytest.raises(UsageError, match="dropout would drop it"):
        make_config("adapter", "lamda", init="residual", dropout=0.1)
    with pytest.raises(UsageError, match="r=33.*k_proj.*allows 32"):
        graftwork.attach(tiny.llama(), "lamda", r=33)

    def error(**options):
        model = tiny.llama()
        graft = graftwork.attach(model, "lamda", r=4, init="residual", target_modules=["up_proj"], **options)
        weights = {n: model.get_submodule(n).weight.detach() for n in graft.adapters}
        return max(float((weights[n] - a.moved @ a.A).norm()) for n, a in graft.adapters.items())

    assert error(niter=0) > error(niter=10) * 1.01 and error(niter=0) > error(svd="exact", niter=0) * 1.01


@pytest.mark.parametrize("init", ["spectral", "residual", "random"])
def test_count_and_file(tmp_path, init):
    model = tiny.llama()
    graft = attach(model, "lamda", r=5, init=init, rank_pattern={"v_proj": 2})
    sizes = [(2 if n.endswith("v_proj") else 5, a.out_features) for n, a in graft.adapters.items()]
    graft.save(tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / "graft.safetensors")
    wanted = sum(r * r + r * out for r, out in sizes)
    assert graft.parameter_count() == wanted == sum(t.numel() for t in tensors.values())
    again = tiny.llama()
    graftwork.attach_saved(again, tmp_path / "saved")
    assert torch.equal(output(again, IDS), output(model, IDS))


# -- the schedule ---------------------------------------------------------------------------------------------------------
def batch_of(seed=0):
    rows = tiny.tokens(2, 8, seed).tolist()
    return Collator(0).collate([{"input_ids": row, "labels": [-100, -100, *row[2:]]} for row in rows])


def built(method="lamda", total=20, fraction=0.5, targets=TARGETS, **options):
    model = tiny.llama().train()
    graft = graftwork.attach(model, method, r=5, target_modules=targets, **options)
    groups = [{k: v for k, v in g.items() if k != "names"} for g in graft.parameter_groups()]
    optimizer = graftwork.optimizer("adamw", [{**g, "weight_decay": 0.1} for g in groups], lr=1e-2)
    selection = LaMDAFreezeSelection(LaMDAFreeze(fraction=fraction))
    named = list(graft.named_parameters())
    return TrainStep(model, CausalLMObjective(), BackpropEstimator(Backprop()), named, [graft], [selection], optimizer, 1.0, (), total, 0)


def test_frozen_columns_formula():
    selection = LaMDAFreezeSelection()
    assert [selection.frozen_columns(64, i, 1000) for i in (0, 4, 5, 150, 299, 300, 999)] == [0, 0, 1, 32, 63, 64, 64]
    assert LaMDAFreezeSelection(LaMDAFreeze(fraction=0.6)).frozen_columns(64, 300, 1000) == 32


@pytest.mark.parametrize("method, factor, start", [("lamda", "B", {"init": "spectral"}), ("lamda", "B", {"init": "residual"}),
                                                   ("lora", "lora_B", {})], ids=str)
def test_columns_do_not_move_after_their_step(method, factor, start):
    """Under AdamW with weight decay: column j is bit-constant from its step on, and moves at every step before."""
    step = built(method, **start)
    graft = step.grafts[0]
    for at in range(14):
        count = min(5, at * 5 // 10)
        before = {n: getattr(a, factor).detach().clone() for n, a in graft.adapters.items()}
        step.run([batch_of(at)], at)
        for name, adapter in graft.adapters.items():
            now = getattr(adapter, factor).detach()
            assert torch.equal(now[:, :count], before[name][:, :count])
            assert at == 0 or all(not torch.equal(now[:, j], before[name][:, j]) for j in range(count, 5))
            assert getattr(adapter, factor).requires_grad == (count < 5)
            assert (getattr(adapter, factor) in step.optimizer.state) == (count < 5)
    inner = sum(p.numel() for n, p in step.parameters if n.rpartition(".")[2] != factor)
    assert graft.parameter_count() == inner, "only the inner factor trains at the end"


def test_parameters_at_the_end_are_r_squared():
    step = built(total=4)
    graft = step.grafts[0]
    assert graft.parameter_count() == sum(25 + 5 * a.out_features for a in graft.adapters.values())
    for at in range(3):
        step.run([batch_of(at)], at)
    assert graft.parameter_count() == 25 * len(graft.adapters)


def test_a_resume_freezes_at_once():
    whole = built()
    for at in range(12):
        whole.run([batch_of(at)], at)
    late = built()
    late.run([batch_of(12)], 12)
    assert all(not a.B.requires_grad for a in late.grafts[0].adapters.values())


@pytest.mark.slow
def test_a_run_with_ranks_and_schedule_resumes_identically(tmp_path):
    """From a recipe: chosen ranks, B frozen in the middle of the run, interrupted on both sides of it."""
    document = recipe(folder(tmp_path), completions(tmp_path / "d.jsonl"), tmp_path / "whole", adapter={"method": "lamda", "r": 4},
                      initializer="lamda_ranks", selection={"method": "lamda_freeze", "fraction": 0.5}, train={"save_steps": 2})
    run(document)
    for last in (2, 4):
        again = {**document, "output_dir": str(tmp_path / f"cut{last}")}
        shutil.copytree(tmp_path / "whole", tmp_path / f"cut{last}")
        for path in ckpt.complete(tmp_path / f"cut{last}"):
            if int(path.name.rpartition("-")[2]) > last:
                shutil.rmtree(path)
        shutil.rmtree(tmp_path / f"cut{last}" / "graft")
        run(again, resume=True)
        assert log_of(tmp_path / f"cut{last}") == log_of(tmp_path / "whole")
        assert_identical(tensors_of(tmp_path / f"cut{last}" / "graft"), tensors_of(tmp_path / "whole" / "graft"))


def test_the_gradient_is_cleared_before_clipping():
    step = built()
    for at in range(4):
        step.run([batch_of(at)], at)
    step.compute([batch_of(4)], 4)
    assert all(not a.B.grad[:, :2].any() and a.B.grad[:, 2:].any() for a in step.grafts[0].adapters.values())


def test_a_graft_without_an_output_factor_is_refused():
    step = built("lora_xs")
    with pytest.raises(UsageError, match="output factor"):
        step.run([batch_of()], 0)


def test_saved_bytes_before_and_after():
    """A x and S A x (T, r each) while B trains, A x alone afterwards; x (T, 96) is kept in neither."""
    model = tiny.llama()
    graft = fill(graftwork.attach(model, "lamda", r=5, target_modules=["layers.0.mlp.down_proj"]))
    (adapter,) = graft.adapters.values()
    module = model.model.layers[0].mlp.down_proj
    x = torch.randn(2, 7, 96, requires_grad=True)
    own = {p.untyped_storage().data_ptr() for p in [*adapter.parameters(), *module.parameters()]}

    def kept():
        found = {}

        def pack(tensor):
            if tensor.untyped_storage().data_ptr() not in own:
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            module(x * 1.0)
        return sum(s.nbytes() for s in found.values())

    assert kept() == 2 * 14 * 5 * 4
    adapter.B.requires_grad_(False)
    assert kept() == 14 * 5 * 4


# -- LaMDA++ ----------------------------------------------------------------------------------------------------------------
def test_leveled_ranks():
    flat, steep = [0.1] * 8, [0.8, 0.1, 0.05, 0.02, 0.01, 0.0, 0.0, 0.0]
    assert level({"flat": flat, "steep": steep}, 8) == {"flat": 7, "steep": 1}
    assert level({"a": flat, "b": flat}, 8) == {"a": 4, "b": 4}
    assert level({"a": flat[:3], "b": flat[:4]}, 20) == {"a": 3, "b": 4}, "bounds win over the budget"
    # level: no site could give a rank to another and raise the smallest kept energy
    generator = torch.Generator().manual_seed(1)
    shares = {f"s{i}": (torch.rand(12, generator=generator).sort(descending=True).values / 12).tolist() for i in range(6)}
    counts = level(shares, 30)
    assert sum(counts.values()) == 30
    least = min(sum(shares[n][:c]) for n, c in counts.items() if c < 12)
    assert all(sum(shares[n][:c - 1]) <= least + 1e-12 for n, c in counts.items() if c > 1)


def test_ranks_follow_the_spectrum_and_the_budget(tmp_path):
    model = tiny.llama()
    generator = torch.Generator().manual_seed(3)
    steep = torch.randn(96, 1, generator=generator) @ torch.randn(1, 64, generator=generator)
    model.model.layers[0].mlp.up_proj.weight.data.add_(steep)
    graft = graftwork.attach(model, "lamda", r=6, alpha=9.0, target_modules="mlp", initializer="lamda_ranks")
    ranks = {n: a.r for n, a in graft.adapters.items()}
    assert sum(ranks.values()) == 6 * len(ranks)
    assert ranks["model.layers.0.mlp.up_proj"] == 1 and max(ranks.values()) <= 12
    for name, adapter in graft.adapters.items():
        assert adapter.M.shape == (ranks[name],) * 2 and adapter.scale == pytest.approx(1.5)
    fill(graft).save(tmp_path / "saved")
    again = tiny.llama()
    again.load_state_dict({k: v for k, v in model.state_dict().items() if "graft" not in k})
    loaded = graftwork.attach_saved(again, tmp_path / "saved")
    assert {n: a.r for n, a in loaded.adapters.items()} == ranks
    assert torch.equal(output(again, IDS), output(model, IDS))
    small = graftwork.attach(tiny.llama(), "lamda", r=6, target_modules="mlp", initializer={"method": "lamda_ranks", "rho": 1.2})
    assert max(a.r for a in small.adapters.values()) <= 7
    with pytest.raises(GraftworkError, match="starts lamda"):
        graftwork.attach(tiny.llama(), "lora", initializer="lamda_ranks")
    assert LaMDARanks().rho == 2.0
