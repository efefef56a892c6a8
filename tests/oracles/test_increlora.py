"""IncreLoRA: growth keeps the function and the optimizer's state, totals are exact, sites that matter grow, runs resume."""


import pytest
import torch

import graftwork
import tiny
from adapter_support import attach, close, output
from graftwork.errors import UsageError
from graftwork.recipe import load_recipe
from graftwork.selection.base import SelectionContext
from graftwork.selection.increlora import IncreLoRAGrowth, IncreLoRASelection
from training_support import completions, folder, plans_runs_and_resumes, recipe, run

IDS = tiny.tokens(2, 9)


def context(graft, optimizer=None, step=0, total=20):
    return SelectionContext(graft.model, graft, list(graft.named_parameters()), optimizer, step, total, 0)


def adamw(graft):
    return graftwork.optimizer("adamw", [{k: v for k, v in g.items() if k != "names"} for g in graft.parameter_groups()], lr=1e-2)


def train(graft, selection, optimizer, steps, total=20, first=0):
    selection.begin(context(graft, optimizer, first, total))
    for at in range(first, first + steps):
        ids = tiny.tokens(2, 9, at)
        loss = graft.model(ids, labels=ids).loss + torch.stack([a.auxiliary_loss() for a in graft.adapters.values()]).sum()
        loss.backward()
        del loss  # a graph that stays alive keeps the old shapes
        selection.after_backward(context(graft, optimizer, at, total))
        optimizer.step()
        for _, p in graft.named_parameters():
            p.grad = None
        selection.after_step(context(graft, optimizer, at, total))


def shapes(graft):
    return {n: (a.gate.shape[0], a.lora_A.shape[0]) for n, a in graft.adapters.items()}


def test_the_equation_and_the_penalty():
    graft = attach(tiny.llama(), "increlora", r=2, alpha=6.0, reserve=3, orth=0.4)
    adapter = graft.adapters["model.layers.1.self_attn.k_proj"]
    e = torch.cat([adapter.gate, torch.full((3,), 1e-5)])
    close(adapter.delta_weight(None), 3.0 * adapter.lora_B @ torch.diag(e) @ adapter.lora_A, 1e-6)
    total = torch.stack([a.auxiliary_loss() for a in graft.adapters.values()]).mean()
    by_hand = torch.stack([(a.lora_A @ a.lora_A.T - torch.eye(5)).norm() + (a.lora_B.T @ a.lora_B - torch.eye(5)).norm()
                           for a in graft.adapters.values()]).mean()
    torch.testing.assert_close(total * len(graft.adapters), 0.4 / 2 * by_hand)
    assert attach(tiny.llama(), "increlora", orth=0.0).adapters["model.layers.1.self_attn.k_proj"].auxiliary_loss() is None


@torch.no_grad()
def test_growth_keeps_the_function():
    model = tiny.llama()
    graft = attach(model, "increlora", r=2, alpha=4.0, reserve=2)
    before, changes = output(model, IDS), graft.delta_weights()
    for adapter in graft.adapters.values():
        adapter.grow(2, torch.Generator().manual_seed(1))
        adapter.grow(1, torch.Generator().manual_seed(2))
        assert (adapter.gate.shape[0], adapter.lora_A.shape[0]) == (5, 7) and adapter.lora_B.shape[1] == 7 and adapter.scale == 2.0
    close(output(model, IDS), before, 1e-5)
    for name, change in graft.delta_weights().items():
        new = changes[name] - change
        B, A = graft.adapters[name].lora_B[:, 4:], graft.adapters[name].lora_A[4:]
        assert new.norm() <= 1.01 * 2.0 * 1e-5 * (B @ A).norm() + 1e-6 * change.norm()  # what the new reserve adds
    for adapter in graft.adapters.values():
        adapter.close()
        assert adapter.lora_A.shape[0] == adapter.lora_B.shape[1] == adapter.gate.shape[0] == 5
    close(output(model, IDS), before, 1e-4)


