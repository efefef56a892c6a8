"""AdaLoRA against peft: the forward, the orthogonality term, and a whole run of its rank allocator; exact budgets; resuming."""

import json

import pytest
import torch

import graftwork
import tiny
from adapter_support import attach, close, output
from graftwork.errors import UsageError
from graftwork.recipe import load_recipe
from graftwork.registry import make_config
from graftwork.selection.adalora import AdaLoRABudget, AdaLoRASelection
from graftwork.selection.base import SelectionContext
from training_support import completions, folder, plans_runs_and_resumes, recipe

IDS = tiny.tokens(2, 9)
NAMES = ["q_proj", "k_proj", "down_proj"]


def pair(r=6, alpha=12.0, orth=0.3, total=24, **more):
    """(our graft, peft's model) of equal values."""
    from peft import AdaLoraConfig, get_peft_model

    graft = graftwork.attach(tiny.llama(), "adalora", r=r, alpha=alpha, orth=orth, target_modules=NAMES)
    peft = get_peft_model(tiny.llama(), AdaLoraConfig(init_r=r, lora_alpha=alpha, target_modules=NAMES, orth_reg_weight=orth,
                                                      total_step=total, **more))
    with torch.no_grad():
        for name, adapter in graft.adapters.items():
            layer = peft.base_model.model.get_submodule(name)
            layer.lora_A["default"].copy_(adapter.lora_A)
            layer.lora_B["default"].copy_(adapter.lora_B)
            layer.lora_E["default"].copy_(adapter.gate[:, None])
    return graft, peft


def context(graft, step, total, optimizer=None):
    return SelectionContext(graft.model, graft, list(graft.named_parameters()), optimizer, step, total, 0)


def test_forward_and_orthogonality_equal_peft():
    graft, peft = pair()
    with torch.no_grad():
        for name, adapter in graft.adapters.items():
            adapter.gate.normal_()
            peft.base_model.model.get_submodule(name).lora_E["default"].copy_(adapter.gate[:, None])
    close(output(graft.model, IDS), output(peft, IDS), 1e-5)
    plain = graft.model(IDS, labels=IDS).loss
    extra = torch.stack([a.auxiliary_loss() for a in graft.adapters.values()]).sum()
    torch.testing.assert_close(plain + extra, peft.base_model(input_ids=IDS, labels=IDS).loss, atol=1e-4, rtol=1e-5)
    assert graftwork.attach(tiny.llama(), "adalora", orth=0.0).adapters["model.layers.0.mlp.up_proj"].auxiliary_loss() is None
    for adapter in graft.adapters.values():
        assert 0.015 < adapter.lora_A.std() < 0.025 and 0.015 < adapter.lora_B.std() < 0.025


def test_a_run_allocates_like_peft():
    total, r, target = 24, 6, 2
    graft, peft = pair(r=r, total=total, target_r=target, tinit=4, tfinal=6, deltaT=2)
    allocator = peft.base_model.rankallocator
    selection = AdaLoRASelection(AdaLoRABudget(target_r=target, warmup=4, final=6, interval=2))
    mine, theirs = torch.optim.SGD(graft.parameters(), lr=0.3), torch.optim.SGD([p for p in peft.parameters() if p.requires_grad], lr=0.3)
    selection.begin(context(graft, 0, total))
    sites, masks = len(graft.adapters), set()
    for t in range(1, total + 1):
        ids = tiny.tokens(2, 9, t)
        mine.zero_grad()
        loss = graft.model(ids, labels=ids).loss + torch.stack([a.auxiliary_loss() for a in graft.adapters.values()]).sum()
        loss.backward()
        selection.after_backward(context(graft, t - 1, total))
        mine.step()
        selection.after_step(context(graft, t - 1, total))
        theirs.zero_grad()
        peft.base_model(input_ids=ids, labels=ids).loss.backward()
        if t < total - 6:
            allocator.update_ipt(peft.base_model)  # before the step, as in the paper
        theirs.step()
        budget, now = allocator.budget_schedule(t)
        assert selection.budget(t, total, r * sites, target * sites) == (budget, now)
        if now and budget < r * sites:
            allocator.mask_to_budget(peft.base_model, budget)
            assert sum(int((a.gate != 0).sum()) for a in graft.adapters.values()) == budget
        live = []
        for name, adapter in graft.adapters.items():
            E = peft.base_model.model.get_submodule(name).lora_E["default"].view(-1)
            assert torch.equal(adapter.gate != 0, E != 0), (t, name)
            torch.testing.assert_close(adapter.gate, E, atol=1e-5, rtol=1e-3)
            live.append(tuple((adapter.gate != 0).tolist()))
        masks.add(tuple(live))
    assert len(masks) > 3
    assert sum(int((a.gate != 0).sum()) for a in graft.adapters.values()) == target * sites


