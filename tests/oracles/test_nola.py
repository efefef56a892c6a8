"""NOLA: the card's identities, regeneration in another process, and memory that does not grow with the basis."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import graftwork
import tiny
from adapter_support import attach, close, fill, output
from graftwork.adapters import nola
from graftwork.adapters.nola import Basis
from graftwork.errors import ArtifactError
from graftwork.planning.ledger import Ledger

IDS = tiny.tokens(2, 7)


def explicit(basis, rows, columns):
    """The basis as a stored tensor (count, rows, columns), fp64, from the definition: (byte + 1/2) / 128 / sqrt(count)."""
    groups = [basis.draw(g) for g in range(-(-basis.count // 8))]
    codes = torch.cat(groups)[: basis.count].double()
    return ((codes + 0.5) / 128 / basis.count**0.5).view(basis.count, rows, columns)


def one(r=3, n_basis=20, n_basis_b=None, **options):
    model = tiny.llama()
    graft = graftwork.attach(model, "nola", r=r, n_basis=n_basis, n_basis_b=n_basis_b, target_modules=["v_proj"], **options)
    return model, graft, next(iter(graft.adapters.values()))


@settings(max_examples=12, deadline=None)
@given(r=st.integers(1, 5), k=st.integers(1, 30), l=st.integers(1, 30), alpha=st.sampled_from([None, 1.0, 6.0]))
def test_values_and_gradients_equal_an_explicit_basis(r, k, l, alpha):
    _, graft, adapter = one(r, k, l, alpha=alpha)
    fill(graft)
    n_out, n_in = adapter.out_features, adapter.in_features
    a, b = (p.detach().double().requires_grad_() for p in (adapter.coef_A, adapter.coef_B))
    A = adapter.offset().double() + torch.einsum("k,krn->rn", a, explicit(adapter.basis_A, r, n_in))
    B = torch.einsum("l,lnr->nr", b, explicit(adapter.basis_B, n_out, r)) * ((alpha or r) / r)
    got_B, got_A = adapter.factors()
    close(got_A, A, 1e-5)
    close(got_B, B, 1e-5)
    G = torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(2))
    ((got_B @ got_A) * G).sum().backward()
    ((B @ A) * G.double()).sum().backward()
    close(adapter.coef_A.grad, a.grad, 1e-5)
    close(adapter.coef_B.grad, b.grad, 1e-5)


def test_the_offset_opens_the_dead_point():
    """At the start both coefficient vectors are zero: b gets a gradient through A_off, a does not."""
    model, graft, _ = one()
    output(model, IDS).square().sum().backward()
    for adapter in graft.adapters.values():
        assert adapter.coef_B.grad.abs().min() > 0 and not adapter.coef_A.grad.any()
        bound = adapter.in_features**-0.5
        assert 0.9 * bound < adapter.offset().abs().max() <= bound


def test_entries_are_uniform():
    *_, adapter = one(r=8, n_basis=64)
    values = explicit(adapter.basis_A, 8, adapter.in_features) * 8.0
    assert values.abs().max() < 1 and values.mean().abs() < 0.01
    assert values.var() == pytest.approx(1 / 3, rel=0.01)
    flat = values.flatten(1)
    cosine = torch.nn.functional.normalize(flat) @ torch.nn.functional.normalize(flat).T - torch.eye(64)
    assert cosine.abs().max() < 0.25, "two matrices of the basis are related"
    B = explicit(adapter.basis_B, adapter.out_features, 8) * 8.0
    assert not torch.equal(B.flatten()[:100], values.flatten()[:100])


def test_growing_the_basis_keeps_its_beginning():
    *_, small = one(n_basis=9)
    *_, large = one(n_basis=40)
    rows = small.r, small.in_features
    torch.testing.assert_close(explicit(small.basis_A, *rows) * 3.0, explicit(large.basis_A, *rows)[:9] * 40**0.5)


SCRIPT = """
import sys, torch, graftwork, tiny
torch.manual_seed(int(sys.argv[2])); torch.rand(7)
model = tiny.llama()
graftwork.attach_saved(model, sys.argv[1])
print(model(tiny.tokens(2, 7)).logits.double().sum().item().hex())
"""


@pytest.mark.slow
def test_another_process_regenerates_the_same_bits(tmp_path):
    model = tiny.llama()
    graft = attach(model, "nola", seed=12345)
    graft.save(tmp_path / "saved")
    with torch.no_grad():
        wanted = output(model, IDS).double().sum().item().hex()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / "saved"), "99"], env=environment, stdout=subprocess.PIPE,
                         text=True, check=True)
    assert run.stdout.split()[-1] == wanted


@pytest.mark.parametrize("r", [1, 16])
def test_the_artifact_holds_coefficients_only(tmp_path, r):
    from safetensors.torch import load_file

    model = tiny.llama()
    graft = attach(model, "nola", r=r)
    graft.save(tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / "graft.safetensors")
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == 4 * (20 + 11) * len(graft.adapters)


def test_another_generator_is_noticed(tmp_path, monkeypatch):
    graft = attach(tiny.llama(), "nola")
    graft.save(tmp_path / "saved")
    (extra,) = json.loads((tmp_path / "saved" / "graft.json").read_text())["extra"].values()
    assert extra["first_basis_values"] == graft.adapters[graft.shared.first_site].basis_A.draw(0)[0, :10].tolist()
    real = Basis.draw
    monkeypatch.setattr(Basis, "draw", lambda self, group: real(self, group).flip(-1))
    with pytest.raises(ArtifactError, match="random basis"):
        graftwork.attach_saved(tiny.llama(), tmp_path / "saved")


# -- memory ----------------------------------------------------------------------------------------------------------------
def peak(n_basis, **options):
    """Largest sum of live tensor bytes of one training step, and the bytes of the coefficients."""
    model = tiny.llama()
    graft = fill(graftwork.attach(model, "nola", r=16, n_basis=n_basis, target_modules=["q_proj", "down_proj"], **options))
    with Ledger() as ledger:
        ledger.track(model, "weights")
        output(model, IDS).square().mean().backward()
    return ledger.peak_bytes, sum(p.numel() * 4 for p in graft.parameters())


def test_the_peak_does_not_grow_with_the_basis(monkeypatch):
    """From k = 64 to 512 only the coefficients and their gradients grow: 8 bytes each, no tensor of the basis."""
    (small, few), (large, many) = peak(64), peak(512)
    assert large - small <= 2 * (many - few) + 1024
    whole = 512 * 16 * tiny.LAYERS * (tiny.HIDDEN + tiny.HIDDEN + tiny.FFN + tiny.HIDDEN)
    assert whole > 10 * (many - few), "a kept basis would be seen"
    monkeypatch.setattr(nola, "AT_ONCE", 0)  # its fp32 pieces are a constant that a tiny model would not see past
    cached, _ = peak(512, cache_basis=True)
    assert cached - large == pytest.approx(whole, rel=0.1)
    shared, _ = peak(512, cache_basis=True, share_basis=True)
    assert shared - large == pytest.approx(512 * 16 * (tiny.HIDDEN + tiny.FFN + tiny.HIDDEN), rel=0.1)  # A: 64, 96; B: 64


def test_options_that_only_save_work_change_nothing():
    plain, cached = (output(m, IDS) for m in (made(), made(cache_basis=True)))
    assert torch.equal(plain, cached)
    shared, both = (output(m, IDS) for m in (made(share_basis=True), made(share_basis=True, cache_basis=True)))
    assert torch.equal(shared, both) and not torch.allclose(plain, shared)


def made(**options):
    model = tiny.llama()
    attach(model, "nola", **options)
    return model


def test_shared_basis_is_one_per_shape():
    graft = attach(tiny.llama(), "nola", share_basis=True)
    keys = {a.basis_A.key for a in graft.adapters.values()}
    assert len(keys) == 2  # inputs of 64 and of 96
    apart = attach(tiny.llama(), "nola")
    assert len({a.basis_A.key for a in apart.adapters.values()}) == len(apart.adapters)


def test_inference_builds_once_and_follows_the_coefficients(monkeypatch):
    model, graft, adapter = one()
    fill(graft)
    built = []
    real = type(adapter)._build
    monkeypatch.setattr(type(adapter), "_build", lambda self: (built.append(self.site_name), real(self))[1])
    with torch.no_grad():
        first = output(model, IDS)
        assert torch.equal(output(model, IDS), first) and len(built) == len(graft.adapters)
        adapter.coef_B.mul_(2.0)
        assert not torch.allclose(output(model, IDS), first) and len(built) == len(graft.adapters) + 1
    output(model, IDS)
    assert adapter._built is None, "kept factors must not outlive inference"
