"""SpQR against GPTQ on the formats of integer groups where it must be the same, brute force for what is left out of a fit, planted
outliers, and decoding against what the solver returned."""

import pytest
import torch

from graftwork.errors import UsageError
from graftwork.registry import make_config
from graftwork.storage._second_order import proxy_loss
from graftwork.storage.base import make_storage
from graftwork.storage.calibration.statistics import InputStatistics
from graftwork.storage.spqr import _solved, left_out, quantized_statistics, restored

NONE = 1e30  # a threshold that nothing exceeds


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(tokens=300, features=96, seed=0):
    mixing = normal(features, features, seed=seed + 1) / features**0.5
    return normal(tokens, features, seed=seed) @ mixing * torch.linspace(0.1, 3, features)


def statistics_of(x):
    found = InputStatistics(x.shape[1], ("hessian",))
    found.add(x)
    return found


def kept(weight, x, **options):
    return make_storage(weight, "spqr", make_config("storage", "spqr", **options), statistics=statistics_of(x))


@pytest.mark.parametrize("group", [16, 96])
def test_without_outliers_and_second_level_it_is_gptq(group):
    x, weight = inputs(), normal(8, 96, seed=5)
    calibration = {"method": "gptq", "damp": 0.01}
    config = make_config("storage", "int3", group_size=group, zero_point="float", calibration=calibration)
    expected = make_storage(weight, "int3", config, statistics=statistics_of(x))
    got = kept(weight, x, bits=3, group_size=group, statistic_bits=16, threshold=NONE, damp=0.01, act_order=False)
    assert got.outlier_part() == 0
    differs = (got.dequantize() - expected.dequantize()).abs() > 0.02  # zeros are of the scale before, or after, it is rounded
    assert differs.float().mean() < 0.02  # a tie may fall the other way


def test_left_out_of_the_fit_is_what_brute_force_says():
    columns, diagonal = normal(12, 7, seed=1), normal(7, seed=2).abs() + 0.3
    columns[0] = columns[0].abs()
    columns[1, 3], columns[2, 0], columns[3, 6] = 9, -7, 20
    threshold = torch.tensor(0.3)
    got = left_out(columns, diagonal, 3, threshold)

    def error(row, fitted):
        low, high = min(float(fitted.min()), 0), max(float(fitted.max()), 0)
        scale = (high - low) / 7
        codes = (row / scale - low / scale).round().clamp(0, 7)
        return ((row - scale * (codes + low / scale)) / diagonal.double()).square()

    for r, row in enumerate(columns.double()):
        whole = error(row, row).sum()
        for i in range(7):
            others = torch.arange(7) != i
            assert got[r, i] == (whole - error(row, row[others])[others].sum() > 0.3)
    assert got[1, 3] and got[2, 0] and got[3, 6] and not got.all(1).any()