def test_ties_keep_exactly_the_budget():
    graft = attach(tiny.llama(), "adalora", r=4)
    selection = AdaLoRASelection(AdaLoRABudget(target_r=1, warmup=0, final=0, interval=1))
    for _, p in graft.named_parameters():
        p.grad = torch.zeros_like(p)  # all scores are zero
    selection.after_backward(context(graft, 0, 10))
    selection.after_step(context(graft, 9, 10))
    assert sum(int((a.gate != 0).sum()) for a in graft.adapters.values()) == len(graft.adapters)


@pytest.mark.parametrize("option", [{"beta1": 0.3}, {"beta2": 0.3}, {"target_r": 2}, {"warmup": 6}, {"final": 4}, {"interval": 3}])
def test_every_option_is_seen(option):
    def ranks(options):
        graft = attach(tiny.llama(), "adalora", r=4, target_modules=NAMES)
        selection, seen = AdaLoRASelection(AdaLoRABudget(**{"target_r": 1, "warmup": 0, "final": 0, "interval": 1, **options})), []
        generator = torch.Generator().manual_seed(2)
        for step in range(10):
            for _, p in graft.named_parameters():
                p.grad = torch.randn(p.shape, generator=generator) * torch.rand(p.shape, generator=generator)
            selection.after_backward(context(graft, step, 10))
            selection.after_step(context(graft, step, 10))
            seen.append([tuple((a.gate != 0).tolist()) for a in graft.adapters.values()])
        return seen

    assert ranks({}) != ranks(option)


@pytest.mark.slow
def test_plans_runs_resumes_and_saves_live_ranks_only(tmp_path):
    made, whole = plans_runs_and_resumes(
        tmp_path, adapter={"method": "adalora", "r": 4, "alpha": 20.0, "dropout": 0.1},
        selection=[{"method": "adalora", "target_r": 2, "warmup": 1, "final": 2, "interval": 1}])
    assert not made.notes
    adapters = whole.grafts[0].adapters
    assert sum(int((a.gate != 0).sum()) for a in adapters.values()) == 2 * len(adapters)
    tensors = json.loads((tmp_path / "a" / "graft" / "graft.json").read_text())["tensors"]
    for name, adapter in adapters.items():
        assert tensors[f"{name}.gate"][0] == [int((adapter.gate != 0).sum()) or 4]  # a site of zeros looks like a new one
    again = graftwork.load(folder(tmp_path), dtype="fp32")[0]
    graftwork.attach_saved(again, tmp_path / "a" / "graft")
    close(output(again, IDS), output(whole.model.eval(), IDS), 1e-5)


def test_refusals(tmp_path):
    base, data = folder(tmp_path), completions(tmp_path / "d.jsonl")
    with pytest.raises(UsageError, match="acts on adapter adalora, not on lora"):
        load_recipe(recipe(base, data, tmp_path / "o", selection=[{"method": "adalora"}]))
    graft = attach(tiny.llama(), "adalora", r=4)
    with pytest.raises(UsageError, match="target_r 5 is more than the adapter's r 4"):
        AdaLoRASelection(AdaLoRABudget(target_r=5)).begin(context(graft, 0, 10))
    with pytest.raises(UsageError, match="none of the 10 steps"):
        AdaLoRASelection(AdaLoRABudget(target_r=2, warmup=5, final=5)).begin(context(graft, 0, 10))
    with pytest.raises(UsageError, match="leave no steps"):
        make_config("selection", "adalora", warmup=0.5, final=0.5)
    with pytest.raises(UsageError, match="r=33.*allows"):
        graftwork.attach(tiny.llama(), "adalora", r=33)
