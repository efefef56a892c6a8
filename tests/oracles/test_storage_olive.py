"""OliVe against its definition, pair by pair in Python; the card's figures for heavy tails; bytes, pairs and refusals."""

import pytest
import torch

from graftwork.errors import UsageError
from graftwork.registry import make_config
from graftwork.storage.base import make_storage

NORMAL = {"int": [4 * i for i in range(8)], "flint": [2 * i for i in (0, 1, 2, 3, 4, 6, 8, 16)]}  # the paper's units, 4 of ours
OUTLIERS = [48, 64, 96, 128, 192, 256, 384]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def kept(weight, **options):
    return make_storage(weight, "olive", make_config("storage", "olive", **options))


def pairs_by_definition(row, scale, kind):
    """Values of a row (even length) in the paper's units, and the bytes of its pairs."""
    grid, values, packed = [*NORMAL[kind], *OUTLIERS], [], []
    unit = (row.double() / scale * 4).tolist()
    nearest = [min(grid, key=lambda g: abs(abs(u) - g)) for u in unit]
    for i in range(0, len(unit), 2):
        pair, codes = [], []
        for k in (i, i + 1):
            size, sign = nearest[k], -1 if unit[k] < 0 else 1
            exponent = max(e for e in range(4) if 2 << (e + 4) <= size) if size > 32 else 0
            code = 2 * exponent + (size >> exponent + 4) - 2 if size > 32 else NORMAL[kind].index(size)
            pair.append(sign * size)
            codes.append(code + 8 * (sign < 0 and size > 0))
        if nearest[i] > 32:
            pair[1], codes[1] = 0, 8
        elif nearest[i + 1] > 32:
            pair[0], codes[0] = 0, 8
        values += pair
        packed.append(codes[0] + 16 * codes[1])
    return torch.tensor(values, dtype=torch.float64) * scale / 4, packed


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int", "flint"])
@pytest.mark.parametrize("group", [-1, 10])
def test_values_bytes_and_the_searched_scale(kind, group):
    weight = normal(5, 30) / normal(5, 30, seed=1).abs().clamp(min=0.05)
    stored = kept(weight, normal=kind, group_size=group)
    leaves, dense, step = stored.leaves(), stored.dequantize().double(), 30 if group < 0 else group
    for i, row in enumerate(weight):
        for j, part in enumerate(row.split(step)):
            scale = float(leaves["scale"][i, j])
            values, packed = pairs_by_definition(part, scale, kind)
            torch.testing.assert_close(dense[i, step * j: step * j + step], values)
            assert leaves["codes"][i, step // 2 * j: step // 2 * (j + 1)].tolist() == packed
            wide = float(part.mean().abs() + 3 * part.std(correction=0))
            tried = [float(torch.tensor(wide * r / 100 / (7 if kind == "int" else 8)).half()) for r in range(75, 251, 2)]
            errors = [float(((pairs_by_definition(part, each, kind)[0] - part.double()) ** 2).sum()) for each in tried]
            assert float(((values - part.double()) ** 2).sum()) == pytest.approx(min(errors), rel=1e-3)
            assert min(abs(each / scale - 1) for each in tried) < 2e-3
    assert (dense.view(5, -1, 2)[(leaves["codes"] & 15 == 8) | (leaves["codes"] >> 4 == 8)] == 0).any(1).all()


@pytest.mark.slow
def test_better_than_clipping_where_tails_are_heavy_only():
    heavy = normal(32, 512) / (normal(3, 32, 512, seed=1) ** 2).mean(0).sqrt()  # Student's t, 3 degrees of freedom
    uniform = torch.rand(32, 512, generator=torch.Generator().manual_seed(2)) - 0.5
    for weight, low, high in ((heavy, 0.0, 0.5), (uniform, 1.0, 2.5)):
        clipped = torch.full((32,), float("inf"))
        for part in torch.linspace(0.1, 1, 60):
            scale = weight.abs().amax(1, keepdim=True) * part / 7
            clipped = clipped.minimum((((weight / scale).round().clamp(-7, 7) * scale - weight) ** 2).sum(1))
        error = ((kept(weight).dequantize() - weight) ** 2).sum()
        assert low < error / clipped.sum() < high


@pytest.mark.slow
def test_bits_odd_rows_and_extremes():
    assert kept(normal(8, 64)).bits_per_weight == 4 + 16 / 64
    assert kept(normal(8, 64), group_size=16).bits_per_weight == 4 + 16 / 16
    stored, weight = kept(odd := normal(8, 63)), torch.cat([odd, torch.zeros(8, 1)], 1)
    assert stored.bits_per_weight == 8 * (32 + 2) / 63 and stored.dequantize().shape == (8, 63)
    assert torch.equal(stored.dequantize(), kept(weight).dequantize()[:, :63])
    for value in (0.0, 3.0, -2.5):
        torch.testing.assert_close(kept(torch.full((2, 32), value)).dequantize(), torch.full((2, 32), value), rtol=2e-2, atol=0)
    assert (kept(normal(8, 64), widest=75).scale != kept(normal(8, 64)).scale).any()


def test_what_cannot_be_is_refused():
    with pytest.raises(UsageError, match="pairs"):
        make_config("storage", "olive", group_size=15)
    config = make_config("storage", "olive", calibration="gptq")
    with pytest.raises(UsageError, match="neighbor within a pair"):
        make_storage(normal(4, 16), "olive", config)
