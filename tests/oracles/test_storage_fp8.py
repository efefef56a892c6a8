"""FP8 against torch's casts of a float64 reference, the list of all float8 values by brute force; blocks by a loop; bits by formula."""

import pytest
import torch

from graftwork.errors import UsageError
from graftwork.registry import make_config
from graftwork.storage import _tiles
from graftwork.storage.base import make_storage
from graftwork.storage.calibration.statistics import InputStatistics

TOP = {"e4m3": 448.0, "e5m2": 57344.0}
TYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def kept(weight, **options):
    return make_storage(weight, "fp8", make_config("storage", "fp8", **options))


def by_definition(block, kind, kept_as=torch.float32):
    scale = (block.abs().max().float() / TOP[kind]).to(kept_as).double()
    return (block.double() / scale).clamp(-TOP[kind], TOP[kind]).to(TYPES[kind]).double() * scale


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
@pytest.mark.parametrize(("rows", "group"), [(1, -1), (1, 32), (8, 16), (3, 50)])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_equals_casts_of_each_block(kind, rows, group, dtype, monkeypatch):
    monkeypatch.setattr(_tiles, "TILE", 500)  # several tiles, whose rows start within blocks
    weight = normal(21, 70)
    stored = kept(weight, format=kind, group_size=group, block_rows=rows, scale_dtype=dtype)
    expected, step = torch.empty(21, 70, dtype=torch.float64), 70 if group < 0 else group
    for i in range(0, 21, rows):
        for j in range(0, 70, step):
            block = weight[i: i + rows, j: j + step]
            expected[i: i + rows, j: j + step] = by_definition(block, kind, torch.float16 if dtype == "fp16" else torch.float32)
    wrong = (stored.dequantize().double() - expected).abs() > 1e-6 * expected.abs()
    assert wrong.float().mean() < 2e-3  # a tie in fp32 may fall the other way
    torch.testing.assert_close(stored(x := normal(2, 70, seed=1)), x @ stored.dequantize().T)
    torch.testing.assert_close(stored.transposed(g := normal(2, 21, seed=1)), g @ stored.dequantize())


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_nearest_of_all_values_and_extremes(kind):
    values = torch.arange(256, dtype=torch.uint8).view(TYPES[kind]).double()
    values = values[values.isfinite()]
    assert values.max() == TOP[kind]
    weight = torch.cat([normal(1, 500) * torch.logspace(-4, 0, 500), torch.tensor([[5.0]])], 1)
    scale = (torch.tensor(5.0) / TOP[kind]).double()
    distance = (weight.double().T / scale - values).abs().min(1).values
    found = ((kept(weight, format=kind).dequantize().double() - weight.double()) / scale).abs()[0]
    torch.testing.assert_close(found, distance, atol=1e-5 * TOP[kind], rtol=1e-4)
    for extreme in (0.0, 1e-38, 3e38):
        dense = kept(torch.full((2, 8), extreme), format=kind).dequantize()
        torch.testing.assert_close(dense, torch.full((2, 8), extreme), atol=1e-37, rtol=1e-6)


def test_a_scale_that_is_rounded_down_saturates():
    """The largest weight over an fp16 scale rounded down is above 448, the end of the type."""
    weights = torch.linspace(1, 2, 200)[:, None].repeat(1, 4)
    for kind in TOP:
        dense = kept(weights, format=kind, scale_dtype="bf16").dequantize()
        assert dense.isfinite().all() and (dense / weights - 1).abs().max() < 2**-7


def test_bits_per_weight():
    weight = normal(64, 256)
    assert kept(weight).bits_per_weight == 8 + 32 / 256
    assert kept(weight, group_size=32, scale_dtype="bf16").bits_per_weight == 8 + 16 / 32
    assert kept(weight, group_size=32, block_rows=16).bits_per_weight == 8 + 32 / (32 * 16)
    assert kept(normal(65, 257), group_size=32, block_rows=16).bits_per_weight == 8 + 32 * 5 * 9 / (65 * 257)


def test_blocks_take_no_other_calibration_and_rows_do():
    with pytest.raises(UsageError, match="rows share scales"):
        make_config("storage", "fp8", block_rows=128, group_size=128, calibration="gptq")
    statistics, weight = InputStatistics(16, ("hessian",)), normal(4, 16)
    statistics.add(normal(50, 16, seed=1) @ normal(16, 16, seed=2))
    stored = make_storage(weight, "fp8", make_config("storage", "fp8", calibration="gptq"), statistics=statistics)
    assert (stored.dequantize() - weight).norm() < 0.1 * weight.norm() and not torch.equal(stored.codes, kept(weight).codes)


@pytest.mark.parametrize("kind", TYPES)
def test_the_table_is_torchs(kind):
    from graftwork.storage.fp8 import VALUES

    bytes_ = torch.arange(256, dtype=torch.uint8).view(TYPES[kind]).float()
    torch.testing.assert_close(torch.tensor(VALUES[kind]), bytes_, rtol=0, atol=0, equal_nan=True)
