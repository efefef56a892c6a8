"""LoRA-XS: factors are the best rank-r part of W, one step is a projected full step, the file holds R alone; equal to peft's PSOFT
without its rotation."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import load_file

import graftwork
import tiny
from adapter_support import attach, close, fill, output
from graftwork.adapters._weights import principal
from graftwork.errors import ArtifactError, UsageError
from graftwork.registry import make_config
from graftwork.storage.base import apply_storage

IDS = tiny.tokens(2, 7)
TARGETS = ["q_proj", "k_proj", "down_proj"]


@pytest.mark.parametrize("svd", ["fast", "exact"])
def test_factors_are_the_best_rank_r_part_of_the_weight(svd):
    model = tiny.llama()
    graft = graftwork.attach(model, "lora_xs", r=5, svd=svd, target_modules=TARGETS, niter=60)
    for name, adapter in graft.adapters.items():
        U, S, Vh = torch.linalg.svd(model.get_submodule(name).weight.double(), full_matrices=False)
        close(adapter.B @ adapter.A, U[:, :5] * S[:5] @ Vh[:5], 1e-4)
        torch.testing.assert_close(adapter.B.T @ adapter.B, torch.eye(5), atol=1e-6, rtol=0)
        assert not adapter.A.requires_grad and not adapter.B.requires_grad


def test_signs_are_a_function_of_the_weight():
    W = torch.randn(20, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for seed, method in ((1, "fast"), (2, "fast"), (3, "exact")):
        U, S, Vh = principal(W, 4, method, 80, torch.Generator().manual_seed(seed))
        assert (Vh.gather(1, Vh.abs().argmax(1, keepdim=True)) > 0).all()
        wanted = principal(W, 4, "exact", 0, torch.Generator())
        torch.testing.assert_close((U, S, Vh), wanted, atol=1e-6, rtol=0)


def test_start_is_near_the_base():
    model = tiny.llama()
    before = output(model, IDS)
    graftwork.attach(model, "lora_xs", r=6)
    close(output(model, IDS), before, 1e-3)
    larger = tiny.llama()
    graft = graftwork.attach(larger, "lora_xs", r=6, init_std=0.5)
    assert all(0.2 < float(a.M.detach().std()) < 1.0 for a in graft.adapters.values())
    assert (output(larger, IDS) - before).abs().max() > 0.05 * before.abs().max()


def test_the_gradient_of_R_is_the_projection_of_the_full_one():
    """dR = s B^T G A^T; with orthonormal A it makes B dR A = s B B^T G A^T A, the projection of the full step."""
    model = tiny.llama().double()
    graft = graftwork.attach(model, "lora_xs", r=4, alpha=6.0, target_modules=TARGETS)
    for adapter in graft.adapters.values():
        adapter.double()
        adapter.M.data.zero_()
        adapter.A.data = torch.linalg.qr(adapter.A.data.T).Q.T.contiguous()
        adapter.B.data = torch.linalg.qr(adapter.B.data).Q.contiguous()
    names = list(graft.adapters)
    weights = {f"{n}.weight": model.get_submodule(n).weight.detach().clone().requires_grad_() for n in names}
    bare = tiny.llama().double()
    torch.func.functional_call(bare, weights, (IDS,)).logits.square().mean().backward()
    output(model, IDS).square().mean().backward()
    for name, adapter in graft.adapters.items():
        G = weights[f"{name}.weight"].grad
        close(adapter.B @ adapter.M.grad @ adapter.A, 1.5 * adapter.B @ adapter.B.T @ G @ adapter.A.T @ adapter.A, 1e-9)


def test_function_equals_peft_psoft_without_rotation():
    """PSOFT keeps S beside U: U S (R' - I) V^T is our U R S V^T with R = S (R' - I) S^-1."""
    model = tiny.llama()
    config = peft.PsoftConfig(r=4, psoft_alpha=4, target_modules=["q_proj"], psoft_orth=False, psoft_mag_a=False, psoft_mag_b=False)
    twin = peft.get_peft_model(copy.deepcopy(model), config).eval()
    graft = graftwork.attach(model, "lora_xs", r=4, svd="exact", target_modules=["q_proj"])
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, adapter in graft.adapters.items():
            layer = twin.base_model.model.get_submodule(name)
            U, S, Vh = torch.linalg.svd(model.get_submodule(name).weight, full_matrices=False)
            change = torch.randn(4, 4, generator=generator) * 0.2
            layer.psoft_R["default"].weight.copy_(torch.eye(4) + change)
            sign = torch.sign((adapter.B * U[:, :4]).sum(0))
            adapter.M.copy_(sign[:, None] * (S[:4, None] * change / S[:4]) * sign)
    with torch.no_grad():
        close(output(model, IDS), output(twin, IDS), 1e-4)


def test_count_and_file(tmp_path):
    model = tiny.llama()
    graft = attach(model, "lora_xs", r=5, rank_pattern={"v_proj": 3})
    sites = len(graft.adapters)
    narrow = sum(n.endswith("v_proj") for n in graft.adapters)
    assert graft.parameter_count() == 25 * (sites - narrow) + 9 * narrow
    graft.save(tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / "graft.safetensors")
    assert sum(t.numel() for t in tensors.values()) == graft.parameter_count() and all(k.endswith(".M") for k in tensors)


def test_another_basis_is_refused(tmp_path):
    graft = attach(tiny.llama(), "lora_xs")
    graft.save(tmp_path / "saved")
    card = json.loads((tmp_path / "saved" / "graft.json").read_text())
    adapter = next(iter(graft.adapters.values()))
    extra = card["extra"][adapter.site_name]
    adapter.check_extra(extra)
    adapter.B.data[:, 2] *= -1
    with pytest.raises(ArtifactError, match="taken from the frozen weight"):
        adapter.check_extra(extra)


def test_a_stored_base_gives_its_own_weight():
    """Without a file the factors come from the weight as it computes."""
    model = tiny.llama()
    apply_storage(model, make_config("storage", "nf4"))
    graft = graftwork.attach(model, "lora_xs", r=4, svd="exact", target_modules=["q_proj"])
    for name, adapter in graft.adapters.items():
        U, S, Vh = torch.linalg.svd(model.get_submodule(name).dequantize().double(), full_matrices=False)
        close(adapter.B @ adapter.A, U[:, :4] * S[:4] @ Vh[:4], 1e-4)


def test_saved_bytes_do_not_grow_with_the_width():
    """T r for R's gradient, R itself; x (T, 96) is kept by nothing at the site."""
    model = tiny.llama()
    graft = fill(graftwork.attach(model, "lora_xs", r=5, target_modules=["layers.0.mlp.down_proj"]))
    (adapter,) = graft.adapters.values()
    module, kept = model.model.layers[0].mlp.down_proj, {}
    x = torch.randn(2, 7, 96, requires_grad=True)
    own = {p.untyped_storage().data_ptr() for p in [*adapter.parameters(), *module.parameters()]}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(x * 1.0)
    assert sum(s.nbytes() for s in kept.values()) == 14 * 5 * 4


def test_few_power_iterations_are_less_exact():
    def error(niter):
        model = tiny.llama()
        graft = graftwork.attach(model, "lora_xs", r=4, niter=niter, target_modules=["up_proj"])
        return max(float((model.get_submodule(n).weight - a.B @ a.A).norm()) for n, a in graft.adapters.items())

    assert error(0) > error(10) * 1.01


def test_rank_larger_than_the_matrix():
    with pytest.raises(UsageError, match="r=33.*k_proj.*allows 32"):
        graftwork.attach(tiny.llama(), "lora_xs", r=33)