def test_moments_of_old_rows_stay_and_new_rows_start_small():
    graft = attach(tiny.llama(), "increlora", r=2, alpha=4.0)
    optimizer = adamw(graft)
    selection = IncreLoRASelection(IncreLoRAGrowth(final_r=6, top=3, warmup=3, interval=4))
    train(graft, selection, optimizer, 3)
    kept = {n: {k: v.clone() for k, v in optimizer.state[p].items()} for n, p in graft.named_parameters()}
    values = {n: p.detach().clone() for n, p in graft.named_parameters()}
    selection.config = selection.config.model_copy(update={"interval": 3, "warmup": 0})
    selection.after_step(context(graft, optimizer, 2))
    grown = [n for n, (k, _) in shapes(graft).items() if k == 3]
    assert len(grown) == 3
    for name, p in graft.named_parameters():
        dim = 1 if name.endswith("lora_B") else 0
        n = values[name].shape[dim]
        assert torch.equal(p.narrow(dim, 0, n), values[name])
        state = optimizer.state[p]
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == p.shape and torch.equal(state["step"], kept[name]["step"])
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[key].narrow(dim, 0, n), kept[name][key])
        if p.shape[dim] > n:
            assert not state["exp_avg"].narrow(dim, n, 1).any()
            wanted = kept[name]["exp_avg_sq"].mean(dim, keepdim=True)
            torch.testing.assert_close(state["exp_avg_sq"].narrow(dim, n, 1), wanted)


@pytest.mark.parametrize("options", [{"final_r": 3, "top": 4, "interval": 2}, {"final_r": 4, "top": 14, "interval": 3}])
def test_the_total_is_exact_and_the_reserve_is_dropped(options):
    graft = attach(tiny.llama(), "increlora", r=1, alpha=2.0, reserve=2)
    selection, optimizer = IncreLoRASelection(IncreLoRAGrowth(warmup=1, **options)), adamw(graft)
    train(graft, selection, optimizer, 16)
    found = shapes(graft)
    assert sum(k for k, _ in found.values()) == options["final_r"] * len(found)
    assert all(k == rows for k, rows in found.values()) and len({k for k, _ in found.values()}) > 1
    assert selection.structure() == {n: list(v) for n, v in found.items()}
    for p in graft.parameters():
        assert optimizer.state[p]["exp_avg"].shape == p.shape


