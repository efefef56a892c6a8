"""KaSA against peft: truncated base, change, loss, gradients; the tail's energy; the two Gram forms; what is stored."""

from __future__ import annotations

import copy
import math

import peft
import pytest
import torch
from safetensors.torch import load_file

import graftwork
import tiny
from adapter_support import attach, close, fill, output
from graftwork.errors import ArtifactError, UsageError

IDS = tiny.tokens(2, 7)
TARGETS = ["q_proj", "k_proj", "down_proj"]


def twins(r=4, alpha=6.0, beta=0.3, gamma=0.2):
    model = tiny.llama()
    config = peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=TARGETS, kasa_config=peft.KasaConfig(beta=beta, gamma=gamma))
    twin = peft.get_peft_model(copy.deepcopy(model), config).eval()
    graft = fill(graftwork.attach(model, "kasa", r=r, alpha=alpha, beta=beta, gamma=gamma, target_modules=TARGETS))
    with torch.no_grad():
        for name, adapter in graft.adapters.items():
            layer = twin.base_model.model.get_submodule(name)
            layer.lora_A["default"].weight.copy_(adapter.A)
            layer.lora_B["default"].weight.copy_(adapter.B)
            layer.lora_diag["default"].copy_(adapter.sigma)
    return model, graft, twin


def test_logits_loss_and_gradients_equal_peft():
    model, graft, twin = twins()
    ours = output(model, IDS)
    wanted = output(twin, IDS)
    close(ours, wanted, 1e-4)
    mine = torch.stack([a.auxiliary_loss() for a in graft.adapters.values()]).sum()
    theirs = twin.base_model._get_kasa_loss()
    close(mine.detach(), theirs.detach(), 1e-5)
    (ours.square().mean() + mine).backward()
    (wanted.square().mean() + theirs).backward()
    for name, adapter in graft.adapters.items():
        layer = twin.base_model.model.get_submodule(name)
        close(adapter.A.grad, layer.lora_A["default"].weight.grad, 1e-3)
        close(adapter.B.grad, layer.lora_B["default"].weight.grad, 1e-3)
        close(adapter.sigma.grad, layer.lora_diag["default"].grad, 1e-3)


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (24, 24)])
def test_truncation_removes_the_last_r_components(shape):
    from graftwork.adapters.kasa import tail

    W = torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    B0, A0 = tail(W, 5)
    kept, S = W - B0 @ A0, torch.linalg.svdvals(W)
    assert torch.linalg.matrix_rank(kept) == 20 - 5 if shape != (24, 24) else torch.linalg.matrix_rank(kept) == 19
    torch.testing.assert_close(torch.linalg.svdvals(kept)[: len(S) - 5], S[:-5])
    relative = float((W - kept).norm() / W.norm())
    assert relative == pytest.approx(math.sqrt(float(S[-5:].square().sum() / S.square().sum())), rel=1e-9)


def test_start_moves_by_the_tail_alone():
    """B = 0: what the adapter changes is -W_tail; small where r is much less than q, and growing with r."""
    def shift(r):
        model = tiny.llama()
        before = output(model, IDS)
        graft = graftwork.attach(model, "kasa", r=r)
        for name, change in graft.delta_weights().items():
            S = torch.linalg.svdvals(model.get_submodule(name).weight.double())
            assert float(change.norm()) == pytest.approx(float(S[-r:].norm()), rel=1e-4)
        return float(((output(model, IDS) - before).norm() / before.norm()).detach())

    assert 0 < shift(1) < 0.15 and shift(1) < shift(12)  # a random matrix has a heavy tail: 1/64 of its components


def test_without_truncation_it_starts_at_the_base(tmp_path):
    model = tiny.llama()
    graft = attach(model, "kasa", truncate=False, filled=False)
    assert torch.equal(output(model, IDS), output(tiny.llama(), IDS))
    fill(graft).save(tmp_path / "saved")
    for name, change in graft.delta_weights().items():
        adapter = graft.adapters[name]
        close(change, adapter.B * adapter.sigma * 1.5 @ adapter.A, 1e-5)
        assert adapter.base_edit() is None and adapter.factors()[1].shape[0] == 4
    again = tiny.llama()
    graftwork.attach_saved(again, tmp_path / "saved")
    assert torch.equal(output(again, IDS), output(model, IDS))


def test_the_two_gram_forms_differ_by_a_constant():
    adapter = next(iter(attach(tiny.llama(), "kasa").adapters.values()))
    A = adapter.A.detach().double()
    small, large = (A @ A.T - torch.eye(4)).square().sum(), (A.T @ A - torch.eye(A.shape[1])).square().sum()
    assert float(large - small) == pytest.approx(A.shape[1] - 4, rel=1e-9)


def test_loss_terms():
    def loss(**options):
        adapter = next(iter(attach(tiny.llama(), "kasa", **options).adapters.values()))
        return adapter, adapter.auxiliary_loss()

    adapter, only_sigma = loss(beta=2.0, gamma=0.0)
    torch.testing.assert_close(only_sigma, 2.0 * adapter.sigma.square().sum())
    adapter, only_apart = loss(beta=0.0, gamma=0.5)
    unit = torch.eye(4)
    torch.testing.assert_close(only_apart, 0.5 * ((adapter.B.T @ adapter.B - unit).norm() + (adapter.A @ adapter.A.T - unit).norm()))
    assert loss(beta=0.0, gamma=0.0)[1] is None
    fresh = next(iter(graftwork.attach(tiny.llama(), "kasa").adapters.values()))
    fresh.auxiliary_loss().backward()
    assert not fresh.B.grad.any() and fresh.A.grad.any(), "a saddle at B = 0"


def test_count_file_and_one_truncation(tmp_path):
    model = tiny.llama()
    pristine = {n: p.clone() for n, p in model.named_parameters()}
    graft = attach(model, "kasa", r=4, rank_pattern={"v_proj": 2})
    wanted = sum((2 if n.endswith("v_proj") else 4) * (a.in_features + a.out_features + 1) for n, a in graft.adapters.items())
    assert graft.parameter_count() == wanted
    graft.save(tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / "graft.safetensors")
    assert sum(t.numel() for t in tensors.values()) == wanted and {k.rsplit(".", 1)[1] for k in tensors} == {"A", "B", "sigma"}
    changes = graft.delta_weights()
    graft.detach()
    assert all(torch.equal(p, pristine[n]) for n, p in model.named_parameters())
    again = graftwork.attach_saved(model, tmp_path / "saved")
    assert all(torch.equal(c, changes[n]) for n, c in again.delta_weights().items()), "dropped once, not twice"
    adapter = next(iter(again.adapters.values()))
    extra = adapter.stored_extra()
    adapter.B0.data.neg_()
    adapter.A0.data.neg_()
    adapter.check_extra(extra)
    adapter.A0.data.neg_()
    with pytest.raises(ArtifactError, match="tail of W"):
        adapter.check_extra(extra)


def test_rank_that_leaves_nothing():
    with pytest.raises(UsageError, match="r=32.*k_proj.*allows 31"):
        graftwork.attach(tiny.llama(), "kasa", r=32)
