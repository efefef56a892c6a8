"""VPTQ: with vectors of one row and a uniform grid for a book it is GPTQ; k-means against brute force; what each stage must win in the
error of the outputs; packing, and bits a weight by formula."""

from itertools import product

import pytest
import torch

from graftwork.registry import make_config
from graftwork.storage._kmeans import kmeans, nearest
from graftwork.storage._packing import pack_wide, unpack_wide, wide_width
from graftwork.storage._second_order import proxy_loss, solve
from graftwork.storage.base import make_storage
from graftwork.storage.calibration.statistics import InputStatistics
from graftwork.storage.vptq import Layout, Vectors, book_of, encode


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(tokens=300, features=96, seed=0):
    return normal(tokens, features, seed=seed) @ normal(features, features, seed=seed + 1) / features**0.5


def statistics_of(x):
    found = InputStatistics(x.shape[1], ("hessian",))
    found.add(x)
    return found


def kept(weight, x, **options):
    return make_storage(weight, "vptq", make_config("storage", "vptq", **options), statistics=statistics_of(x))


def test_one_row_and_a_uniform_grid_is_gptq():
    x, weight = inputs(), normal(13, 96, seed=5)
    grid = (torch.arange(8) - 3.0) * 0.5

    class Rounded:
        group = 1000

        def start(self, j, columns, diagonal):
            pass

        def quantize(self, j, column, u):
            return (column / 0.5).round().clamp(-3, 4) * 0.5

    hessian = x.T @ x / len(x)
    found = Vectors([(0, 96)], [(grid[:, None],)], 96)
    assert torch.equal(solve(weight, hessian, found), solve(weight, hessian, Rounded()))
    assert torch.equal(grid[torch.stack([c[0] for c in found.codes], 1)], solve(weight, hessian, Rounded()))


@pytest.mark.slow
def test_kmeans_finds_the_best_partition_and_weights_count():
    x = torch.cat([normal(4, 2, seed=i) * 0.1 + centre for i, centre in enumerate((torch.tensor([0.0, 0]), torch.tensor([3.0, 1])))])
    weights = torch.arange(1.0, 9)

    def cost(assignment):
        total = 0.0
        for c in set(assignment):
            own = torch.tensor([a == c for a in assignment])
            mean = (weights[own, None] * x[own]).sum(0) / weights[own].sum()
            total += float((weights[own] * (x[own] - mean).square().sum(1)).sum())
        return total

    best = min(cost(a) for a in product(range(2), repeat=8))
    book = kmeans(x, weights, 2, 50, torch.Generator().manual_seed(0))
    got = float((weights * (x - book[nearest(x, book)]).square().sum(1)).sum())
    assert got == pytest.approx(best, rel=1e-4)
    ignored = kmeans(x, torch.tensor([1.0] * 4 + [0] * 4), 1, 50, torch.Generator().manual_seed(0))
    torch.testing.assert_close(ignored[0], x[:4].mean(0))
    assert kmeans(torch.zeros(5, 2), torch.zeros(5), 4, 9, torch.Generator().manual_seed(0)).eq(0).all()


def test_nearest_is_by_distance(monkeypatch):
    x, book = normal(50, 3), normal(17, 3, seed=1)
    expected = torch.cdist(x.double(), book.double()).argmin(1)
    assert torch.equal(nearest(x, book), expected)
    monkeypatch.setattr("graftwork.storage._kmeans.CHUNK", 100)
    assert torch.equal(nearest(x, book), expected)


@pytest.mark.parametrize("bits", [1, 4, 8, 9, 12, 16, 24, 31])
def test_wide_codes_are_packed_in_planes(bits):
    for count in (1, 7, 30):
        codes = torch.randint(2**bits, (3, count), generator=torch.Generator().manual_seed(count))
        packed = pack_wide(codes, bits)
        assert packed.shape == (3, wide_width(count, bits)) and packed.dtype == torch.uint8
        assert torch.equal(unpack_wide(packed, count, bits), codes)
        assert 8 * packed.shape[1] < count * bits + 8 * -(-bits // 8)


@pytest.mark.slow
def test_each_stage_lowers_the_error_of_the_outputs():
    """As a mean over layers whose columns differ in scale: the loop is greedy and k-means local."""
    totals = dict.fromkeys(("all", "residual", "unweighted", "plain_hessian", "no_feedback"), 0.0)
    for seed in range(5):
        spread = (normal(96, seed=seed + 70) * 0.8).exp()
        x, weight = inputs(seed=10 * seed) * (normal(96, seed=seed + 30) * 0.8).exp(), normal(64, 96, seed=seed + 50) * spread
        hessian = x.T @ x / len(x)
        options = {"index_bits": 6, "outlier_columns": 0, "act_order": False}
        config = make_config("storage", "vptq", **options)

        def loss(dense, weight=weight, hessian=hessian):
            return float(proxy_loss(dense - weight, hessian) / proxy_loss(weight, hessian))

        totals["all"] += loss(kept(weight, x, **options).dequantize())
        totals["residual"] += loss(kept(weight, x, residual_bits=6, **options).dequantize())
        low, scale = weight.amin(0), weight.amax(0) - weight.amin(0)
        work = (weight - low) / scale
        generator = torch.Generator().manual_seed(0)
        book = book_of(work, torch.ones(96), 4, 6, config, generator)
        unit, rescaled = torch.eye(96), hessian * scale * scale[:, None]
        for name, used in (("unweighted", rescaled), ("plain_hessian", hessian), ("no_feedback", unit)):
            totals[name] += loss(solve(work, used, Vectors([(0, 96)], [(book,)], 96)) * scale + low)
    assert totals["residual"] < 0.7 * totals["all"]
    assert totals["all"] < totals["unweighted"] < totals["no_feedback"]
    assert totals["unweighted"] < totals["plain_hessian"]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"residual_bits": 4, "codebooks": 3}, {"vector": 6, "act_order": False, "outlier_columns": 0.05},
                                     {"normalize": False, "outlier_columns": 0, "act_order": False}], ids=str)
