"""RandLoRA: the closed form on explicit bases, PEFT's layer on permuted ones, and memory that does not grow with the basis."""

from __future__ import annotations

import copy
import math

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import graftwork
import tiny
from adapter_support import attach, close, fill, output
from graftwork.adapters.randlora import BasisPool
from graftwork.errors import ArtifactError, UsageError
from graftwork.planning.ledger import Ledger

IDS = tiny.tokens(2, 7)
WIDE = ["layers.0.mlp.down_proj"]  # in 96 > out 64: the transposed form


def explicit(adapter):
    """(A (r, q), B (n, D, r)) in fp64 from the drawn bytes and the definition."""
    basis, pool = adapter.basis, adapter.basis.pool
    level = math.sqrt(3.0) / 128.0
    A = (pool.draw(f"A/{basis.r}", basis.r, basis.q).double() + 0.5) * level
    blocks = -(-basis.n * basis.r // 128)
    columns = torch.cat([pool.draw(f"B/{basis.q}/{i}", 128, basis.D) for i in range(blocks)])[: basis.n * basis.r]
    B = ((columns.double() + 0.5) * level).view(basis.n, basis.r, basis.D).transpose(1, 2)
    return A, B


def closed_form(adapter, alpha, l, g):  # noqa: E741
    A, B = explicit(adapter)
    s = alpha / (adapter.r * math.sqrt(adapter.basis.n))
    change = s * sum(B[j] @ torch.diag(l[j]) @ A @ torch.diag(g[j]) for j in range(adapter.basis.n))
    return change if adapter.out_features >= adapter.in_features else change.T


def one(target="layers.0.mlp.up_proj", **options):
    graft = graftwork.attach(tiny.llama(), "randlora", target_modules=[target], **options)
    return graft, next(iter(graft.adapters.values()))


@settings(max_examples=10, deadline=None)
@given(r=st.integers(1, 40), n=st.one_of(st.none(), st.integers(1, 9)), wide=st.booleans(), alpha=st.sampled_from([None, 5.0]))
def test_values_and_gradients_equal_an_explicit_basis(r, n, wide, alpha):
    """The hand-written backward pass against autograd on the closed form, both orientations, up to 64 products of rank 1."""
    graft, adapter = one(WIDE[0] if wide else "layers.0.mlp.up_proj", r=r, n_basis=n, alpha=alpha)
    fill(graft)
    l, g = (p.detach().double().requires_grad_() for p in (adapter.randlora_l, adapter.randlora_g))
    wanted = closed_form(adapter, 2.0 * r if alpha is None else alpha, l, g)
    close(adapter.delta_weight(None), wanted, 1e-5)
    x = torch.randn(2, 5, adapter.in_features, generator=torch.Generator().manual_seed(1)).requires_grad_()
    x64 = x.detach().double().requires_grad_()
    got, right = adapter.delta(x, None), x64 @ wanted.T
    close(got, right, 1e-5)
    G = torch.randn(got.shape, generator=torch.Generator().manual_seed(2))
    got.backward(G)
    right.backward(G.double())
    for mine, reference in ((adapter.randlora_l, l), (adapter.randlora_g, g), (x, x64)):
        close(mine.grad, reference.grad, 1e-5)


def test_peft_on_permuted_bases():
    """PEFT pairs column b r + k of its B bank with row k n + b of A: the same numbers, put there, give the same model."""
    model = tiny.llama()
    r, targets = 10, ["up_proj", "down_proj"]
    twin = peft.get_peft_model(copy.deepcopy(model), peft.RandLoraConfig(
        r=r, randlora_alpha=7.0, target_modules=targets, projection_prng_key=0))
    n = -(-tiny.HIDDEN // r)
    graft = fill(graftwork.attach(model, "randlora", r=r, alpha=7.0 * math.sqrt(n), target_modules=targets))
    A, B = explicit(next(iter(graft.adapters.values())))  # both sites have q 64 and D 96
    flat = torch.empty(tiny.FFN, n * r)
    for k in range(r):
        for b in range(n):
            flat[:, k * n + b] = B[b, :, k]
    layers = {name: twin.base_model.model.get_submodule(name) for name in graft.adapters}
    for name, adapter in graft.adapters.items():
        layer = layers[name]
        layer.randlora_A["default"], layer.randlora_B["default"] = A.float().unsqueeze(1), flat.view(tiny.FFN, n, r)
        with torch.no_grad():
            layer.randlora_lambda["default"].copy_(adapter.randlora_l.T)
            layer.randlora_gamma["default"].copy_(adapter.randlora_g)
    ours, theirs = output(model, IDS), output(twin, IDS)
    close(ours, theirs, 1e-5)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for name, adapter in graft.adapters.items():
        close(adapter.randlora_l.grad.T, layers[name].randlora_lambda["default"].grad, 1e-3)
        close(adapter.randlora_g.grad, layers[name].randlora_gamma["default"].grad, 1e-3)


def test_one_saved_basis_for_all_sites(tmp_path, monkeypatch):
    """Each site's change from the saved numbers by the formula, in PEFT's order of columns; the file is all there is."""
    model = tiny.llama()
    graft = attach(model, "randlora", r=10, alpha=7.0, save_projection=True)
    A, B = graft.shared.A.double(), graft.shared.B.double()
    assert A.shape == (10, tiny.FFN) and B.shape == (-(-tiny.FFN // 10) * 10, tiny.FFN)
    assert torch.equal(A, A.bfloat16().double()) and B.var() == pytest.approx(1.0, rel=0.05)
    for name, change in graft.delta_weights().items():
        adapter = graft.adapters[name]
        q, D = sorted((adapter.in_features, adapter.out_features))
        n, l, g = -(-q // 10), adapter.randlora_l.double(), adapter.randlora_g.double()  # noqa: E741
        wanted = sum(torch.outer(B[k * n + j, :D], l[j, k] * A[k, :q] * g[j]) for j in range(n) for k in range(10))
        wanted = wanted * 7.0 / (10 * math.sqrt(n))
        close(change, wanted if adapter.out_features >= adapter.in_features else wanted.T, 1e-5)
    wanted = output(model, IDS)
    graft.save(tmp_path / "saved")
    assert {"shared.A", "shared.B"} < set(load_file(tmp_path / "saved" / "graft.safetensors"))
    real = BasisPool.draw
    monkeypatch.setattr(BasisPool, "draw", lambda self, *a: real(self, *a).flip(-1))
    twin = tiny.llama()
    graftwork.attach_saved(twin, tmp_path / "saved")
    assert torch.equal(output(twin, IDS), wanted)


def test_what_one_saved_basis_cannot_be():
    for options in ({"n_basis": 3}, {"cache_basis": True}):
        with pytest.raises(UsageError, match="leave n_basis and cache_basis out"):
            graftwork.attach(tiny.llama(), "randlora", r=10, save_projection=True, **options)
    with pytest.raises(UsageError, match="r=4.*has r=10"):
        graftwork.attach(tiny.llama(), "randlora", r=10, save_projection=True, ranks={"model.layers.0.self_attn.q_proj": 4})


def test_full_rank_once_the_gammas_differ():
    graft, adapter = one(r=5)
    assert adapter.randlora_g.unique().tolist() == pytest.approx([1 / 64])
    with torch.no_grad():
        adapter.randlora_l.normal_(generator=torch.Generator().manual_seed(0))
        assert torch.linalg.matrix_rank(adapter.delta_weight(None), rtol=1e-5) == 5, "equal gammas: rank r"
        adapter.randlora_g.normal_(generator=torch.Generator().manual_seed(1))
        assert torch.linalg.matrix_rank(adapter.delta_weight(None), rtol=1e-5) == 64
    assert sum(p.numel() for p in graft.parameters()) == 13 * (5 + 64)
    assert one(r=5, n_basis=2)[0].parameter_count() == 2 * (5 + 64)


@pytest.mark.parametrize("distribution", ["uniform", "sparse", "very_sparse"])
def test_entries_have_unit_variance(distribution):
    _, adapter = one(r=8, distribution=distribution)
    values = torch.cat([c.flatten() for *_, c in adapter.basis.blocks(torch.zeros(1))])
    assert values.mean().abs() < 0.05 and values.var() == pytest.approx(1.0, rel=0.05)
    zeros = (values == 0).double().mean().item()
    wanted = {"uniform": 0.0, "sparse": 2 / 3, "very_sparse": 1 - 1 / 8}[distribution]
    assert zeros == pytest.approx(wanted, abs=0.02)
    assert distribution == "uniform" or values.unique().shape == (3,)


def test_full_rank_beats_low_rank_on_a_full_rank_target():
    """The change nearest to a random square target, at no more parameters than a LoRA's."""
    graft = graftwork.attach(tiny.llama(), "randlora", r=16, target_modules=["layers.0.self_attn.q_proj"])
    adapter = next(iter(graft.adapters.values()))
    target = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(graft.parameters(), lr=3e-2)
    for _ in range(250):
        optimizer.zero_grad()
        loss = (adapter.delta_weight(None) - target).square().mean()
        loss.backward()
        optimizer.step()
    rank = graft.parameter_count() // 128
    best = torch.linalg.svdvals(target)[rank:].square().sum() / 64**2
    assert rank == 2 and loss < best, (float(loss), float(best))


@pytest.mark.parametrize("r", [1, 32])
def test_the_artifact_holds_coefficients_only(tmp_path, r):
    graft = attach(tiny.llama(), "randlora", r=r)
    graft.save(tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / "graft.safetensors")
    assert sum(t.numel() * 4 for t in tensors.values()) == 4 * graft.parameter_count()
    n = [a.basis.n * (r + a.basis.q) for a in graft.adapters.values()]
    assert graft.parameter_count() == sum(n)


def test_another_generator_is_noticed(tmp_path, monkeypatch):
    attach(tiny.llama(), "randlora").save(tmp_path / "saved")
    real = BasisPool.draw
    monkeypatch.setattr(BasisPool, "draw", lambda self, *a: real(self, *a).flip(-1))
    with pytest.raises(ArtifactError, match="random basis"):
        graftwork.attach_saved(tiny.llama(), tmp_path / "saved")


def peak(**options):
    """Largest sum of live tensor bytes of one training step, and the bytes of the coefficients."""
    model = tiny.llama()
    graft = fill(graftwork.attach(model, "randlora", target_modules=["q_proj", "down_proj"], **options))
    with Ledger() as ledger:
        ledger.track(model, "weights")
        output(model, IDS).square().mean().backward()
    return ledger.peak_bytes, sum(p.numel() * 4 for p in graft.parameters())


@pytest.mark.parametrize("r", [2, 8])
def test_the_peak_does_not_grow_with_the_basis(r):
    """From n = 64 to 512 products only the coefficients, their scaled copies and their gradients grow."""
    (small, few), (large, many) = peak(r=r, n_basis=64), peak(r=r, n_basis=512)
    assert large - small <= 2.5 * (many - few) + 1024
    cached, _ = peak(r=r, n_basis=512, cache_basis=True)
    assert cached - large == pytest.approx((tiny.HIDDEN + tiny.FFN) * 512 * r, rel=0.15)  # a byte an entry, once for all layers


def test_a_kept_basis_changes_nothing():
    def made(**options):
        model = tiny.llama()
        attach(model, "randlora", **options)
        return output(model, IDS)

    assert torch.equal(made(), made(cache_basis=True))
    assert not torch.allclose(made(), made(distribution="sparse"))


def test_rank_larger_than_the_matrix():
    with pytest.raises(UsageError, match="r=65.*64 x 64"):
        graftwork.attach(tiny.llama(), "randlora", r=65, target_modules=["q_proj"])
