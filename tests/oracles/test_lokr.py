"""LoKr: peft's layer (logits and gradients, every form), its division of sizes, the exact LoRA, ragged rows."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from peft.tuners.lokr.layer import factorization

import graftwork
import tiny
from adapter_support import attach, close, fill, output, same_as_twin
from graftwork.adapters.lokr import divided
from graftwork.errors import UsageError

IDS = tiny.tokens(2, 7)
NAMES = {"W1": "lokr_w1", "W1a": "lokr_w1_a", "W1b": "lokr_w1_b", "W2": "lokr_w2", "W2a": "lokr_w2_a", "W2b": "lokr_w2_b"}
FORMS = {"low rank W2": {"r": 3}, "both low rank": {"r": 2, "decompose_both": True}, "both whole": {"r": 8},
         "factor": {"r": 2, "decompose_factor": 4}, "wide W1": {"r": 3, "decompose_factor": 16}}


def test_sizes_are_divided_as_in_peft():
    for size in (*range(1, 130), 576, 1536, 4096, 11008):
        for factor in (-1, 1, 2, 3, 4, 8, 16, 100):
            assert divided(size, factor) == factorization(size, factor), (size, factor)


@pytest.mark.parametrize("kind, targets", [("llama", ["q_proj", "k_proj", "down_proj"]), ("bert", ["query", "output.dense"])])
@pytest.mark.parametrize("form", FORMS)
def test_peft_gives_the_same_logits_and_gradients(kind, targets, form):
    model = tiny.ALL[kind]()
    plain = copy.deepcopy(model)
    graft = fill(graftwork.attach(model, "lokr", alpha=10.0, target_modules=targets, **FORMS[form]), size=0.2)
    twin = peft.get_peft_model(copy.deepcopy(plain), peft.LoKrConfig(alpha=10, target_modules=targets, **FORMS[form])).eval()
    layers = {name: twin.base_model.model.get_submodule(name) for name in graft.adapters}
    with torch.no_grad():
        for name, adapter in graft.adapters.items():
            held = {n for n, other in NAMES.items() if "default" in getattr(layers[name], other)}
            assert held == {n for n, _ in adapter.named_parameters()}
            for mine, parameter in adapter.named_parameters():
                getattr(layers[name], NAMES[mine])["default"].copy_(parameter)
    same_as_twin(model, twin, plain, IDS, [
        (parameter, getattr(layers[name], NAMES[mine])["default"])
        for name, adapter in graft.adapters.items() for mine, parameter in adapter.named_parameters()])


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_the_lora_form_is_exact_and_no_larger_than_the_change(form):
    graft = attach(tiny.llama(), "lokr", **FORMS[form])
    pairs, error = graft.to_lora()
    assert error == 0.0
    for name, (B, A) in pairs.items():
        change = graft.delta_weights()[name]
        assert B.shape[1] <= min(change.shape)
        torch.testing.assert_close(B @ A, change, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_rows_may_divide_a_map_differently():
    model, ids = tiny.llama(), tiny.tokens(3, 6)
    attach(model, "lokr", name="a", seed=1, r=2)
    attach(model, "lokr", name="b", seed=2, r=2, decompose_factor=4)
    with graftwork.routing(model, ["b", "a", None]):
        mixed = output(model, ids)
    for i, name in enumerate("ba"):
        with graftwork.routing(model, [name] * 3):
            close(mixed[i], output(model, ids)[i])


def test_count_and_refusal():
    graft = graftwork.attach(tiny.llama(), "lokr", r=3, target_modules=["down_proj"])  # 64 x 96 = (8 8) x (8 12)
    assert graft.parameter_count() == tiny.LAYERS * (8 * 8 + 3 * (8 + 12))
    with pytest.raises(UsageError, match="divides nothing"):
        graftwork.attach(tiny.llama(), "lokr", decompose_factor=0)
