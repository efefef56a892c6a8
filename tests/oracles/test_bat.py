"""BAT: PEFT's layer, the block formula in fp64, and a backward pass that keeps nothing of the size of W."""

from __future__ import annotations

import copy

import peft
import pytest
import torch

import graftwork
import tiny
from adapter_support import attach, close, fill, output
from graftwork.errors import UsageError
from graftwork.modeling.protocols import Base, product_of
from graftwork.registry import make_config
from graftwork.storage.base import apply_storage

IDS = tiny.tokens(2, 7)
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.mark.parametrize("r", [8, 32])
def test_peft(r):
    model = tiny.llama()
    twin = peft.get_peft_model(copy.deepcopy(model), peft.MissConfig(r=r, target_modules=TARGETS, init_weights="bat"))
    graft = fill(graftwork.attach(model, "bat", r=r, target_modules=TARGETS))
    layers = {name: twin.base_model.model.get_submodule(name) for name in graft.adapters}
    with torch.no_grad():
        for name, adapter in graft.adapters.items():
            layers[name].miss_block["default"].copy_(adapter.bat_D)
    ours, theirs = output(model, IDS), output(twin, IDS)
    close(ours, theirs, 1e-5)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for name, adapter in graft.adapters.items():
        close(adapter.bat_D.grad, layers[name].miss_block["default"].grad, 1e-4)


def test_the_block_formula():
    model = tiny.llama()
    graft = attach(model, "bat")
    for name, change in graft.delta_weights().items():
        W, D = model.get_submodule(name).weight.double(), graft.adapters[name].bat_D.double()
        for i in range(W.shape[0] // 8):
            for j in range(W.shape[1] // 8):
                block = slice(8 * i, 8 * i + 8), slice(8 * j, 8 * j + 8)
                close(change[block], W[block] @ D[i] + D[i], 1e-5)
        merged = W + change.double()
        eye = torch.eye(8).double()
        back = torch.cat([torch.cat([(b - D[i]) @ torch.linalg.inv(eye + D[i]) for b in row.split(8, 1)], 1)
                          for i, row in enumerate(merged.split(8, 0))])
        close(back, W, 1e-5)  # the affine map is invertible, although unmerging never needs it
        assert torch.linalg.matrix_rank(change) > 8
        assert sum(p.numel() for p in graft.adapters[name].parameters()) == 8 * W.shape[0]


def test_the_hand_written_backward_pass():
    model = tiny.llama()
    graft = attach(model, "bat", target_modules=["down_proj"])
    name, adapter = next(iter(graft.adapters.items()))
    base = graft.base_of(graft.sites[name])
    x = torch.randn(2, 3, tiny.FFN, requires_grad=True)
    y = adapter.delta(x, base)
    wanted = torch.nn.functional.linear(x, adapter.delta_weight(base))
    close(y, wanted, 1e-5)
    G = torch.randn(y.shape)
    for got, right in zip(torch.autograd.grad(y, (x, adapter.bat_D), G), torch.autograd.grad(wanted, (x, adapter.bat_D), G)):
        close(got, right, 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [0, 1, 2, 8, 9])
def test_few_rows_are_the_same_product(tokens):
    """Up to r / 4 rows the change is not made; both ways give W D + D."""
    model = tiny.llama()
    graft = attach(model, "bat", r=32, target_modules=["down_proj"])
    (name, adapter), *_ = graft.adapters.items()
    base = graft.base_of(graft.sites[name])
    x = torch.randn(tokens, 1, tiny.FFN)
    got = adapter.delta(x, base)
    assert got.shape == (tokens, 1, tiny.HIDDEN)
    if tokens:
        close(got, x.double() @ adapter.delta_weight(base).double().T, 1e-5)


@pytest.mark.parametrize("storage", ["dense", "nf4"])
def test_a_forward_pass_keeps_its_input_only(storage):
    model = tiny.llama()
    apply_storage(model, make_config("storage", storage))
    graft = attach(model, "bat", target_modules=["layers.0.mlp.down_proj"])
    (name, adapter), kept = next(iter(graft.adapters.items())), {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        adapter.delta(torch.randn(2, 7, tiny.FFN), graft.base_of(graft.sites[name]))
    kept.pop(adapter.bat_D.untyped_storage().data_ptr())
    assert sum(t.untyped_storage().nbytes() for t in kept.values()) == 4 * 14 * tiny.FFN


def test_a_trained_weight_gets_the_gradient_of_the_change():
    module = torch.nn.Linear(16, 8, bias=False)
    graft = attach(tiny.llama(), "bat", r=8, target_modules=["layers.0.self_attn.q_proj"])
    (adapter,) = graft.adapters.values()
    adapter.in_features, adapter.out_features = 16, 8
    adapter.bat_D = torch.nn.Parameter(torch.randn(1, 8, 8))
    x = torch.randn(3, 16)
    adapter(x, Base(product_of(module))).sum().backward()
    eye = torch.eye(8)
    wanted = torch.ones(8, 3) @ x.view(3, 2, 8).transpose(0, 1) @ (eye + adapter.bat_D[0]).T
    close(module.weight.grad.view(8, 2, 8).transpose(0, 1), wanted, 1e-5)


def test_two_blocks_kinds_in_one_batch_on_a_slice_of_a_fused_map():
    """Each adapter sees its own rows of W: rows of a batch on a slice are the rows alone."""
    model = tiny.gpt2()
    first = attach(model, "bat", target_modules="q,v")
    second = fill(graftwork.attach(model, "bat", r=4, name="b", target_modules="q,v"), 9)
    with torch.no_grad():
        with graftwork.routing(model, ["b", "a"]):
            mixed = output(model, IDS)
        with second.disabled():
            close(mixed[1], output(model, IDS)[1])
        with first.disabled():
            close(mixed[0], output(model, IDS)[0])


def test_blocks_must_tile():
    with pytest.raises(UsageError, match="r=24.*64 x 64"):
        graftwork.attach(tiny.llama(), "bat", r=24, target_modules=["q_proj"])
    graft = graftwork.attach(tiny.llama(), "bat", r=24, rank_pattern={"q_proj": 8}, target_modules=["q_proj"])
    assert {a.r for a in graft.adapters.values()} == {8}
