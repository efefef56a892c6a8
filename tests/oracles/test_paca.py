"""PaCA: equal to a LoRA with a frozen selector, to training the columns in place, and T r itemsize saved bytes a site."""

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
from graftwork.storage.base import make_storage

IDS = tiny.tokens(2, 7)


def test_columns_are_a_seeded_choice_without_repeats():
    graft = graftwork.attach(tiny.llama(), "paca", r=5)
    chosen = [tuple(a.columns.tolist()) for a in graft.adapters.values()]
    assert all(len(set(c)) == 5 and max(c) < a.in_features for c, a in zip(chosen, graft.adapters.values(), strict=True))
    assert len(set(chosen)) == len(chosen), "every site draws its own"
    with pytest.raises(UsageError, match="r=65.*allows 64"):
        graftwork.attach(tiny.llama(), "paca", r=65)


def test_adam_steps_equal_columns_trained_in_place():
    """The paper's form, in fp64: P = W[:, I] / s trained, the weight rebuilt at every step. Same trajectory."""
    model = tiny.llama().double()
    by_hand = copy.deepcopy(model)
    graft = graftwork.attach(model, "paca", r=6, alpha=15.0, target_modules=["q_proj", "down_proj"])
    for adapter in graft.adapters.values():
        adapter.double()
    by_hand.requires_grad_(False)
    names, scale = list(graft.adapters), 15.0 / 6
    pristine = {n: by_hand.get_submodule(n).weight.detach().clone() for n in names}
    columns = {n: graft.adapters[n].columns.long() for n in names}
    P = {n: (pristine[n][:, columns[n]] / scale).requires_grad_() for n in names}
    ours, theirs = torch.optim.Adam(graft.parameters(), lr=1e-3), torch.optim.Adam(P.values(), lr=1e-3)
    for _ in range(20):
        ours.zero_grad()
        output(model, IDS).square().mean().backward()
        ours.step()
        theirs.zero_grad()
        weights = {f"{n}.weight": pristine[n].index_copy(1, columns[n], P[n] * scale) for n in names}
        torch.func.functional_call(by_hand, weights, (IDS,)).logits.square().mean().backward()
        theirs.step()
    for name in names:
        got = pristine[name][:, columns[name]] + graft.adapters[name].S * scale
        assert (got - P[name] * scale).abs().max() < 1e-9
    merged = {f"{n}.weight": pristine[n].index_copy(1, columns[n], P[n].detach() * scale) for n in names}
    with torch.no_grad():
        close(output(model, IDS), torch.func.functional_call(by_hand, merged, (IDS,)).logits, 1e-9)


def test_it_is_a_lora_with_a_frozen_selector():
    """Through peft: A = the selector, B = S, alpha the same; logits and dL/dB equal."""
    model = tiny.llama()
    config = peft.LoraConfig(r=4, lora_alpha=10, target_modules=["q_proj", "up_proj"])
    twin = peft.get_peft_model(copy.deepcopy(model), config).eval()
    graft = fill(graftwork.attach(model, "paca", r=4, alpha=10.0, target_modules=["q_proj", "up_proj"]))
    with torch.no_grad():
        for name, adapter in graft.adapters.items():
            layer = twin.base_model.model.get_submodule(name)
            layer.lora_A["default"].weight.copy_(torch.eye(adapter.in_features)[adapter.columns.long()])
            layer.lora_B["default"].weight.copy_(adapter.S)
    ours, theirs = output(model, IDS), output(twin, IDS)
    close(ours, theirs, 1e-5)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for name, adapter in graft.adapters.items():
        close(adapter.S.grad, twin.base_model.model.get_submodule(name).lora_B["default"].weight.grad, 1e-4)


def saved_bytes(run, known):
    """Bytes of distinct storages saved for the backward pass that do not belong to `known` tensors."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = run()
    own = {t.untyped_storage().data_ptr() for t in known}
    return sum(s.nbytes() for pointer, s in kept.items() if pointer not in own), result


@pytest.mark.parametrize("alpha", [None, 9.0])
@pytest.mark.parametrize("storage", ["dense", "nf4"])
def test_saved_bytes_of_a_site(storage, alpha):
    """T r itemsize per site: x itself (64 or 96 wide) is kept by nothing at the site, whatever the storage."""
    model = tiny.llama()
    model.requires_grad_(False)
    kept = make_storage(model.model.layers[0].mlp.down_proj.weight, storage, make_config("storage", storage))
    model.model.layers[0].mlp.down_proj = kept
    graft = fill(graftwork.attach(model, "paca", r=5, alpha=alpha, target_modules=["layers.0.mlp.down_proj"]))
    (adapter,) = graft.adapters.values()
    tokens = 2 * 7
    x = torch.randn(2, 7, adapter.in_features, requires_grad=True)
    known = [*adapter.parameters(), *kept.parameters()]
    total, y = saved_bytes(lambda: kept(x * 1.0), known)
    assert total == tokens * 5 * 4
    full = fill(graftwork.attach(tiny.llama(), "lora", r=5, target_modules=["layers.0.mlp.down_proj"]))
    lora = next(iter(full.adapters.values()))
    module = full.model.model.layers[0].mlp.down_proj
    compared, _ = saved_bytes(lambda: module(x * 1.0), [*lora.parameters(), module.weight])
    assert compared >= tokens * adapter.in_features * 4, "a LoRA keeps all of x, so the count above can fail"
    y.sum().backward()
    assert adapter.S.grad.any() and x.grad.any()


def test_bf16_saves_bf16():
    module = torch.nn.Linear(64, 48).bfloat16().requires_grad_(False)
    graft = graftwork.attach(tiny.llama(), "paca", r=5, target_modules=["layers.0.self_attn.q_proj"])
    (adapter,) = graft.adapters.values()
    adapter.S = torch.nn.Parameter(torch.randn(48, 5))
    x = torch.randn(2, 7, 64, dtype=torch.bfloat16, requires_grad=True)
    total, _ = saved_bytes(lambda: adapter(x * 1, Base(product_of(module))), [*adapter.parameters(), *module.parameters()])
    assert total == (14 * 5 + 48 * 5) * 2  # the selected inputs, and S cast for the product


def test_merged_right_after_a_step():
    """No copy of the columns can be stale: merged = unmerged after the last optimizer step."""
    model = tiny.llama()
    graft = attach(model, "paca")
    optimizer = torch.optim.SGD(graft.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        output(model, IDS).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            live = output(model, IDS)
            graft.merge()
            close(output(model, IDS), live, 1e-5)
            graft.unmerge()


def test_only_the_chosen_columns_change():
    model = tiny.llama()
    graft = attach(model, "paca")
    for name, change in graft.delta_weights().items():
        moved = change.abs().sum(0).nonzero().flatten().tolist()
        assert moved == sorted(graft.adapters[name].columns.tolist())


def test_stored_columns_win_over_the_seed(tmp_path):
    """Columns that something else chose are in the artifact, not drawn again."""
    model = tiny.llama()
    graft = attach(model, "paca", r=3, target_modules=["q_proj"])
    for adapter in graft.adapters.values():
        adapter.columns.data.copy_(torch.tensor([2, 40, 63]))
    graft.save(tmp_path / "saved")
    again = tiny.llama()
    loaded = graftwork.attach_saved(again, tmp_path / "saved")
    assert all(a.columns.tolist() == [2, 40, 63] and a.columns.dtype == torch.int32 for a in loaded.adapters.values())
    assert torch.equal(output(again, IDS), output(model, IDS))
