"""VeRA: PEFT's layer with the pair of the same seed, the closed form in fp64, and a file of two vectors a site."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from safetensors.torch import load_file

import graftwork
import tiny
from adapter_support import attach, close, fill, output
from graftwork.adapters.vera import SharedPair, VectorBank
from graftwork.errors import ArtifactError, UsageError

IDS = tiny.tokens(2, 7)
TARGETS = ["q_proj", "v_proj", "down_proj"]  # three shapes: the pair is larger than any site


@pytest.mark.parametrize("d_initial", [0.1, 0.7])
def test_peft_with_the_same_seed(d_initial):
    """The start, outputs and gradients of PEFT's VeRA; its pair is not copied, the seed gives it."""
    model = tiny.llama()
    config = peft.VeraConfig(r=6, target_modules=TARGETS, projection_prng_key=17, d_initial=d_initial, save_projection=True)
    twin = peft.get_peft_model(copy.deepcopy(model), config)
    graft = graftwork.attach(model, "vera", r=6, d_initial=d_initial, target_modules=TARGETS, seed=17)
    layers = {name: twin.base_model.model.get_submodule(name) for name in graft.adapters}
    for name, adapter in graft.adapters.items():
        layer = layers[name]
        A, B = adapter.pair.on(torch.device("cpu"))
        assert torch.equal(layer.vera_A["default"], A) and torch.equal(layer.vera_B["default"], B)
        assert torch.equal(layer.vera_lambda_d["default"], adapter.vera_d)
        assert torch.equal(layer.vera_lambda_b["default"], adapter.vera_b)
    fill(graft)
    with torch.no_grad():
        for name, adapter in graft.adapters.items():
            layers[name].vera_lambda_d["default"].copy_(adapter.vera_d)
            layers[name].vera_lambda_b["default"].copy_(adapter.vera_b)
    ours, theirs = output(model, IDS), output(twin, IDS)
    close(ours, theirs, 1e-5)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for name, adapter in graft.adapters.items():
        close(adapter.vera_d.grad, layers[name].vera_lambda_d["default"].grad, 1e-4)
        close(adapter.vera_b.grad, layers[name].vera_lambda_b["default"].grad, 1e-4)
        close(adapter.delta_weight(None), layers[name].get_delta_weight("default"), 1e-5)


def test_the_change_is_the_closed_form():
    graft = attach(tiny.llama(), "vera")
    for name, change in graft.delta_weights().items():
        adapter = graft.adapters[name]
        B, A = (t.double() for t in adapter.frozen_pair())
        wanted = torch.diag(adapter.vera_b.double()) @ B @ torch.diag(adapter.vera_d.double()) @ A
        close(change, wanted, 1e-6)
        assert torch.linalg.matrix_rank(change) == 6
        assert sum(p.numel() for p in adapter.parameters()) == 6 + adapter.out_features


def test_all_sites_slice_one_pair():
    graft = attach(tiny.llama(), "vera", target_modules=TARGETS)
    whole_A, whole_B = graft.shared.on(torch.device("cpu"))
    assert whole_A.shape == (6, tiny.FFN) and whole_B.shape == (tiny.HIDDEN, 6)
    for adapter in graft.adapters.values():
        B, A = adapter.frozen_pair()
        assert A.data_ptr() == whole_A.data_ptr() and B.data_ptr() == whole_B.data_ptr(), "a site made a copy"


def test_the_artifact_holds_two_vectors_a_site(tmp_path):
    graft = attach(tiny.llama(), "vera", r=48)
    graft.save(tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / "graft.safetensors")
    sizes = sum(48 + a.out_features for a in graft.adapters.values())
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == 4 * sizes


def test_another_generator_is_noticed(tmp_path, monkeypatch):
    attach(tiny.llama(), "vera").save(tmp_path / "saved")
    real = SharedPair.draw
    monkeypatch.setattr(SharedPair, "draw", lambda self: tuple(t.flip(-1) for t in real(self)))
    with pytest.raises(ArtifactError, match="random pair"):
        graftwork.attach_saved(tiny.llama(), tmp_path / "saved")