@pytest.mark.parametrize("rows", [16, 33, 1, 5])
def test_second_level_is_within_half_a_step(rows):
    values = normal(rows, seed=3).abs() + 0.1
    codes, step, base = quantized_statistics(values, 16, 3)
    assert step.shape == base.shape == (-(-rows // 16),) and int(codes.max()) <= 7
    back = restored(codes, step, base, 16)
    half = step.float()[torch.arange(rows) // 16] / 2
    assert ((back - values).abs() <= half + 2e-3).all()
    assert torch.equal(restored(codes[3:], step, base, 16, 3), back[3:])


@pytest.mark.slow
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("statistic_bits", [3, 16])
def test_decoding_is_what_the_solver_returned(act_order, statistic_bits):
    weight, x = normal(37, 96, seed=5), inputs()
    weight[normal(37, 96, seed=6) > 2.4] *= 10
    config = make_config("storage", "spqr", bits=3, statistic_bits=statistic_bits, act_order=act_order)
    found, order = _solved(weight, config, statistics_of(x).hessian)
    stored = make_storage(weight, "spqr", config, statistics=statistics_of(x))
    dense = stored.dequantize()
    assert 0.002 < stored.outlier_part() < 0.1
    assert torch.equal(dense if order is None else dense[:, order], found.values)
    for first, stop in ((0, 37), (5, 6), (17, 37), (0, 16)):
        assert torch.equal(stored.decode(stored.leaves(), slice(first, stop)), dense[first:stop])


@pytest.mark.slow
def test_planted_outliers_are_found_and_cost_less_than_finer_groups():
    x, weight = inputs(), normal(64, 96, seed=5)
    planted = torch.rand(64, 96, generator=torch.Generator().manual_seed(8)) < 0.005
    weight[planted] = 20 * weight[planted].sign()
    got = kept(weight, x, bits=3, damp=0.01)
    leaves = got.leaves()
    rows = torch.arange(64).repeat_interleave(leaves["outlier_starts"].diff())
    is_outlier = torch.zeros(64, 96, dtype=torch.bool)
    is_outlier[rows, leaves["outlier_columns"].long()] = True
    assert (is_outlier & planted).sum() > 0.9 * planted.sum() and is_outlier.float().mean() < 0.05
    hessian = x.T @ x / len(x)
    config = make_config("storage", "int4", group_size=16, calibration="gptq")
    plain = make_storage(weight, "int4", config, statistics=statistics_of(x))
    assert got.bits_per_weight < plain.bits_per_weight
    assert proxy_loss(got.dequantize() - weight, hessian) < 0.5 * proxy_loss(plain.dequantize() - weight, hessian)


@pytest.mark.slow
@pytest.mark.parametrize(("options", "expected"), [
    ({}, 4 + 6 / 16 + 64 / 256 + 16 / 64), ({"bits": 3}, 3 + 6 / 16 + 64 / 256 + 16 / 64),
    ({"act_order": False}, 4 + 6 / 16 + 64 / 256), ({"group_size": 32}, 4 + 6 / 32 + 64 / 512 + 16 / 64),
    ({"tile_rows": 8}, 4 + 6 / 16 + 64 / 128 + 16 / 64), ({"statistic_bits": 4}, 4 + 8 / 16 + 64 / 256 + 16 / 64),
    ({"statistic_bits": 16}, 4 + 32 / 16 + 16 / 64)], ids=str)
def test_bits_per_weight(options, expected):
    weight, x = normal(64, 256, seed=1), normal(300, 256, seed=2)
    weight[3, 200] = 40
    stored = kept(weight, x, **options)
    starts = 32 * 65 / (64 * 256)
    assert stored.bits_per_weight == pytest.approx(expected + 32 * stored.outlier_part() + starts)
    meta = make_storage(torch.empty(64, 256, device="meta"), "spqr", make_config("storage", "spqr", outlier_fraction=0.02, **options))
    assert meta.bits_per_weight == pytest.approx(expected + 32 * round(0.02 * 64 * 256) / (64 * 256) + starts)


@pytest.mark.slow
def test_threshold_and_damp_change_what_is_kept():
    weight, x = normal(24, 96, seed=5), inputs()
    loose, tight = kept(weight, x, bits=2, threshold=0.05), kept(weight, x, bits=2, threshold=0.5)
    assert loose.outlier_part() > 2 * tight.outlier_part() > 0
    assert not torch.equal(tight.dequantize(), kept(weight, x, bits=2, threshold=0.5, damp=0.01).dequantize())


@pytest.mark.slow
def test_another_number_of_outliers_is_loaded_and_too_wide_is_refused():
    weight, x = normal(24, 96, seed=5), inputs()
    stored = kept(weight, x, bits=2, threshold=0.05)
    config = make_config("storage", "spqr", bits=2, threshold=0.05)
    with pytest.warns(UserWarning, match="no calibration data"):
        other = make_storage(torch.zeros(24, 96), "spqr", config)
    other.load_state_dict(stored.state_dict())
    assert torch.equal(other.dequantize(), stored.dequantize()) and other.bits_per_weight == stored.bits_per_weight
    with pytest.raises(UsageError, match="16 bits"):
        make_storage(torch.empty(1, 70000, device="meta"), "spqr", config)


@pytest.mark.slow
def test_values_that_fp16_cannot_hold():
    x = inputs()
    for factor in (0.0, 1e-9, 1e6):
        assert torch.isfinite(kept(factor * normal(5, 96), x).dequantize()).all()
    x[:, 7] = 0
    assert kept(normal(5, 96), x, threshold=NONE).dequantize()[:, 7].abs().max() < 0.2  # zeros are real: 0 is near half a step, not exact
