"""BitMoD against an exhaustive search in float64 over grids and values, its claims about errors, and both formulas of bits."""

import pytest
import torch

from graftwork.registry import make_config
from graftwork.storage._packing import unpack
from graftwork.storage.base import make_storage
from graftwork.storage.bitmod import BitMoDGrid
from graftwork.storage.calibration.statistics import InputStatistics

GRIDS = {4: [[0, 1, 2, 3, 4, 6, 8, 12, -1, -2, -3, -4, -6, -8, -12, special] for special in (10, -10, 16, -16)],
         3: [[0, 1, 2, 4, -1, -2, -4, special] for special in (3, -3, 6, -6)]}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def kept(weight, **options):
    return make_storage(weight, "bitmod", make_config("storage", "bitmod", **options))


def half(x):
    return float(torch.tensor(x, dtype=torch.float32).half())


def by_search(group, bits, row_scale=None):
    """One group: (error, selector, values) of the best grid; a row's fp16 number where scales are 255ths of it."""
    best = None
    for selector, values in enumerate(GRIDS[bits]):
        scale = float(group.abs().max()) / max(map(abs, values))
        scale = half(scale) if row_scale is None else min(max(round(scale / row_scale * 255), 1), 255) / 255 * row_scale
        grid = torch.tensor(sorted(values), dtype=torch.float64) * scale
        found = grid[(group.double()[:, None] - grid).abs().argmin(1)]
        error = float(((found - group.double()) ** 2).sum())
        if best is None or error < best[0] * (1 - 1e-5):
            best = error, selector, found
    return best


@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize("scale", ["fp16", "int8"])
def test_equals_the_search(bits, scale):
    weight = (normal(10, 70) + 0.7 * normal(10, 70, seed=1).exp()) * torch.tensor([1.0, -1.0] * 5)[:, None]  # tails on one side
    weight[::3] = normal(4, 70, seed=2)
    stored = kept(weight, bits=bits, scale=scale, group_size=16)
    selectors = unpack(stored.leaves()["selector"], 5, 2)
    dense, used = stored.dequantize().double(), set()
    for i, row in enumerate(weight):
        row_scale = half(float(row.abs().max()) / max(GRIDS[bits][0][:8 if bits == 4 else 4])) if scale == "int8" else None
        for j, group in enumerate(row.split(16)):
            error, selector, values = by_search(group, bits, row_scale)
            part = dense[i, 16 * j: 16 * j + 16]
            assert float(((part - group.double()) ** 2).sum()) == pytest.approx(error, rel=1e-4)
            if int(selectors[i, j]) == selector:
                torch.testing.assert_close(part, values, atol=1e-5, rtol=1e-5)
            used.add(selector)
    assert used == {0, 1, 2, 3}


@pytest.mark.parametrize("bits", [4, 3])
def test_bits_by_both_formulas(bits):
    weight = normal(32, 512)
    assert kept(weight, bits=bits).bits_per_weight == bits + 18 / 128
    assert kept(weight, bits=bits, scale="int8").bits_per_weight == bits + 10 / 128 + 16 / 512


def test_ties_go_to_the_lower_value_and_extremes_stay_finite():
    grid, own = BitMoDGrid(4, "fp16"), {"scale": torch.ones(1).half(), "selector": torch.ones(1).byte()}
    values = torch.tensor([[12, 0.5, -0.5, 2.5, -10, 5, 7, -7, 1.5, 0, -9, -11, 10, -5]])
    expected = torch.tensor([[12, 0, -1, 2, -10, 4, 6, -8, 1, 0, -10, -12, 8, -6]]).float()
    assert torch.equal(grid.decode(grid.encode(values, own), own), expected)
    for value in (0.0, 1e-9, 3.0, 6e4):
        for scale in ("fp16", "int8"):
            dense = kept(torch.full((2, 40), value), scale=scale, group_size=16).dequantize()
            torch.testing.assert_close(dense, torch.full((2, 40), value), atol=1e-6, rtol=2e-2)


def test_order_of_errors_on_normal_numbers():
    weight, error = normal(64, 512), {}
    symmetric = {"symmetric": True}
    for name, options in (("int4", symmetric), ("fp4", {}), ("bitmod", {}), ("int3", symmetric), ("bitmod", {"bits": 3})):
        config = make_config("storage", name, group_size=64, **options)
        error[name, options.get("bits", 4)] = float((make_storage(weight, name, config).dequantize() - weight).norm() / weight.norm())
    assert error["bitmod", 4] < 0.9 * error["fp4", 4] and error["bitmod", 4] < error["int4", 4]
    assert error["bitmod", 3] < 0.8 * error["int3", 4]
    grid = BitMoDGrid(4, "fp16")
    codes = torch.arange(16, dtype=torch.uint8).expand(4, 16)
    assert torch.equal(grid.decode(codes, {"scale": torch.ones(4).half(), "selector": torch.arange(4).byte()}),
                       torch.tensor([sorted(values) for values in GRIDS[4]]).float())


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"bits": 3, "scale": "int8"}], ids=str)
@pytest.mark.parametrize("calibration", [{"method": "gptq"}, {"method": "gptq", "act_order": True, "mse": 0.2}], ids=str)
def test_gptq_on_these_grids_lowers_the_output_error(options, calibration):
    x = normal(200, 64, seed=2) @ normal(64, 64, seed=3) / 8
    weight, statistics, errors = normal(24, 64, seed=4), InputStatistics(64, ("hessian",)), []
    statistics.add(x)
    for method in ({"method": "rtn"}, calibration):
        config = make_config("storage", "bitmod", group_size=32, calibration=method, **options)
        dense = make_storage(weight, "bitmod", config, statistics=statistics).dequantize()
        errors.append(float(((dense - weight) @ x.T).norm()))
    assert errors[1] < 0.9 * errors[0]