@torch.no_grad()
def test_rows_on_one_pair_share_the_products():
    """Two grafts of one seed: the bank holds vectors, not factors, and the rows are the rows alone."""
    model = tiny.llama()
    first = attach(model, "vera", seed=3)
    second = fill(graftwork.attach(model, "vera", r=6, name="b", seed=3), 9)
    ids = tiny.tokens(4, 6)
    with graftwork.routing(model, ["b", "a", None, "a"]):
        mixed = output(model, ids)
    with second.disabled():
        alone = output(model, ids)
        close(mixed[1], alone[1])
        close(mixed[3], alone[3])
    with first.disabled():
        close(mixed[0], output(model, ids)[0])
    pairs = [(g.adapters[name] for g in (first, second)) for name in first.adapters]
    bank = type(next(iter(first.adapters.values()))).stack(list(pairs[0]), torch.float32)
    assert isinstance(bank, VectorBank) and bank.nbytes == 2 * 4 * (6 + tiny.HIDDEN)


def test_dropout_of_rows_on_one_pair():
    model = tiny.llama()
    attach(model, "vera", seed=3, dropout=0.5)
    attach(model, "vera", name="b", seed=3)
    with graftwork.routing(model, ["a", "b"]):
        plain = output(model, IDS)
        model.train()
        dropped = output(model, IDS)
    assert not torch.allclose(dropped[0], plain[0])
    close(dropped[1], plain[1])


def test_a_forward_pass_keeps_no_input():
    """2 r values a token and diag(b) B are saved for the backward pass, whatever the width of the input."""
    graft = attach(tiny.llama(), "vera", target_modules=["layers.0.mlp.down_proj"])
    (adapter,) = graft.adapters.values()
    x = torch.randn(2, 7, tiny.FFN)
    known = {t.untyped_storage().data_ptr() for t in [*adapter.parameters(), *graft.shared.on(x.device)]}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        adapter.delta(x * 1.0, None)
    assert sum(t.untyped_storage().nbytes() for p, t in kept.items() if p not in known) == 4 * (2 * 14 * 6 + 6 * tiny.HIDDEN)


def test_a_pair_drawn_without_gradients_can_be_trained_with():
    model = tiny.llama()
    graft = attach(model, "vera")
    with torch.inference_mode():
        output(model, IDS)
    output(model, IDS).square().sum().backward()
    assert all(p.grad.any() for p in graft.parameters())


def test_a_site_may_use_fewer_rows_but_not_more():
    sites = {"model.layers.0.self_attn.q_proj": 2}
    graft = graftwork.attach(tiny.llama(), "vera", r=6, ranks=sites, target_modules=TARGETS)
    assert graft.adapters["model.layers.0.self_attn.q_proj"].vera_d.shape == (2,)
    with pytest.raises(UsageError, match="rank 9"):
        graftwork.attach(tiny.llama(), "vera", r=6, ranks=dict.fromkeys(sites, 9), target_modules=TARGETS)


@torch.no_grad()
def test_a_pair_in_the_file_needs_no_generator(tmp_path, monkeypatch):
    model = tiny.llama()
    graft = attach(model, "vera", save_projection=True)
    wanted = output(model, IDS)
    twin = tiny.llama()
    attach(twin, "vera")
    assert torch.equal(output(twin, IDS), wanted), "the saved pair starts as the seed's"
    graft.save(tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / "graft.safetensors")
    assert tensors["shared.A"].shape == (6, tiny.FFN) and tensors["shared.B"].shape == (tiny.FFN, 6)
    assert len(tensors) == 2 + 2 * len(graft.adapters)
    assert graft.parameter_count() == sum(6 + a.out_features for a in graft.adapters.values()), "the pair is not trained"
    real = SharedPair.draw
    monkeypatch.setattr(SharedPair, "draw", lambda self: tuple(t.flip(-1) for t in real(self)))
    other = tiny.llama()
    graftwork.attach_saved(other, tmp_path / "saved")
    assert torch.equal(output(other, IDS), wanted)


@torch.no_grad()
def test_rows_on_two_saved_pairs_keep_their_own():
    """Of one seed, but one pair was changed, as a file's may be: no products are shared."""
    model = tiny.llama()
    first, second = (attach(model, "vera", name=name, seed=3, save_projection=True) for name in "ab")
    second.shared.A.mul_(2.0)
    with graftwork.routing(model, ["b", "a"]):
        mixed = output(model, IDS)
    for graft, row in ((first, 0), (second, 1)):
        with graft.disabled():
            close(mixed[row], output(model, IDS)[row])
