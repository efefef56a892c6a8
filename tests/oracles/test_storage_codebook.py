"""Code books: Lloyd's steps against scipy and the exact optimum by dynamic programming, differentiable k-means against its sums written
out, the joint fit by what it must reach; bits a weight by formula."""

import numpy as np
import pytest
import torch

from graftwork.errors import UsageError
from graftwork.registry import make_config
from graftwork.storage._book_fit import lloyd, masses, nearest, rows_alike, soft_means, start
from graftwork.storage._packing import unpack
from graftwork.storage.base import make_storage
from graftwork.storage.calibration.statistics import InputStatistics

slow = pytest.mark.slow


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(features=96, tokens=400):
    return normal(tokens, features, seed=1) @ normal(features, features, seed=2) / features**0.5 * torch.linspace(0.1, 3, features)


def kept(weight, x=None, **options):
    statistics = None
    if x is not None:
        statistics = InputStatistics(x.shape[1], ("hessian",))
        statistics.add(x)
    return make_storage(weight, "codebook", make_config("storage", "codebook", **options), statistics=statistics)


def codes_of(stored):
    return unpack(stored.leaves()["codes"], stored.in_features, stored.options.bits).int()


@slow
def test_lloyd_is_that_of_scipy():
    from scipy.cluster.vq import kmeans2

    values, mass = masses(normal(2000))
    first = start(values, mass, 8)
    for steps in (1, 5, 60):
        expected, _ = kmeans2(values.numpy(), first.numpy(), iter=steps, minit="matrix")
        np.testing.assert_allclose(lloyd(values, mass, first, steps).numpy(), expected, rtol=1e-10)


def optimum(values, mass, size):
    """The least weighted squared error of a book of `size` numbers: dynamic programming over the cells' ends."""
    x, m = values.tolist(), mass.tolist()

    def cell(i, j):
        total = sum(m[i:j])
        mean = sum(a * b for a, b in zip(x[i:j], m[i:j])) / total
        return sum(b * (a - mean) ** 2 for a, b in zip(x[i:j], m[i:j]))

    n = len(x)
    cost = {(i, j): cell(i, j) for i in range(n) for j in range(i + 1, n + 1)}
    least = [cost[0, j] if j else 0.0 for j in range(n + 1)]
    for _ in range(size - 1):
        least = [min([least[i] + (cost[i, j] if i < j else 0.0) for i in range(j + 1)]) for j in range(n + 1)]
    return least[n]


@slow
@pytest.mark.parametrize("seed", range(3))
def test_k_means_is_near_the_exact_optimum(seed):
    values, mass = masses(normal(30, seed=seed), normal(30, seed=seed + 9).abs() + 0.1)
    book = lloyd(values, mass, start(values, mass, 4), 100)
    error = (mass * (values - book[nearest(values, book).long()]) ** 2).sum()
    best = optimum(values, mass, 4)
    assert best * (1 - 1e-9) <= error <= 1.35 * best
    again = lloyd(values, mass, book, 1)
    torch.testing.assert_close(again, book)


def test_a_code_without_weights_is_moved():
    values, mass = masses(torch.cat([torch.linspace(0, 1, 50), torch.linspace(90, 91, 50)]))
    book = lloyd(values, mass, torch.tensor([0.5, 40.0, 41.0, 90.5], dtype=torch.float64), 100)
    assert (mass * (values - book[nearest(values, book).long()]) ** 2).sum() < 3


@slow
def test_differentiable_k_means():
    values, mass = masses(normal(300), normal(300, seed=5).abs())
    first = start(values, mass, 4)
    for tau in (1e-2, 0.3):
        book = first
        for _ in range(3):
            scale = (mass * values**2).sum() / mass.sum()
            rows = []
            for w in values:
                e = torch.exp(-((w - book) ** 2 - ((w - book) ** 2).min()) / (tau * scale))
                rows.append(e / e.sum())
            a = torch.stack(rows) * mass[:, None]
            book = (a * values[:, None]).sum(0) / a.sum(0)
        torch.testing.assert_close(soft_means(values, mass, first, 3, tau), book)
    for steps in (1, 4, 50):  # tau -> 0
        torch.testing.assert_close(soft_means(values, mass, first, steps, 1e-9), lloyd(values, mass, first, steps))