class Two(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = torch.nn.Linear(6, 4), torch.nn.Linear(4, 3)

    def forward(self, x):
        return self.two(self.one(x))


def test_growth_ends_at_the_size_of_a_matrix_and_starts_below_it():
    model = Two()
    graft = graftwork.attach(model, "increlora", r=1, reserve=1, orth=0.0, target_modules=["one", "two"])
    selection = IncreLoRASelection(IncreLoRAGrowth(final_r=9, top=2, warmup=0, interval=1))
    selection.begin(context(graft))
    for at in range(8):
        model(torch.ones(2, 6)).sum().backward()
        selection.after_backward(context(graft, None, at))
        for p in graft.parameters():
            p.grad = None
        selection.after_step(context(graft, None, at))
    assert shapes(graft) == {"one": (3, 3), "two": (2, 2)}
    with pytest.raises(UsageError, match="more than 'two' has"):
        graftwork.attach(Two(), "increlora", r=3, target_modules=["one", "two"])


def test_sites_that_matter_grow_first():
    """Two of the sites get gradients a hundred times as large."""
    graft = attach(tiny.llama(), "increlora", r=2)
    selection = IncreLoRASelection(IncreLoRAGrowth(final_r=4, top=2, warmup=0, interval=5))
    selection.begin(context(graft))
    loud = list(graft.adapters)[3:9:5]
    generator = torch.Generator().manual_seed(0)
    for at in range(5):
        for name, adapter in graft.adapters.items():
            adapter.gate.grad = torch.rand(2, generator=generator) * (100.0 if name in loud else 1.0)
        selection.after_backward(context(graft, None, at))
        for adapter in graft.adapters.values():
            adapter.gate.grad = None
        selection.after_step(context(graft, None, at))
    assert [n for n, (k, _) in shapes(graft).items() if k == 3] == loud


@pytest.mark.parametrize("option", [{"beta1": 0.2}, {"beta2": 0.2}, {"top": 3}, {"warmup": 5}, {"interval": 3}, {"final_r": 3}])
def test_every_option_is_seen(option):
    def grown(options):
        graft = attach(tiny.llama(), "increlora", r=1)
        selection, seen = IncreLoRASelection(IncreLoRAGrowth(**{"final_r": 5, "top": 6, "warmup": 0, "interval": 2, **options})), []
        selection.begin(context(graft))
        generator = torch.Generator().manual_seed(2)
        for at in range(20):
            for adapter in graft.adapters.values():
                adapter.gate.grad = torch.randn(adapter.gate.shape, generator=generator)
            selection.after_backward(context(graft, None, at))
            for adapter in graft.adapters.values():
                adapter.gate.grad = None
            selection.after_step(context(graft, None, at))
            seen.append(shapes(graft))
        return seen

    assert grown({}) != grown(option)


@pytest.mark.slow
def test_plans_runs_resumes_and_loads(tmp_path):
    sections = {"adapter": {"method": "increlora", "alpha": 4.0}, "optimizer": {"method": "adamw", "lr": 1e-2}}
    made, whole = plans_runs_and_resumes(
        tmp_path, **sections, selection=[{"method": "increlora", "final_r": 3, "top": 5, "warmup": 0, "interval": 1}])
    graft, base = whole.grafts[0], folder(tmp_path)
    small = graftwork.plan(recipe(base, tmp_path / "d.jsonl", tmp_path / "p", **sections), estimate_time=False)
    learned = sum(p.nbytes for p in graft.parameters())
    assert made.categories["optimizer_state"] >= 2 * learned > small.categories["optimizer_state"]
    assert sum(k for k, _ in shapes(graft).values()) == 3 * len(graft.adapters)
    again = graftwork.load(base, dtype="fp32")[0]
    loaded = graftwork.attach_saved(again, tmp_path / "a" / "graft")
    assert shapes(loaded) == shapes(graft) and torch.equal(output(again, IDS), output(whole.model.eval(), IDS))


@pytest.mark.slow
def test_the_best_weights_come_back_in_their_own_shape(tmp_path):
    base, data = folder(tmp_path), completions(tmp_path / "d.jsonl")
    sections = {"adapter": {"method": "increlora", "alpha": 4.0}, "optimizer": {"method": "adamw", "lr": 0.0},
                "selection": [{"method": "increlora", "final_r": 3, "top": 5, "warmup": 2, "interval": 1}]}
    done = run(recipe(base, data, tmp_path / "a", train={"eval_steps": 1, "restore_best": True},
                      data={"eval": str(completions(tmp_path / "e.jsonl", seed=3))}, **sections))
    assert done.metrics and all(rows >= k for k, rows in shapes(done.grafts[0]).values())


def test_refusals(tmp_path, monkeypatch):
    base, data = folder(tmp_path), completions(tmp_path / "d.jsonl")
    with pytest.raises(UsageError, match="acts on adapter increlora, not on lora"):
        load_recipe(recipe(base, data, tmp_path / "o", selection=[{"method": "increlora"}]))
    with pytest.raises(UsageError, match="final_r 1 is less than the adapter's r 2"):
        IncreLoRASelection(IncreLoRAGrowth(final_r=1)).begin(context(attach(tiny.llama(), "increlora", r=2)))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(UsageError, match="train on one device"):
        IncreLoRASelection().begin(context(attach(tiny.llama(), "increlora")))
