"""LoHa: peft's layer (logits and gradients, in both forms), the exact LoRA of rank r^2, and that the rank is reached."""

from __future__ import annotations

import copy

import peft
import pytest
import torch

import graftwork
import tiny
from adapter_support import attach, close, fill, output, same_as_twin
from graftwork.errors import UsageError

IDS = tiny.tokens(2, 7)
NAMES = {"B1": "hada_w1_a", "A1": "hada_w1_b", "B2": "hada_w2_a", "A2": "hada_w2_b"}


def twin_of(model, graft, **options):
    """peft's LoHa on a copy of the model, with the values of the graft."""
    twin = peft.get_peft_model(copy.deepcopy(model), peft.LoHaConfig(**options)).eval()
    with torch.no_grad():
        for name, adapter in graft.adapters.items():
            layer = twin.base_model.model.get_submodule(name)
            for ours, theirs in NAMES.items():
                getattr(layer, theirs)["default"].copy_(getattr(adapter, ours))
    return twin


@pytest.mark.parametrize("r", [2, 8])
@pytest.mark.parametrize("kind, targets", [("llama", ["q_proj", "k_proj", "down_proj"]), ("bert", ["query", "output.dense"])])
def test_peft_gives_the_same_logits_and_gradients(kind, targets, r):
    """r = 2 is applied as factors of rank 4, r = 8 (rank 64) as a dense matrix."""
    model = tiny.ALL[kind]()
    plain = copy.deepcopy(model)
    graft = fill(graftwork.attach(model, "loha", r=r, alpha=10.0, rank_pattern={"k_proj": 3}, alpha_pattern={"k_proj": 5.0},
                                  target_modules=targets), size=0.3)
    twin = twin_of(plain, graft, r=r, alpha=10, target_modules=targets, rank_pattern={"k_proj": 3}, alpha_pattern={"k_proj": 5.0})
    same_as_twin(model, twin, plain, IDS, [
        (getattr(adapter, mine), getattr(twin.base_model.model.get_submodule(name), other)["default"])
        for name, adapter in graft.adapters.items() for mine, other in NAMES.items()])


def test_start_is_pefts():
    graft = graftwork.attach(tiny.llama(), "loha", r=4)
    for adapter in graft.adapters.values():
        assert not adapter.A2.any()
        for name, fan in (("B1", 4), ("B2", 4), ("A1", adapter.in_features)):
            bound = fan**-0.5
            assert 0.9 * bound < getattr(adapter, name).abs().max() <= bound


@torch.no_grad()
def test_the_lora_of_rank_r_squared_is_exact_and_full():
    model = tiny.llama()
    graft = attach(model, "loha", r=3, alpha=6.0)
    learned = output(model, IDS)
    pairs, error = graft.to_lora()
    assert error == 0.0
    for name, (B, A) in pairs.items():
        assert B.shape[1] == A.shape[0] == 9
        assert torch.linalg.matrix_rank(graft.delta_weights()[name]) == 9
    other = tiny.llama()
    lora = graftwork.attach(other, "lora", r=9)
    for name, adapter in lora.adapters.items():
        adapter.lora_B.copy_(pairs[name][0])
        adapter.lora_A.copy_(pairs[name][1])
    close(output(other, IDS), learned, 1e-5)


def test_count_and_refusal():
    graft = graftwork.attach(tiny.llama(), "loha", r=4, target_modules=["down_proj"])
    assert graft.parameter_count() == tiny.LAYERS * 2 * 4 * (tiny.HIDDEN + tiny.FFN)
    with pytest.raises(UsageError, match="r=40.*32 x 64"):
        attach(tiny.llama(), "loha", r=40)
