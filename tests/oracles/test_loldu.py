"""LoLDU: the partial elimination equals LAPACK's factorization; the paper's residual form; gradients; the starts; the file."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file

import graftwork
import tiny
from adapter_support import attach, close, output
from graftwork.adapters.loldu import leading_ldu
from graftwork.errors import UsageError

IDS = tiny.tokens(2, 7)
TARGETS = ["q_proj", "k_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("shape", [(20, 20), (20, 33), (33, 20)])
def test_r_steps_equal_the_whole_factorization(shape):
    W = torch.randn(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    P, L, U = torch.linalg.lu(W)
    D = torch.diagonal(U)
    for r in (1, 7, 20):
        ours = leading_ldu(W, r)
        for got, wanted in zip(ours, ((P @ L)[:, :r], D[:r], U[:r] / D[:r, None]), strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-9, rtol=1e-7)
    L20, D20, U20 = leading_ldu(W, 20)
    torch.testing.assert_close(L20 * D20 @ U20, W)
    assert (torch.diagonal(U20) == 1).all() and (L20.abs() <= 1).all()


def test_zero_pivots_divide_nothing():
    W = torch.randn(12, 10, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    W[:, 1] = W[:, 0] * 2
    W[:, 4] = 0.0
    L, D, U = leading_ldu(W, 10)
    assert all(torch.isfinite(t).all() and t.abs().max() < 1e3 for t in (L, D, U)) and D[1] == D[4] == 1.0
    torch.testing.assert_close(L * D @ U, W)


def test_it_is_the_papers_residual_form():
    """(W - s L diag(z0) U) + s L diag(z) U in the weight, by hand."""
    model = tiny.llama()
    by_hand = copy.deepcopy(model)
    graft = attach(model, "loldu", r=6, alpha=9.0, init="ldu", target_modules=TARGETS)
    with torch.no_grad():
        for name, adapter in graft.adapters.items():
            weight = by_hand.get_submodule(name).weight
            P, L, U = torch.linalg.lu(weight.double())
            D = torch.diagonal(U)
            part = (P @ L)[:, :6], U[:6] / D[:6, None]
            residual = weight.double() - 1.5 * part[0] * D[:6] @ part[1]
            weight.copy_(residual + 1.5 * part[0] * adapter.z.double() @ part[1])
        close(output(model, IDS), output(by_hand, IDS), 1e-4)


def test_gradient_of_z():
    """dz_i = s (P L)[:, i]^T G U[i, :]^T with G the gradient of the full weight."""
    model = tiny.llama().double()
    graft = graftwork.attach(model, "loldu", r=5, alpha=7.0, target_modules=TARGETS)
    for adapter in graft.adapters.values():
        adapter.double()
    weights = {f"{n}.weight": model.get_submodule(n).weight.detach().clone().requires_grad_() for n in graft.adapters}
    torch.func.functional_call(tiny.llama().double(), weights, (IDS,)).logits.square().mean().backward()
    output(model, IDS).square().mean().backward()
    for name, adapter in graft.adapters.items():
        G = weights[f"{name}.weight"].grad
        close(adapter.z.grad, 1.4 * torch.diagonal(adapter.L.T @ G @ adapter.U.T), 1e-9)


def test_every_start():
    before = output(tiny.llama(), IDS)

    def start(init, seed=0):
        model = tiny.llama()
        graft = graftwork.attach(model, "loldu", r=8, init=init, target_modules=["up_proj"], seed=seed)
        return graft, output(model, IDS), torch.stack([a.z.detach() for a in graft.adapters.values()])

    diagonal = start("ldu")[2]
    for init in ("ldu", "uniform", "normal", "constant"):
        graft, logits, z = start(init)
        assert torch.equal(logits, before) and all(torch.equal(a.z, a.z0) for a in graft.adapters.values())
        assert init == "ldu" or not torch.equal(z, diagonal)
    assert (start("uniform")[2] <= diagonal.amax(1, keepdim=True)).all() and (start("uniform")[2] >= diagonal.amin(1, keepdim=True)).all()
    torch.testing.assert_close(start("constant")[2], diagonal.mean(1, keepdim=True).expand_as(diagonal))
    values = [start(init)[2] for init in ("normal", "uniform", "standard_normal", "standard_uniform")]
    again = [start(init, seed=1)[2] for init in ("normal", "uniform", "standard_normal", "standard_uniform")]
    assert not any(torch.equal(a, b) for a, b in zip(values, again, strict=True))
    for init in ("ones", "zeros", "standard_normal", "standard_uniform"):
        graft, logits, z = start(init)
        assert not torch.allclose(logits, before, rtol=1e-4) and z.abs().max() < 5
        for name, change in graft.delta_weights().items():
            adapter = graft.adapters[name]
            close(change, adapter.L * (adapter.z - adapter.z0) @ adapter.U, 1e-5)
            torch.testing.assert_close(adapter.z0.detach(), diagonal[int(name.split(".")[2])])
    assert (start("ones")[2] == 1).all() and (start("zeros")[2] == 0).all()


@pytest.mark.parametrize("init", ["ldu", "normal", "standard_normal"])
def test_the_file_holds_r_numbers_a_site(tmp_path, init):
    model = tiny.llama()
    graft = attach(model, "loldu", r=5, init=init, rank_pattern={"v_proj": 2})
    wanted = sum(2 if n.endswith("v_proj") else 5 for n in graft.adapters)
    graft.save(tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / "graft.safetensors")
    assert graft.parameter_count() == sum(t.numel() for t in tensors.values()) == wanted
    again = tiny.llama()
    graftwork.attach_saved(again, tmp_path / "saved")
    assert torch.equal(output(again, IDS), output(model, IDS))


def test_rank_larger_than_the_matrix():
    with pytest.raises(UsageError, match="r=33.*k_proj.*allows 32"):
        graftwork.attach(tiny.llama(), "loldu", r=33)
