"""SoRA: the proximal operator in closed form, pruned files, a planted rank found, each option seen, runs and resumes."""

import json

import pytest
import torch

import graftwork
import tiny
from adapter_support import attach, close, output
from graftwork.errors import IncompatibleError, UsageError
from graftwork.recipe import load_recipe
from graftwork.registry import make_config
from graftwork.selection.base import SelectionContext
from graftwork.selection.sora import SoRASchedule, SoRASelection, shrink
from training_support import completions, folder, plans_runs_and_resumes, recipe

IDS = tiny.tokens(2, 7)


def context(graft, optimizer=None, step=0, total=10):
    return SelectionContext(graft.model, graft, list(graft.named_parameters()), optimizer, step, total, 0)


def test_the_operator_in_closed_form():
    grid, xi = torch.linspace(-3, 3, 601, dtype=torch.float64), 0.7
    true, official = grid.clone(), grid.clone()
    shrink(true, xi)
    shrink(official, xi, official=True)
    for g, got, compat in zip(grid.tolist(), true.tolist(), official.tolist()):
        sign = (g > 0) - (g < 0)
        assert got == pytest.approx(sign * max(abs(g) - xi, 0.0), abs=1e-12)
        # the minimum of 1/2 (z - g)^2 + xi |z|
        others = (0.5 * (z - g) ** 2 + xi * abs(z) for z in (0.0, g, got + 1e-3, got - 1e-3))
        assert 0.5 * (got - g) ** 2 + xi * abs(got) <= min(others) + 1e-12
        if abs(abs(g) - 2 * xi) > 1e-9:
            assert compat == pytest.approx(sign * (abs(g) - xi) if abs(g) > 2 * xi else 0.0, abs=1e-12)
    differ = (true - official).abs() > 1e-12
    assert torch.equal(differ, (grid.abs() > xi + 1e-9) & (grid.abs() < 2 * xi - 1e-9))


def test_the_schedule():
    plain = SoRASelection(make_config("selection", "sora", threshold=0.1))
    assert {plain.threshold_at(t, 20) for t in range(20)} == {0.1}
    linear = SoRASelection(SoRASchedule(threshold=0.1, final_threshold=0.5, stages=4, hold=0.2))
    assert [round(linear.threshold_at(t, 20), 6) for t in (0, 3, 4, 7, 8, 12, 16, 19)] == [0.1, 0.1, 0.2, 0.2, 0.3, 0.4, 0.5, 0.5]
    log = SoRASelection(SoRASchedule(threshold=0.01, final_threshold=1.0, stages=2, hold=0.0, spacing="log"))
    assert [round(log.threshold_at(t, 10), 6) for t in (0, 4, 5, 9)] == [0.1, 0.1, 1.0, 1.0]
    with pytest.raises(UsageError, match="stages: without final_threshold"):
        make_config("selection", "sora", stages=3)


def test_gates_by_hand_and_by_rate():
    for options, factor in (({}, 1.0), ({"by_rate": True}, 0.01), ({"official": True}, None)):
        graft = attach(tiny.llama(), "sora")
        optimizer = graftwork.optimizer("adamw", [{k: v for k, v in g.items() if k != "names"} for g in graft.parameter_groups()],
                                        lr=0.01, weight_decay=0.1)
        selection = SoRASelection(SoRASchedule(threshold=0.5, **options))
        selection.begin(context(graft, optimizer))
        before = {n: a.gate.detach().clone() for n, a in graft.adapters.items()}
        selection.after_step(context(graft, optimizer))
        for name, adapter in graft.adapters.items():
            g = before[name]
            wanted = g.sign() * (g.abs() - 0.5 * (factor or 1.0)).clamp_min(0)
            if factor is None:
                wanted = torch.where(wanted.abs() >= 0.5, wanted, 0.0)
            torch.testing.assert_close(adapter.gate.detach(), wanted)
        decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        for adapter in graft.adapters.values():
            assert decays[id(adapter.gate)] == 0.0 and decays[id(adapter.lora_A)] == 0.1


def test_the_penalty_is_a_mean_over_all_gates():
    graft = attach(tiny.llama(), "sora", l1=3.0)
    every = torch.cat([a.gate for a in graft.adapters.values()])
    total = torch.stack([a.auxiliary_loss() for a in graft.adapters.values()]).sum()
    torch.testing.assert_close(total, 3.0 * every.abs().mean())
    assert attach(tiny.llama(), "sora").adapters["model.layers.0.mlp.up_proj"].auxiliary_loss() is None
    with pytest.raises(UsageError, match="r=33.*32 x 64"):
        graftwork.attach(tiny.llama(), "sora", r=33)