@pytest.mark.parametrize("out", [64, 37])
def test_rows_and_stages_by_loops(options, out):
    """Values looked up entry by entry from the leaves; any rows alone are rows of the whole; the solver returned the same."""
    weight, x = normal(out, 40, seed=5), inputs(features=40) * torch.linspace(0.2, 2, 40)
    config = make_config("storage", "vptq", **options)
    layout = Layout(config, out, 40)
    stored = kept(weight, x, **options)
    leaves, dense = stored.leaves(), stored.dequantize()
    v, bits, more = layout.main
    codes = unpack_wide(leaves["codes"], 40 - layout.outliers, bits)
    place = leaves["place"].long() if "place" in leaves else torch.arange(40)
    assert ("place" in leaves) == (config.act_order or config.outlier_columns > 0)
    for row, column in ((0, 0), (out - 1, 39), (7, 20), (out - 1, int(place.argmin()))):
        p = int(place[column])
        if p < layout.outliers:
            v0, bits0, _ = layout.first
            index = unpack_wide(leaves["outlier_codes"], layout.outliers, bits0)[row // v0, p]
            value = leaves["outlier_book"][0, index, row % v0].float()
        else:
            book = next(i for i, (start, stop) in enumerate(layout.runs[-layout.books:]) if start <= p < stop)
            value = leaves["book"][book, codes[row // v, p - layout.outliers], row % v].float()
            if more:
                index = unpack_wide(leaves["residual_codes"], 40 - layout.outliers, more)[row // v, p - layout.outliers]
                value = value + leaves["residual_book"][book, index, row % v].float()
        if config.normalize:
            value = value * leaves["scale"][column].float() + leaves["offset"][column].float()
        assert dense[row, column] == value
    for first, stop in ((0, out), (1, 2), (5, 19), (out - 1, out)):
        assert torch.equal(stored.decode(leaves, slice(first, stop)), dense[first:stop])


@pytest.mark.parametrize(("options", "expected"), [
    ({}, (2 * 253 + 4 * 3) / 256 + 16 * (256 * 4 + 256 * 2) / 65536 + 48 / 256),  # 3 outlier columns
    ({"outlier_columns": 0}, 2 + 16 * 256 * 4 / 65536 + 48 / 256),
    ({"outlier_columns": 0, "act_order": False, "normalize": False}, 2 + 16 * 256 * 4 / 65536),
    ({"outlier_columns": 0, "residual_bits": 4, "codebooks": 2}, 3 + 16 * 2 * (256 + 16) * 4 / 65536 + 48 / 256),
    ({"outlier_columns": 0, "vector": 8, "index_bits": 12}, 12 / 8 + 16 * 4096 * 8 / 65536 + 48 / 256),
    ({"outlier_columns": 0, "vector": 64, "index_bits": 16}, 10 / 64 + 16 * 1024 * 64 / 65536 + 48 / 256),
    ({"outlier_columns": 0.125, "outlier_vector": 4, "outlier_bits": 6}, (8 / 4 * 224 + 6 / 4 * 32) / 256
     + 16 * (256 * 4 + 64 * 4) / 65536 + 48 / 256)], ids=str)
def test_bits_per_weight(options, expected):
    stored = make_storage(torch.empty(256, 256, device="meta"), "vptq", make_config("storage", "vptq", **options))
    assert stored.bits_per_weight == pytest.approx(expected, abs=0.02 if options.get("vector") == 64 else 1e-9)


def test_published_bits():
    """4096 x 4096, v = 8, k = 256 without norms and order: 1.002."""
    config = make_config("storage", "vptq", vector=8, index_bits=8, outlier_columns=0, act_order=False, normalize=False)
    assert make_storage(torch.empty(4096, 4096, device="meta"), "vptq", config).bits_per_weight == pytest.approx(1.002, abs=5e-4)


@pytest.mark.slow
def test_iterations_seed_and_damp_change_the_codes_and_dead_inputs_are_kept(monkeypatch):
    weight, x = normal(32, 40, seed=5), inputs(features=40)
    plain = kept(weight, x, index_bits=5).dequantize()
    for options in ({"iterations": 1}, {"seed": 1}, {"damp": 1.0}):
        assert not torch.equal(kept(weight, x, index_bits=5, **options).dequantize(), plain)
    monkeypatch.setattr("graftwork.storage.vptq.PER_ENTRY", 4)
    fewer = kept(weight, x, index_bits=5).dequantize()
    monkeypatch.undo()
    assert (plain - weight).norm() < (fewer - weight).norm() < 2 * (plain - weight).norm()
    x[:, 3] = 0
    error = (kept(weight, x).dequantize() - weight).norm(dim=0) / weight.norm(dim=0)
    assert error[3] < 0.6
    config = make_config("storage", "vptq", outlier_columns=0)
    layout = Layout(config, 32, 40)
    found = encode(weight, torch.zeros(40, 40), config, layout, torch.Generator().manual_seed(0))  # nothing was ever fed
    assert all(torch.isfinite(value.float()).all() for value in found.values())
