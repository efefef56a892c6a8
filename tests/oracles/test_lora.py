"""LoRA, rsLoRA, patterns and LoRA+ against peft, and the card's identities."""

from __future__ import annotations

import copy

import peft
import pytest
import torch

import graftwork
import tiny
from adapter_support import attach, close, fill, output

IDS = tiny.tokens(2, 7)


def peft_twin(model, graft, **config):
    """The same model under peft, with our factors copied into it."""
    config["target_modules"] = r".*\.(q_proj|v_proj|down_proj)"
    twin = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**config)).eval()
    with torch.no_grad():
        for name, adapter in graft.adapters.items():
            layer = twin.base_model.model.get_submodule(name)
            layer.lora_A["default"].weight.copy_(adapter.lora_A)
            layer.lora_B["default"].weight.copy_(adapter.lora_B)
    return twin


@pytest.mark.parametrize("options", [
    {"r": 4},
    {"r": 4, "alpha": 10.0},
    {"r": 4, "alpha": 10.0, "use_rslora": True},
    {"r": 4, "alpha": 6.0, "rank_pattern": {"v_proj": 2, r"layers\.1\.mlp\.down_proj": 7}, "alpha_pattern": {"down_proj": 3.0}},
], ids=["plain", "alpha", "rslora", "patterns"])
def test_logits_and_gradients_equal_peft(options):
    model = tiny.llama()
    pristine = copy.deepcopy(model)
    graft = fill(graftwork.attach(model, "lora", target_modules=["q_proj", "v_proj", "down_proj"], **options))
    theirs = {k: v for k, v in options.items() if k != "alpha"}
    # peft's alpha defaults to 8 whatever r is; ours to r. Where rank_pattern names another rank, both keep alpha.
    twin = peft_twin(pristine, graft, lora_alpha=options.get("alpha", options["r"]), **theirs)
    ours, wanted = output(model, IDS), output(twin, IDS)
    close(ours, wanted, 1e-5)
    ours.square().sum().backward()
    wanted.square().sum().backward()
    for name, adapter in graft.adapters.items():
        layer = twin.base_model.model.get_submodule(name)
        close(adapter.lora_A.grad, layer.lora_A["default"].weight.grad, 1e-4)
        close(adapter.lora_B.grad, layer.lora_B["default"].weight.grad, 1e-4)


def test_start_and_first_gradients():
    graft = graftwork.attach(model := tiny.llama(), "lora", r=4)
    before = output(copy.deepcopy(tiny.llama()), IDS)
    assert torch.equal(output(model, IDS), before)
    output(model, IDS).square().sum().backward()
    for adapter in graft.adapters.values():
        bound = 1 / adapter.in_features**0.5
        assert adapter.lora_A.abs().max() <= bound and adapter.lora_A.std().item() == pytest.approx(bound / 3**0.5, rel=0.15)
        assert not adapter.lora_A.grad.any() and adapter.lora_B.grad.any()


def test_loraplus_groups_equal_peft():
    from peft.optimizers import create_loraplus_optimizer

    model = tiny.llama()
    pristine = copy.deepcopy(model)
    graft = fill(graftwork.attach(model, "lora", r=4, target_modules=["q_proj", "v_proj", "down_proj"], loraplus_lr_ratio=16.0))
    twin = peft_twin(pristine, graft, r=4, lora_alpha=4)
    theirs = create_loraplus_optimizer(twin, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, weight_decay=0.0)
    groups = [{"params": g["params"], "lr": 1e-3 * g["lr_scale"]} for g in graft.parameter_groups()]
    ours = torch.optim.AdamW(groups, weight_decay=0.0)
    for _ in range(3):
        for network, optimizer in ((model, ours), (twin, theirs)):
            optimizer.zero_grad()
            output(network, IDS).square().mean().backward()
            optimizer.step()
    close(output(model, IDS), output(twin, IDS), 1e-4)


def test_a_trained_bias_equals_peft():
    """bias='lora_only' trains a change of the bias; peft trains the bias itself. Same gradients, same function."""
    model = tiny.gpt2()
    pristine = copy.deepcopy(model)
    graft = fill(graftwork.attach(model, "lora", r=3, target_modules=["c_attn"], bias="lora_only"))
    twin = peft.get_peft_model(pristine, peft.LoraConfig(r=3, lora_alpha=3, target_modules=["c_attn"], fan_in_fan_out=True,
                                                         bias="lora_only")).eval()
    with torch.no_grad():
        for name, adapter in graft.adapters.items():
            layer = twin.base_model.model.get_submodule(name)
            layer.lora_A["default"].weight.copy_(adapter.lora_A)
            layer.lora_B["default"].weight.copy_(adapter.lora_B)
            layer.base_layer.bias += adapter.bias_change
    close(output(model, IDS), output(twin, IDS), 1e-5)
    output(model, IDS).square().sum().backward()
    output(twin, IDS).square().sum().backward()
    for name, adapter in graft.adapters.items():
        close(adapter.bias_change.grad, twin.base_model.model.get_submodule(name).base_layer.bias.grad, 1e-4)
    learned = output(model, IDS)
    graft.merge()
    close(output(model, IDS), learned, 1e-5)
    graft.unmerge()
    attach(model, "lora", name="plain", target_modules=["c_attn"])
    with torch.no_grad(), graftwork.routing(model, ["default", "plain"]):
        close(output(model, IDS)[0], learned[0], 1e-5)


def test_a_merge_that_is_refused_writes_nothing():
    """The second site's map has no bias that its change could go into."""
    model = tiny.gpt2()
    model.transformer.h[0].mlp.c_proj.bias = None
    graft = attach(model, "lora", target_modules=["c_fc", "c_proj"], bias="lora_only")
    fill(graft)
    with torch.no_grad():
        for adapter in graft.adapters.values():
            adapter.bias_change.normal_()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    with pytest.raises(graftwork.GraftworkError, match="no bias"):
        graft.merge()
    assert not graft.merged and all(torch.equal(before[name], weight) for name, weight in model.named_parameters())


def test_a_frozen_pair_is_subtracted():
    """An initializer's pair (B0, A0): the function is (W - B0 A0) x + s B A x, exact as factors of rank r + k."""
    model, by_hand = tiny.llama(), tiny.llama()
    graft = attach(model, "lora", alpha=8.0)
    generator = torch.Generator().manual_seed(1)
    for name, adapter in graft.adapters.items():
        B0 = torch.randn(adapter.out_features, 2, generator=generator) * 0.1
        A0 = torch.randn(2, adapter.in_features, generator=generator) * 0.1
        adapter.set_pair(B0, A0, in_storage=False)
        by_hand.get_submodule(name).weight.data += adapter.scale * adapter.lora_B.data @ adapter.lora_A.data - B0 @ A0
        assert adapter.factors()[1].shape == (6, adapter.in_features)
    close(output(model, IDS), output(by_hand, IDS))


def test_a_frozen_pair_is_saved(tmp_path):
    model = tiny.llama()
    graft = attach(model, "lora", target_modules=["q_proj"])
    for adapter in graft.adapters.values():
        adapter.set_pair(torch.full((adapter.out_features, 1), 0.05), torch.ones(1, adapter.in_features), in_storage=False)
    graft.save(tmp_path / "saved")
    again = tiny.llama()
    graftwork.attach_saved(again, tmp_path / "saved")
    assert torch.equal(output(again, IDS), output(model, IDS))
