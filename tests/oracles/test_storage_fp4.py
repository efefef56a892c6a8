"""FP4 against brute force in float64, bitsandbytes for its book, torch's E4M3 cast; bits by formula."""

import pytest
import torch

from graftwork.registry import make_config
from graftwork.storage.base import make_storage
from graftwork.storage.calibration.statistics import InputStatistics

MAGNITUDES = {"e2m1": [0, 0.5, 1, 1.5, 2, 3, 4, 6], "bnb": [0, 0.0625, 2, 3, 4, 6, 8, 12]}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def kept(weight, **options):
    return make_storage(weight, "fp4", make_config("storage", "fp4", **options))


def scales_by_definition(groups, top, kind):
    """(rows, groups, g) float64 -> (rows, groups, 1), by powers and torch's casts."""
    largest = groups.abs().amax(-1, keepdim=True)
    if kind == "e8m0":
        return 2.0 ** (largest.log2().floor() - int(torch.tensor(float(top)).log2()))
    if kind == "e4m3":
        outer = float(groups.abs().max().float() / (448 * top))
        return ((largest / outer).float() / top).to(torch.float8_e4m3fn).double() * outer
    return (largest.float() / top).to({"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[kind]).double()


@pytest.mark.parametrize("book", ["e2m1", "bnb"])
@pytest.mark.parametrize("kind", ["fp16", "bf16", "fp32", "e4m3", "e8m0"])
def test_nearest_by_brute_force(book, kind):
    weight = normal(6, 96, seed=3)
    stored = kept(weight, book=book, scale=kind, group_size=16)
    grid = torch.tensor(MAGNITUDES[book], dtype=torch.float64)
    grid = torch.cat([grid, -grid])
    groups = weight.double().view(6, 6, 16)
    values = grid * scales_by_definition(groups, grid.max(), kind)  # (rows, groups, 16 values)
    values = values[:, :, None, :].expand(6, 6, 16, 16)
    best = values.gather(-1, (groups[..., None] - values).abs().argmin(-1, keepdim=True))[..., 0]
    torch.testing.assert_close(stored.dequantize().double(), best.view(6, 96), atol=1e-6, rtol=1e-5)


def test_bits_and_the_error_of_seeded_normal_numbers():
    weight = normal(64, 256)
    for kind, bits in (("fp16", 16), ("bf16", 16), ("fp32", 32), ("e8m0", 8)):
        assert kept(weight, scale=kind, group_size=32).bits_per_weight == 4 + bits / 32
    assert kept(weight, scale="e4m3", group_size=16).bits_per_weight == 4 + 8 / 16 + 32 / weight.numel()
    weight = torch.randn(1024, 4096, generator=torch.manual_seed(0))[:128]
    for block, expected in ((32, 0.1141), (64, 0.1219)):
        error = (kept(weight, book="bnb", scale="fp32", group_size=block).dequantize() - weight).norm() / weight.norm()
        assert float(error) == pytest.approx(expected, abs=1e-3)


def test_ties_go_to_the_even_code():
    weight = torch.tensor([[6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -0.75, -5, -3.5]])
    expected = torch.tensor([[6, 0, 1, 1, 2, 2, 4, 4, 0, -1, -4, -4]]).float()
    assert torch.equal(kept(weight, scale="fp32").dequantize(), expected)


@pytest.mark.parametrize("scale", ["fp32", "e4m3", "e8m0"])
def test_extreme_groups_stay_finite(scale):
    for value in (0.0, 1e-30, 3.0, 1e30):
        weight = torch.cat([torch.full((2, 16), value), torch.zeros(2, 16)], 1)
        dense = kept(weight, scale=scale, group_size=16).dequantize()
        torch.testing.assert_close(dense, weight, rtol=0.35 if scale == "e8m0" else 1e-6, atol=1e-37)


def test_equals_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = normal(8, 256, seed=1)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="fp4")
    expected = functional.dequantize_4bit(packed, state)
    torch.testing.assert_close(kept(weight, book="bnb", scale="fp32").dequantize(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["fp16", "e4m3", "e8m0"])
def test_gptq_on_this_grid_lowers_the_output_error(scale):
    x = normal(200, 64, seed=2) @ normal(64, 64, seed=3) / 8
    weight, statistics, errors = normal(24, 64, seed=4), InputStatistics(64, ("hessian",)), []
    statistics.add(x)
    for calibration in ("rtn", "gptq"):
        config = make_config("storage", "fp4", scale=scale, group_size=16, calibration=calibration)
        dense = make_storage(weight, "fp4", config, statistics=statistics).dequantize()
        errors.append(float(((dense - weight) @ x.T).norm()))
    assert errors[1] < 0.9 * errors[0]
