"""eDKM: values and gradients against plain DKM on one row a weight in float64, Lloyd's limit, what is kept, merging, a tiny LM."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graftwork
import tiny
from adapter_support import attach, close, output
from graftwork.adapters.edkm import NUMBERS, Rows, _Clustered, clusters, nearest
from graftwork.registry import make_config
from graftwork.storage.base import apply_storage


def noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class _Bf16(torch.autograd.Function):
    """Rounds, straight through."""

    @staticmethod
    def forward(ctx, w):
        return w.bfloat16().to(w.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad


def plain(w, C, tau, iterations):
    """DKM as the card has it, an attention row for every weight."""
    v = _Bf16.apply(w).flatten()
    scale = tau * v.detach().square().mean()
    for _ in range(iterations):
        a = torch.softmax(-(v[:, None] - C) ** 2 / scale, 1)
        C = (a.T @ v) / a.sum(0)
    return (a @ C).view(w.shape), C


CASES = [((30, 20), 0.1, 1), ((30, 20), 0.5, 3), pytest.param((280, 256), 0.2, 3, marks=pytest.mark.slow)]


@pytest.mark.parametrize("shape, tau, iterations", CASES)
def test_gradients_on_distinct_numbers_are_those_on_all_weights(shape, tau, iterations):
    w, C = noise(0, *shape).double() * 0.05, torch.linspace(-0.1, 0.1, 8).double()
    rows = Rows(w)
    assert (rows.index is None) == (w.numel() < NUMBERS) and rows.mass.sum() == w.numel()
    assert torch.equal(rows.spread(rows.values), w.bfloat16().double())
    if rows.index is not None:
        assert int((rows.mass > 0).sum()) < w.numel() / 4
    one, other, grad = w.clone().requires_grad_(), w.clone().requires_grad_(), noise(1, *shape).double()
    wanted, book = plain(other, C, tau, iterations)
    got = _Clustered.apply(one, C, tau, iterations, False)
    close(got, wanted, 1e-12)
    (got * grad).sum().backward()
    (wanted * grad).sum().backward()
    close(one.grad, other.grad, 1e-10)
    hard = _Clustered.apply(one, C, tau, iterations, True)
    close(hard.flatten(), book[(w.bfloat16().double().flatten()[:, None] - book).abs().argmin(1)], 1e-12)
    close(torch.autograd.grad((hard * grad).sum(), one)[0], other.grad, 1e-10)
    tangent = noise(2, *shape).double()  # forwards: <grad, J t> = <J^T grad, t>
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(w, tangent)
        moved = torch.autograd.forward_ad.unpack_dual(_Clustered.apply(dual, C, tau, iterations, False)).tangent
    torch.testing.assert_close((moved * grad).sum(), (other.grad * tangent).sum(), rtol=1e-9, atol=1e-12)


def test_a_small_temperature_is_lloyd():
    w = noise(0, 40, 30).bfloat16().double().flatten()
    C = torch.linspace(-1.5, 1.5, 8).double()
    soft, found = clusters(w, w, torch.ones_like(w), C, 1e-9, 4)
    book = C.clone()
    for _ in range(4):
        which = (w[:, None] - book).abs().argmin(1)
        book = torch.stack([w[which == k].mean() if (which == k).any() else book[k] for k in range(8)])
    close(found, book, 1e-12)
    close(soft, book[which], 1e-12)
    assert torch.equal(nearest(w, found), (w[:, None] - book).abs().argmin(1))
    far = torch.tensor([-9.0, 0.0, 9.0]).double()  # a code that nothing is near stays
    assert clusters(w, w, torch.ones_like(w), far, 1e-9, 2)[1][0] == -9.0


def test_a_damaged_weight_shows():
    for shape in ((4, 5), (257, 256)):
        w = noise(0, *shape)
        w[1, 2] = torch.nan
        assert _Clustered.apply(w, torch.linspace(-1, 1, 4), 0.1, 2, False)[1, 2].isnan()


def site(out=24, columns=40, **options):
    model = nn.Sequential(nn.Linear(columns, out))
    with torch.no_grad():
        model[0].weight.copy_(noise(0, out, columns) * 0.1)
        model[0].bias.copy_(noise(1, out))
    return model, attach(model, "edkm", **{"r": 2, "alpha": 3.0, "tau": 0.3, **options})


@pytest.mark.parametrize("options", [{}, *(pytest.param(each, marks=pytest.mark.slow) for each in (
    {"r": 0}, {"bits": 2}, {"iterations": 1}, {"tau": 0.02}, {"alpha": None}, {"rank_pattern": {"0": 1}}))], ids=str)
def test_the_site_by_its_equations(options):
    """Training: output and gradients; evaluation: hard. What is kept for the backward pass is x and what trains."""
    model, graft = site(**options)
    adapter, x = next(iter(graft.adapters.values())), noise(3, 2, 5, 40).requires_grad_()
    trained = [p.detach().double().requires_grad_() for p in adapter.trained()]
    every = {"r": 2, "bits": 3, "iterations": 3, "tau": 0.3, "alpha": 3.0, **options}
    r = 1 if "rank_pattern" in options else every["r"]
    assert [tuple(p.shape) for p in trained] == ([(r, 40), (24, r)] if r else [(24, 40)]) and adapter.book.shape == (2 ** every["bits"],)
    change = trained[1] @ trained[0] * (1.0 if every["alpha"] is None else 3.0 / r) if r else trained[0]
    wide = x.detach().double().requires_grad_()
    # the same rounding to bf16 as in fp32 arithmetic, which decides ties
    w = model[0].weight.detach().double() + change
    w = w + (adapter.full().detach().double() - w.detach())
    W, C = plain(w, adapter.book.double(), every["tau"], every["iterations"])
    wanted, grad = F.linear(wide, W, model[0].bias.double()), noise(4, 2, 5, 24)
    model.train()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
        y = model(x)
    assert sorted(saved) == sorted([x.numel(), *(p.numel() for p in trained)])
    close(y, wanted, 1e-5)
    (y * grad).sum().backward()
    (wanted * grad.double()).sum().backward()
    close(x.grad, wide.grad, 1e-5)
    for mine, other in zip(adapter.trained(), trained, strict=True):
        close(mine.grad, other.grad, 1e-4)
    model.eval()
    hard = C[(w.detach().bfloat16().double()[..., None] - C).abs().argmin(-1)]
    close(adapter.weight(), hard, 1e-5)
    close(model(x), F.linear(wide, hard, model[0].bias.double()), 1e-5)
    assert adapter.soft_difference() == pytest.approx(float(((W - hard).norm() / hard.norm()).detach()), rel=1e-3)


@torch.no_grad()
def test_merging_ends_in_a_code_book():
    model, graft = site()
    x, model = noise(3, 6, 40), model.eval()
    learned = model(x)
    report = graft.merge()
    held = model[0].graft.whole.frozen.module
    assert report.target == "stored" and report.worst < 1e-6 and held.method == "codebook"
    assert held.bits_per_weight == 3 + 32 * 8 / (24 * 40) and torch.equal(model(x), learned)
    graft.unmerge()
    rounded = graft.merge(requantize=True)
    held = model[0].graft.whole.frozen.module
    assert held.bits_per_weight == 3 + 16 * 8 / (24 * 40) and 1e-6 < rounded.worst < 1e-2


def test_a_softer_attention_is_further_from_the_codes():
    found = [next(iter(site(tau=tau, iterations=40)[1].adapters.values())).stored_extra()["soft_difference"] for tau in (1e-4, 0.02, 0.3)]
    assert found[0] < 0.01 < found[1] < found[2] < 1, found


@pytest.mark.slow
def test_training_inside_is_better_than_clustering_after(tmp_path):
    """Held-out loss of a tiny model in 2 bits: 20 steps inside the clustering, and the same steps of the dense model before k-means."""
    def chain(rows, seed):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(4, 128, (rows, 1), generator=generator)
        for _ in range(15):
            ids = torch.cat([ids, 4 + (ids[:, -1:] * 7 + torch.randint(0, 2, (rows, 1), generator=generator)) % 124], 1)
        return ids

    def trained(model, parameters, lr, steps, seed):
        optimizer = torch.optim.Adam(parameters, lr=lr)
        model.train()
        for step in range(steps):
            optimizer.zero_grad()
            ids = chain(16, seed + step)
            F.cross_entropy(output(model, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
            optimizer.step()
        return loss(model.eval())

    @torch.no_grad()
    def loss(model):
        ids = chain(32, 1)
        return float(F.cross_entropy(output(model, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))

    model = tiny.llama()
    trained(model, list(model.parameters()), 5e-3, 80, 100)
    dense = copy.deepcopy(model)
    graft = graftwork.attach(model, "edkm", bits=2, r=4)
    inside = trained(model, graft.parameters(), 5e-3, 20, 500)
    trained(dense, list(dense.parameters()), 5e-3, 20, 500)
    apply_storage(dense, make_config("storage", "codebook", bits=2))
    assert inside < loss(dense) - 0.05, (inside, loss(dense))
    graft.save(tmp_path / "saved")
    assert "soft_difference" in json.dumps(json.loads((tmp_path / "saved" / "graft.json").read_text())), "the report"