@torch.no_grad()
def test_a_pruned_graft_is_smaller_and_keeps_its_scale(tmp_path):
    model = tiny.llama()
    graft = attach(model, "sora", r=4, alpha=20.0)
    graft.save(tmp_path / "whole")
    for i, adapter in enumerate(graft.adapters.values()):
        adapter.gate[: i % 5] = 0.0  # some sites lose everything
    learned = output(model, IDS)
    graft.save(tmp_path / "pruned")
    again = tiny.llama()
    loaded = graftwork.attach_saved(again, tmp_path / "pruned")
    close(output(again, IDS), learned, 1e-6)
    for i, (name, adapter) in enumerate(loaded.adapters.items()):
        assert adapter.gate.shape[0] == max(4 - i % 5, 1) and adapter.scale == 5.0 == graft.adapters[name].scale
    tensors = json.loads((tmp_path / "pruned" / "graft.json").read_text())["tensors"]
    rows = {n: max(int((a.gate != 0).sum()), 1) for n, a in graft.adapters.items()}
    for name, adapter in graft.adapters.items():
        assert tensors[f"{name}.lora_A"][0] == [rows[name], adapter.in_features]
        assert tensors[f"{name}.lora_B"][0] == [adapter.out_features, rows[name]]
    sizes = [(tmp_path / n / "graft.safetensors").stat().st_size for n in ("whole", "pruned")]
    assert sizes[1] < 0.75 * sizes[0]
    pairs, _ = loaded.to_lora()
    assert all(A.shape[0] == rows[n] for n, (_, A) in pairs.items())
    loaded.save(tmp_path / "twice")
    third = tiny.llama()
    graftwork.attach_saved(third, tmp_path / "twice", trainable=True)
    assert torch.equal(output(third, IDS), output(again, IDS))


def test_a_planted_rank_is_found():
    """Rank-2 regression with 8 gates: the schedule ends at two live gates, at almost no loss."""
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, 2, generator=generator)).Q for n in (32, 64))
    model = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False))
    target = model[0].weight.detach() + 3.0 * U @ V.T
    graft = graftwork.attach(model, "sora", r=8, target_modules=["0"])
    adapter = graft.adapters["0"]
    optimizer = graftwork.optimizer("adamw", [{k: v for k, v in g.items() if k != "names"} for g in graft.parameter_groups()], lr=1e-2)
    total = 900
    selection = SoRASelection(SoRASchedule(threshold=1e-5, final_threshold=5e-3, stages=5, hold=0.3))
    selection.begin(context(graft, optimizer, 0, total))
    first = None
    for at in range(total):
        change = adapter.delta_weight(graft.base_of(graft.sites["0"]))
        loss = (model[0].weight.detach() + change - target).square().sum()
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        selection.after_step(context(graft, optimizer, at, total))
    assert int((adapter.gate != 0).sum()) in (2, 3) and loss.item() < 0.02 * first, (adapter.gate, loss.item(), first)


def test_a_zero_gate_may_come_back():
    graft = attach(tiny.llama(), "sora")
    adapter = graft.adapters["model.layers.0.mlp.up_proj"]
    with torch.no_grad():
        adapter.gate.zero_()
    output(graft.model, IDS).square().sum().backward()
    assert adapter.gate.grad.abs().min() > 0


@pytest.mark.slow
def test_plans_runs_prunes_and_resumes(tmp_path):
    made, whole = plans_runs_and_resumes(tmp_path, save_steps=2, adapter={"method": "sora", "r": 4, "l1": 0.1},
                                         selection=[{"method": "sora", "threshold": 0.1}])
    assert not made.notes
    assert sum(int((a.gate == 0).sum()) for a in whole.grafts[0].adapters.values()) > 0


def test_refusals(tmp_path):
    base, data = folder(tmp_path), completions(tmp_path / "d.jsonl")
    document = recipe(base, data, tmp_path / "o", selection=[{"method": "sora"}])
    with pytest.raises(UsageError, match="acts on adapter sora, not on lora"):
        load_recipe(document)
    with pytest.raises(UsageError, match="acts on adapter sora, not on full tuning"):
        load_recipe({**document, "adapter": None})
    with pytest.raises(UsageError, match="acts on one adapter, and a fleet"):
        load_recipe({**document, "adapter": "sora", "data": {"train": str(tmp_path / "*.jsonl")}})
    selection = SoRASelection(SoRASchedule())
    with pytest.raises(IncompatibleError, match="not on 'lora'"):
        selection.begin(context(attach(tiny.llama(), "lora")))
    with pytest.raises(UsageError, match="learning rate"):
        SoRASelection(SoRASchedule(by_rate=True)).begin(context(attach(tiny.llama(), "sora")))
