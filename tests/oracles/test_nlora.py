"""NLoRA: the start by its formula, Nystrom's exact recovery, the base after subtraction, SLoRA and IntTune, counts and files."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file

import graftwork
import tiny
from adapter_support import attach, close, fill, output
from graftwork.errors import UsageError
from graftwork.registry import make_config

IDS = tiny.tokens(2, 7)
TARGETS = ["q_proj", "k_proj", "up_proj", "down_proj"]


def weight(model, name):
    return model.get_submodule(name).weight.detach()


@pytest.mark.parametrize("variant", ["nlora", "inttune"])
def test_official_start(variant):
    """subtract_init=False: the output moves by s W[:, :r] W[:r, :r] W[:r, :] x."""
    model = tiny.llama()
    by_hand = copy.deepcopy(model)
    graft = graftwork.attach(model, "nlora", r=6, alpha=9.0, variant=variant, subtract_init=False, target_modules=TARGETS)
    with torch.no_grad():
        for name, change in graft.delta_weights().items():
            W = weight(model, name)
            close(change, 1.5 * W[:, :6] @ W[:6, :6] @ W[:6], 1e-5)
            by_hand.get_submodule(name).weight.add_(1.5 * W[:, :6] @ W[:6, :6] @ W[:6])
        close(output(model, IDS), output(by_hand, IDS), 1e-4)
        assert (output(model, IDS) - output(tiny.llama(), IDS)).abs().max() > 1e-2
    assert all(a.base_edit() is None for a in graft.adapters.values())


@pytest.mark.parametrize("variant", ["nlora", "inttune"])
@pytest.mark.parametrize("center", ["block", "pinv"])
def test_subtracted_start_is_the_base(variant, center):
    model = tiny.llama()
    graft = graftwork.attach(model, "nlora", r=6, alpha=3.0, variant=variant, center=center, target_modules=TARGETS)
    close(output(model, IDS), output(tiny.llama(), IDS), 2e-5 if center == "pinv" else 2e-6)
    for name, adapter in graft.adapters.items():
        W = weight(model, name).double()
        middle = torch.linalg.pinv(W[:6, :6]) if center == "pinv" else W[:6, :6]
        close(adapter.M, middle, 1e-5)
        B0, A0 = adapter.base_edit()
        close(B0 @ A0, 0.5 * W[:, :6] @ middle @ W[:6], 1e-4)


@pytest.mark.parametrize("landmarks", ["leading", "random"])
def test_nystrom_recovers_a_weight_of_rank_r(landmarks):
    model = tiny.llama()
    generator = torch.Generator().manual_seed(3)
    for layer in model.model.layers:
        low = torch.randn(96, 5, generator=generator) @ torch.randn(5, 64, generator=generator)
        layer.mlp.up_proj.weight.data.copy_(low / 10)
    graft = graftwork.attach(model, "nlora", r=5, center="pinv", landmarks=landmarks, target_modules=["up_proj"])
    for name, adapter in graft.adapters.items():
        close(adapter.B @ adapter.M @ adapter.A, weight(model, name), 1e-3)


def test_random_landmarks_are_rows_and_columns_by_the_seed():
    def start(seed):
        model = tiny.llama()
        return model, graftwork.attach(model, "nlora", r=5, landmarks="random", target_modules=["up_proj"], seed=seed)

    model, graft = start(1)
    for name, adapter in graft.adapters.items():
        W = weight(model, name)
        rows = [int((W == row).all(1).nonzero()) for row in adapter.A.detach()]
        columns = [int((W == column[:, None]).all(0).nonzero()) for column in adapter.B.detach().T]
        assert len(set(rows)) == len(set(columns)) == 5 and rows != list(range(5)) and torch.equal(adapter.M, W[rows][:, columns])
    assert not torch.equal(next(iter(start(2)[1].adapters.values())).A, next(iter(graft.adapters.values())).A)


def test_slora_starts_at_the_base_without_the_weight():
    model = tiny.llama()
    graft = graftwork.attach(model, "nlora", r=6, variant="slora", target_modules=TARGETS)
    assert torch.equal(output(model, IDS), output(tiny.llama(), IDS))
    for adapter in graft.adapters.values():
        assert not adapter.B.any() and adapter.A.abs().max() <= adapter.in_features**-0.5 and adapter.M.abs().max() <= 6**-0.5
        assert adapter.A.requires_grad and adapter.M.requires_grad and adapter.A0 is None and adapter.stored_extra() is None
    output(model, IDS).square().mean().backward()
    assert all(a.B.grad.any() and not a.A.grad.any() for a in graft.adapters.values())
    for wrong in ({"center": "pinv"}, {"landmarks": "random"}, {"subtract_init": False}):
        with pytest.raises(UsageError, match="slora does not have"):
            make_config("adapter", "nlora", variant="slora", **wrong)
    with pytest.raises(UsageError, match="needs subtract_init"):
        make_config("adapter", "nlora", center="pinv", subtract_init=False)


def test_inttune_trains_the_middle_alone():
    model = tiny.llama()
    graft = graftwork.attach(model, "nlora", r=5, variant="inttune")
    before = {n: (a.A.clone(), a.B.clone()) for n, a in graft.adapters.items()}
    optimizer = torch.optim.AdamW(graft.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        output(model, IDS).square().mean().backward()
        optimizer.step()
    for name, adapter in graft.adapters.items():
        assert torch.equal(adapter.A, before[name][0]) and torch.equal(adapter.B, before[name][1])
        assert not torch.equal(adapter.M, adapter.M0) and adapter.factors()[1].shape[0] == 5


@pytest.mark.parametrize("options", [{}, {"subtract_init": False}, {"variant": "slora"}, {"variant": "inttune"},
                                     {"variant": "inttune", "subtract_init": False, "landmarks": "random"}, {"center": "pinv"}], ids=str)
def test_count_file_and_reload(tmp_path, options):
    model = tiny.llama()
    graft = fill(graftwork.attach(model, "nlora", r=4, rank_pattern={"v_proj": 3}, target_modules=["v_proj", "up_proj"], **options))
    inner = options.get("variant") == "inttune"
    wanted = sum(r * r + (0 if inner else r * (a.in_features + a.out_features))
                 for n, a in graft.adapters.items() for r in [3 if n.endswith("v_proj") else 4])
    graft.save(tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / "graft.safetensors")
    assert graft.parameter_count() == sum(t.numel() for t in tensors.values()) == wanted
    again = tiny.llama()
    loaded = graftwork.attach_saved(again, tmp_path / "saved")
    assert torch.equal(output(again, IDS), output(model, IDS))
    pairs, error = loaded.to_lora()
    rank = 8 if not inner and options.get("variant") != "slora" and options.get("subtract_init", True) else 4
    assert error == 0 and max(A.shape[0] for _, A in pairs.values()) == rank


@pytest.mark.parametrize("options", [{"variant": "slora"}, {"variant": "inttune"}, {"variant": "inttune", "subtract_init": False}], ids=str)
@torch.no_grad()
def test_variants_merge_and_share_a_batch(options):
    model = tiny.llama()
    graft = attach(model, "nlora", name="a", **{"landmarks": "leading", **options})
    attach(model, "nlora", name="b", seed=3)
    with graftwork.routing(model, ["a", "b", None]):
        mixed = output(model, tiny.tokens(3, 7))
    with graftwork.routing(model, ["a"] * 3):
        close(mixed[0], output(model, tiny.tokens(3, 7))[0])
    model.graft_state.grafts["b"].detach()
    learned = output(model, IDS)
    graft.merge()
    close(output(model, IDS), learned, 1e-4)


def test_rank_larger_than_the_matrix():
    with pytest.raises(UsageError, match="r=33.*k_proj.*allows 32"):
        graftwork.attach(tiny.llama(), "nlora", r=33)
