"""OFT: peft's layer (logits, gradients, merged weights; series and exact), orthogonality, the Cayley closed form, ragged rows."""

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
TARGETS = {"llama": ["q_proj", "down_proj"], "bert": ["query", "output.dense"]}
FORMS = {"exact": {}, "series": {"neumann_terms": 5}, "long series": {"neumann_terms": 8}, "shared": {"block_share": True}}


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("form", FORMS)
def test_peft_gives_the_same_logits_gradients_and_merged_model(kind, form):
    options = FORMS[form]
    model = tiny.ALL[kind]()
    plain = copy.deepcopy(model)
    graft = fill(graftwork.attach(model, "oft", block_size=8, target_modules=TARGETS[kind], **options))
    terms = options.get("neumann_terms")
    config = peft.OFTConfig(oft_block_size=8, target_modules=TARGETS[kind], block_share=options.get("block_share", False),
                            use_cayley_neumann=terms is not None, num_cayley_neumann_terms=terms or 5)
    twin = peft.get_peft_model(copy.deepcopy(plain), config).eval()
    layers = {name: twin.base_model.model.get_submodule(name).oft_R["default"] for name in graft.adapters}
    sign = 1.0 if terms else -1.0  # peft's exact form is the inverse rotation
    with torch.no_grad():
        for name, adapter in graft.adapters.items():
            layers[name].weight.copy_(adapter.upper * sign)
    same_as_twin(model, twin, plain, IDS, [(adapter.upper, layers[name].weight, sign) for name, adapter in graft.adapters.items()])
    with torch.no_grad():
        graft.merge()
        for name in graft.adapters:
            layer = twin.base_model.model.get_submodule(name)
            layer.merge()
            close(model.get_submodule(name).weight, layer.base_layer.weight, 1e-5)


def test_the_rotation_is_the_cayley_transform_and_orthogonal():
    graft = attach(tiny.llama(), "oft", block_size=16, target_modules=["down_proj"])
    for adapter in graft.adapters.values():
        R = adapter.turns().double() + torch.eye(16)
        assert (R @ R.transpose(1, 2) - torch.eye(16)).abs().max() < 1e-5
        Q = torch.zeros(6, 16, 16, dtype=torch.float64)
        for block in range(6):
            entries = iter(adapter.upper[block].tolist())
            for i in range(16):
                for j in range(i + 1, 16):
                    Q[block, i, j] = next(entries)
                    Q[block, j, i] = -Q[block, i, j]
        close(R, (torch.eye(16) + Q) @ torch.linalg.inv(torch.eye(16) - Q), 1e-5)
    series = attach(tiny.llama(), "oft", block_size=16, target_modules=["down_proj"], neumann_terms=4)
    for adapter in series.adapters.values():
        R = adapter.turns() + torch.eye(16)
        assert (R @ R.transpose(1, 2) - torch.eye(16)).abs().max() > 1e-3, "the series is cut off"


@torch.no_grad()
def test_angles_and_lengths_of_the_rows_stay():
    model = tiny.llama()
    graft = attach(model, "oft")
    for name, change in graft.delta_weights().items():
        weight = model.get_submodule(name).weight.double()
        close((weight + change) @ (weight + change).T, weight @ weight.T, 1e-5)


@torch.no_grad()
def test_rows_may_have_blocks_of_different_sizes():
    model, ids = tiny.llama(), tiny.tokens(3, 6)
    attach(model, "oft", name="a", seed=1, block_size=8)
    attach(model, "oft", name="b", seed=2, block_size=16, block_share=True)
    with graftwork.routing(model, ["b", "a", None]):
        mixed = output(model, ids)
    for i, name in enumerate("ba"):
        with graftwork.routing(model, [name] * 3):
            close(mixed[i], output(model, ids)[i])


def test_count_sizes_and_refusal():
    graft = attach(tiny.llama(), "oft", target_modules=["down_proj"], block_size=8)
    assert graft.parameter_count() == tiny.LAYERS * tiny.FFN * (8 - 1) // 2
    shared = attach(tiny.llama(), "oft", target_modules=["down_proj"], block_size=8, block_share=True)
    assert shared.parameter_count() == tiny.LAYERS * 8 * 7 // 2
    with pytest.raises(UsageError, match="blocks of 64.*96 inputs") as refused:
        attach(tiny.llama(), "oft", block_size=64)
    assert "block_size=48" in str(refused.value.remedy)
    mixed = attach(tiny.llama(), "oft", block_size=64, block_size_pattern={"down_proj": 48})
    assert {a.size for a in mixed.adapters.values()} == {64, 48}


@torch.no_grad()
def test_a_kept_rotation_follows_the_values():
    graft = attach(tiny.llama(), "oft", target_modules=["q_proj"])
    adapter = next(iter(graft.adapters.values()))
    first = adapter.turns()
    assert adapter.turns() is first
    adapter.upper.mul_(2.0)
    assert not torch.equal(adapter.turns(), first)