@slow
def test_options_of_the_fit_change_the_book():
    weight, x = normal(16, 96), inputs()
    plain = kept(weight, bits=3)
    for options in ({"iterations": 0}, {"weighted": True}, {"fit": "edkm", "tau": 0.1}, {"fit": "edkm", "weighted": True, "tau": 0.1},
                    {"rows_per_book": 4}, {"rows_per_book": 4, "per_rows": "scale"}, {"book_dtype": "fp32"}):
        stored = kept(weight, x, bits=3, **options)
        assert not torch.equal(stored.dequantize(), plain.dequantize()), options
    assert not torch.equal(kept(weight, bits=3, fit="edkm", tau=0.1).dequantize(), kept(weight, bits=3, fit="edkm", tau=0.2).dequantize())
    h = (x.T @ x).diagonal()
    errors = [float(((kept(weight, x, bits=3, weighted=w).dequantize() - weight) ** 2 @ h).sum()) for w in (False, True)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize(("options", "extra"), [
    ({}, 16 * 8), ({"book_dtype": "fp32"}, 32 * 8), ({"rows_per_book": 8}, 16 * 8 * 4),
    ({"rows_per_book": 8, "per_rows": "scale"}, 16 * 12),
    ({"rows_per_book": 8, "grouping": "distribution"}, 16 * 8 * 4 + 8 * 32), ({"rows_per_book": 5}, 16 * 8 * 7)], ids=str)
def test_bits_per_weight(options, extra):
    assert kept(normal(32, 96), bits=3, **options).bits_per_weight == 3 + extra / (32 * 96)


def test_rows_alike():
    """Rows of two kinds in turn are told apart by their distribution, and then need fewer books than in their order."""
    wide, narrow = normal(12, 96), normal(12, 96, seed=3).sign() * 0.3
    weight = torch.stack([wide, narrow], 1).reshape(24, 96)
    group = rows_alike(weight, 2)
    assert group.tolist() == [int(group[0]), int(group[1])] * 12 and group[0] != group[1]
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    assert len({(int(a), int(b)) for a, b in zip(rows_alike(weight[order], 2), group[order])}) == 2
    by_order, by_kind = (kept(weight, bits=2, rows_per_book=12, grouping=g).dequantize() for g in ("neighbors", "distribution"))
    assert (by_kind - weight).norm() < 0.97 * (by_order - weight).norm()


def output_error(stored, weight, x):
    return float(((stored.dequantize() - weight) @ x.T).norm() / (weight @ x.T).norm())


@slow
@pytest.mark.parametrize("options", [{}, {"rows_per_book": 8}, {"rows_per_book": 8, "per_rows": "scale"}], ids=str)
def test_joint_fit(options):
    weight, x = normal(24, 96) * torch.linspace(0.5, 2, 24)[:, None], inputs()
    before = output_error(kept(weight, x, bits=3, weighted=True, **options), weight, x)
    found = {name: kept(weight, x, bits=3, fit="jlcm", **options, **more) for name, more in {
        "jlcm": {}, "none": {"iterations": 0}, "few": {"iterations": 10}, "fast": {"rate": 0.2}, "rate": {"rate": 0.05},
        "reach": {"reach": 1, "rate": 0.2},
        "plain": {"proximal": 0, "rate": 0.2}}.items()}
    errors = {name: output_error(stored, weight, x) for name, stored in found.items()}
    assert errors["none"] == pytest.approx(before, rel=1e-3)
    assert errors["jlcm"] < 0.85 * before and errors["few"] <= 1.001 * before
    assert errors["rate"] != errors["jlcm"] != errors["few"] and errors["fast"] not in (errors["reach"], errors["plain"])
    assert not torch.equal(found["jlcm"].leaves()["book"], found["none"].leaves()["book"])


@slow
def test_near_codes_are_preferred():
    weight, x = normal(64, 96), inputs()
    first = codes_of(kept(weight, x, bits=4, fit="jlcm", iterations=0))
    moves, errors = {}, {}
    for proximal in (0, 4):
        stored = kept(weight, x, bits=4, fit="jlcm", proximal=proximal, rate=0.15, iterations=60)
        moves[proximal] = float(((codes_of(stored) - first).abs() > 1).float().mean())
        errors[proximal] = output_error(stored, weight, x)
    assert moves[4] < moves[0] and errors[4] < 1.1 * errors[0], (moves, errors)


def test_the_book_trains():
    stored = kept(normal(20, 33), bits=3, rows_per_book=7, per_rows="scale", book_dtype="fp32")
    book, scale = (stored.leaves()[name].clone().requires_grad_() for name in ("book", "scale"))
    x = normal(5, 33, seed=4)
    value = stored(x, {"book": book, "scale": scale})
    value.backward(upstream := normal(5, 20, seed=6))
    dw, unit = upstream.T @ x, stored.leaves()["book"].flatten()[codes_of(stored).long()]
    rows = torch.arange(20) // 7
    torch.testing.assert_close(scale.grad, torch.zeros(3).index_add_(0, rows, (dw * unit).sum(1)))
    by_code = dw * stored.leaves()["scale"][rows][:, None]
    torch.testing.assert_close(book.grad[0], torch.zeros(8).index_add_(0, codes_of(stored).flatten(), by_code.flatten()))


def test_quantizing_against_a_given_book():
    weight, stored = normal(20, 33).requires_grad_(), kept(normal(20, 33), bits=2, rows_per_book=6, book_dtype="fp32")
    book = torch.tensor([[2.0, -1.0, 0.0, 0.5]]).repeat(4, 1).requires_grad_()
    value = stored.fake_quantize(weight, {"book": book})
    nearby = torch.tensor([2.0, -1.0, 0.0, 0.5])[(weight[..., None] - torch.tensor([2.0, -1.0, 0.0, 0.5])).abs().argmin(-1)]
    torch.testing.assert_close(value, nearby)
    value.sum().backward()
    assert torch.equal(weight.grad, torch.ones(20, 33)) and book.grad.sum() == 20 * 33


def test_few_distinct_weights_are_exact_and_what_cannot_be_is_refused():
    weight = normal(3, 5).half().float().repeat(4, 8)
    assert torch.equal(kept(weight, bits=4).dequantize(), weight)
    assert torch.equal(kept(weight, bits=4, fit="edkm").dequantize(), weight)
    with pytest.raises(UsageError, match="fp16"):
        kept(weight * 1e6)
    assert torch.isfinite(kept(weight * 1e6, book_dtype="fp32").dequantize()).all()
    for options in ({"weighted": True}, {"fit": "jlcm"}):
        with pytest.raises(UsageError, match="distributed"):
            kept(weight, **options)
    with pytest.raises(UsageError, match="bits"):
        make_config("storage", "codebook", bits=9)


@pytest.mark.parametrize("options", [{"rows_per_book": 7}, {"rows_per_book": 7, "per_rows": "scale", "grouping": "distribution"}], ids=str)
def test_tiles_of_rows(options, monkeypatch):
    stored, x, g = kept(normal(40, 33), bits=3, **options), normal(6, 33, seed=1), normal(6, 40, seed=2)
    dense, y, dx = stored.dequantize(), stored(x), stored.transposed(g)
    monkeypatch.setattr("graftwork.storage._tiles.TILE", 33 * 9)
    assert torch.equal(stored.dequantize(), dense)
    torch.testing.assert_close(stored(x), y)
    torch.testing.assert_close(stored.transposed(g), dx)
