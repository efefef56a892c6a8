"""MiSS: PEFT's layer, the LoRA with a fixed A, and a forward pass that keeps r values a token."""

from __future__ import annotations

import copy

import peft
import pytest
import torch

import graftwork
import tiny
from adapter_support import attach, close, fill, output
from graftwork.adapters.miss import MiSSAdapter, ShardBank
from graftwork.errors import UsageError

IDS = tiny.tokens(2, 7)
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.mark.parametrize("r, mini_r", [(16, None), (5, None), (7, 8)])  # 16 divides 64 and 96; 5 and 7 divide neither
def test_peft(r, mini_r):
    model = tiny.llama()
    kind = {"init_weights": True} if mini_r is None else {"init_weights": "mini", "mini_r": mini_r}
    twin = peft.get_peft_model(copy.deepcopy(model), peft.MissConfig(r=r, target_modules=TARGETS, **kind))
    graft = fill(graftwork.attach(model, "miss", r=r, mini_r=mini_r, target_modules=TARGETS))
    layers = {name: twin.base_model.model.get_submodule(name) for name in graft.adapters}
    with torch.no_grad():
        for name, adapter in graft.adapters.items():
            assert layers[name].miss_block["default"].shape == adapter.miss_D.shape
            layers[name].miss_block["default"].copy_(adapter.miss_D)
    ours, theirs = output(model, IDS), output(twin, IDS)
    close(ours, theirs, 1e-5)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for name, adapter in graft.adapters.items():
        close(adapter.miss_D.grad, layers[name].miss_block["default"].grad, 1e-4)
    with torch.no_grad():
        graft.merge()
        close(output(model, IDS), output(twin.merge_and_unload(), IDS), 1e-5)


@pytest.mark.parametrize("r", [1, 5, 32, 64])
def test_the_change_repeats_one_shard(r):
    graft = attach(tiny.llama(), "miss", r=r)
    for name, change in graft.delta_weights().items():
        D = graft.adapters[name].miss_D.detach()
        for column in range(change.shape[1]):
            assert torch.equal(change[:, column], D[column % r])
        B, A = graft.adapters[name].factors()
        assert torch.equal(B.detach(), D.T) and A.sum(0).eq(1).all() and A.sum() == change.shape[1]
        assert sum(p.numel() for p in graft.adapters[name].parameters()) == r * change.shape[0]


def test_a_forward_pass_keeps_r_values_a_token():
    graft = attach(tiny.llama(), "miss", target_modules=["layers.0.mlp.down_proj"])
    (adapter,) = graft.adapters.values()
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        adapter.delta(torch.randn(2, 7, tiny.FFN) * 1.0, None)
    kept.pop(adapter.miss_D.untyped_storage().data_ptr(), None)
    assert sum(t.untyped_storage().nbytes() for t in kept.values()) == 4 * 14 * 5


@torch.no_grad()
def test_rows_of_one_r_share_the_sum():
    model = tiny.llama()
    first = attach(model, "miss")
    second = fill(graftwork.attach(model, "miss", r=5, mini_r=16, name="b"), 9)
    ids = tiny.tokens(3, 6)
    with graftwork.routing(model, ["b", None, "a"]):
        mixed = output(model, ids)
    with second.disabled():
        close(mixed[2], output(model, ids)[2])
    with first.disabled():
        close(mixed[0], output(model, ids)[0])
    pair = [next(iter(g.adapters.values())) for g in (first, second)]
    bank = MiSSAdapter.stack(pair, torch.float32)
    assert isinstance(bank, ShardBank) and bank.nbytes == 2 * 5 * tiny.HIDDEN * 4


def test_dropout_of_stacked_rows():
    model = tiny.llama()
    attach(model, "miss", dropout=0.5)
    attach(model, "miss", name="b", seed=4)
    with graftwork.routing(model, ["a", "b"]):
        plain = output(model, IDS)
        model.train()
        dropped = output(model, IDS)
    assert not torch.allclose(dropped[0], plain[0])
    close(dropped[1], plain[1])


def test_other_names_and_patterns():
    graft = graftwork.attach(tiny.llama(), "bone", r=8, rank_pattern={"q_proj": 4}, target_modules=["q_proj", "v_proj"])
    assert graft.method == "miss"
    assert {name.split(".")[-1]: a.r for name, a in graft.adapters.items()} == {"q_proj": 4, "v_proj": 8}


def test_shards_that_do_not_fit():
    with pytest.raises(UsageError, match="r=65.*allows 64"):
        graftwork.attach(tiny.llama(), "miss", r=65, target_modules=["q_proj"])
    with pytest.raises(UsageError, match="mini_r=48"):
        graftwork.attach(tiny.llama(), "miss", r=8, mini_r=48, target_modules=["q_proj"])
