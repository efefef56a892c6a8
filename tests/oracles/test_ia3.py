"""(IA)^3: peft's layer (logits, gradients, merged weights and biases), both sides of a map, rows, the bf16 form."""

from __future__ import annotations

import copy

import peft
import pytest
import torch

import graftwork
import tiny
from adapter_support import attach, close, fill, output

IDS = tiny.tokens(2, 7)
TARGETS = {"llama": ["k_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"], "bert": ["key", "value", "output.dense"]}
FEEDFORWARD = {"llama": ["down_proj"], "gpt2": ["mlp.c_proj"], "bert": ["output.dense"]}


def twin_of(model, graft, kind):
    """peft's IA3 on a copy of the model, with the values of the graft."""
    config = peft.IA3Config(target_modules=TARGETS[kind], feedforward_modules=FEEDFORWARD[kind], fan_in_fan_out=kind == "gpt2")
    twin = peft.get_peft_model(copy.deepcopy(model), config).eval()
    with torch.no_grad():
        for name, adapter in graft.adapters.items():
            layer = twin.base_model.model.get_submodule(name)
            assert layer.is_feedforward == adapter.feedforward
            layer.ia3_l["default"].copy_((adapter.growth + 1).view(layer.ia3_l["default"].shape))
    return twin


@pytest.mark.parametrize("kind", TARGETS)
def test_peft_gives_the_same_logits_gradients_and_merged_model(kind):
    model = tiny.ALL[kind]()
    plain = copy.deepcopy(model)
    graft = fill(graftwork.attach(model, "ia3", target_modules=TARGETS[kind], feedforward_modules=FEEDFORWARD[kind]))
    twin = twin_of(plain, graft, kind)
    ours, theirs = output(model, IDS), output(twin, IDS)
    close(ours, theirs, 1e-5)
    assert (ours - output(plain, IDS)).abs().max() > 1e-2
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for name, adapter in graft.adapters.items():
        close(adapter.growth.grad, twin.base_model.model.get_submodule(name).ia3_l["default"].grad.flatten(), 1e-4)
    with torch.no_grad():
        graft.merge()
        merged = twin.merge_and_unload()
    for (name, wanted), (_, got) in zip(merged.named_parameters(), [(n, p) for n, p in model.named_parameters() if ".graft" not in n],
                                        strict=True):
        assert (got - wanted).abs().max() < 1e-6, name


def test_the_bias_is_scaled_and_comes_back():
    model = tiny.gpt2()
    graft = attach(model, "ia3", target_modules=["h.0.attn.c_attn"])
    ((name, adapter),) = graft.adapters.items()
    bias = model.get_submodule(name).bias
    before = bias.detach().clone()
    with torch.no_grad():
        close(adapter.delta_bias(), before * adapter.growth, 1e-6)
        graft.merge()
        close(bias, before * (1 + adapter.growth), 1e-6)
        graft.unmerge()
    assert torch.equal(bias, before)


def test_which_side_is_scaled():
    def sides(model, **options):
        graft = graftwork.attach(model, "ia3", **options)
        return {n for n, a in graft.adapters.items() if a.feedforward}

    assert sides(tiny.llama()) == {f"model.layers.{i}.mlp.down_proj" for i in range(tiny.LAYERS)}
    assert sides(tiny.gpt2()) == {f"transformer.h.{i}.mlp.c_proj" for i in range(tiny.LAYERS)}
    experts = sides(tiny.mixtral())
    assert experts and all(".experts.down_proj." in n for n in experts)
    assert sides(tiny.llama(), feedforward_modules=[]) == set()
    assert sides(tiny.llama(), feedforward_modules=r".*\.0\..*q_proj") == {"model.layers.0.self_attn.q_proj"}


def test_the_papers_choice_has_three_vectors_a_layer():
    graft = graftwork.attach(tiny.llama(), "ia3", target_modules="k,v,down")
    head = tiny.HIDDEN // tiny.HEADS
    assert graft.parameter_count() == tiny.LAYERS * (2 * tiny.KV_HEADS * head + tiny.FFN)


@torch.no_grad()
def test_rows_may_scale_different_sides_of_one_map():
    model = tiny.gpt2()
    target = {"target_modules": ["mlp.c_proj"]}
    attach(model, "ia3", name="inner", seed=1, **target)
    attach(model, "ia3", name="outer", seed=2, feedforward_modules=[], **target)
    ids = tiny.tokens(3, 6)
    with graftwork.routing(model, ["outer", None, "inner"]):
        mixed = output(model, ids)
    for i, name in ((0, "outer"), (2, "inner")):
        with graftwork.routing(model, [name] * 3):
            close(mixed[i], output(model, ids)[i])
        alone = tiny.gpt2()
        attach(alone, "ia3", seed={"inner": 1, "outer": 2}[name], **target,
               **({} if name == "inner" else {"feedforward_modules": []}))
        close(mixed[i], output(alone, ids)[i])


@torch.no_grad()
def test_small_factors_are_not_lost_in_bf16():
    """l = 1.003 is one in bf16; the difference from one is kept and moves the outputs in the mean."""
    model = tiny.llama(dtype=torch.bfloat16)
    graft = graftwork.attach(model, "ia3", target_modules=["layers.0.mlp.up_proj"])
    ((name, adapter),) = graft.adapters.items()
    adapter.growth.fill_(3e-3)
    x = torch.randn(400, adapter.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
    base = graft.base_of(graft.sites[name])
    before = base(x).float()
    moved = ((adapter(x, base).float() - before) * before).sum() / before.square().sum()
    assert 1.5e-3 < moved < 4.5e-3
