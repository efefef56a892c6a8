"""INT4, INT3, INT2: codes and values against the definition in float64, packing against a loop over bits, bits a weight by formula."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graftwork.errors import UsageError
from graftwork.registry import make_config
from graftwork.storage._packing import look_up, pack, packed_width, unpack
from graftwork.storage.base import make_storage

SHAPES = [(5, 64), (7, 70), (3, 200), (1, 1), (4, 33)]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def kept(weight, bits, **options):
    return make_storage(weight, f"int{bits}", make_config("storage", f"int{bits}", **options))


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 5), count=st.integers(1, 70), bits=st.integers(1, 8), seed=st.integers(0, 99))
def test_packing_is_a_stream_of_bits(rows, count, bits, seed):
    codes = torch.randint(2**bits, (rows, count), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (rows, packed_width(count, bits)) and packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, count, bits), codes)
    stream = "".join(format(byte, "08b")[::-1] for byte in packed[0].tolist())
    assert [int(stream[i * bits:(i + 1) * bits][::-1], 2) for i in range(count)] == codes[0].tolist()
    table = torch.randn(2**bits, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(look_up(packed, count, bits, tuple(table.tolist())), table[codes.long()])


def by_definition(row, bits, symmetric, whole):
    """One group in float64, with the scale (and a float zero) rounded to fp16 as they are kept."""
    top, low, high = 2**bits - 1, float(row.min()), float(row.max())

    def half(x):
        return float(torch.tensor(x, dtype=torch.float32).half())

    if symmetric:
        scale, zero = half(max(abs(low), abs(high)) / max(2 ** (bits - 1) - 1, 1)) or 1.0, 2 ** (bits - 1)
    else:
        if whole:
            low, high = min(low, 0.0), max(high, 0.0)
        scale = half(abs(low) if low == high else (high - low) / top) or 1.0
        zero = (1.0 if low < 0 else 0.0) if low == high else -low / scale
        zero = min(max(round(zero), 0), top) if whole else half(zero)
    out = []
    for w in row.double().tolist():
        unit = round(w / scale) + zero if symmetric or whole else round(w / scale + zero)
        out.append((min(max(unit, 0), top) - zero) * scale)
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("kind", ["symmetric", "integer", "float"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_are_those_of_the_definition(bits, kind, shape):
    weight = normal(*shape)
    options = {"symmetric": True} if kind == "symmetric" else {"zero_point": kind}
    stored = kept(weight, bits, group_size=32, **options)
    expected = torch.stack([torch.cat([by_definition(group, bits, kind == "symmetric", kind == "integer") for group in row.split(32)])
                            for row in weight])
    # A weight may lie within fp32's rounding of the middle of two codes.
    wrong = (stored.dequantize().double() - expected).abs() > 1e-5 * expected.abs().max()
    assert wrong.float().mean() < 0.01


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize(("options", "metadata"), [({}, 24), ({"zero_point": "float"}, 32), ({"symmetric": True}, 16),
                                                  ({"scale_dtype": "fp32"}, 40)], ids=str)
def test_bits_per_weight(bits, options, metadata):
    assert kept(normal(64, 256), bits, group_size=64, **options).bits_per_weight == bits + metadata / 64
    assert kept(normal(64, 256), bits, group_size=-1, **options).bits_per_weight == bits + metadata / 256


def test_published_errors_of_seeded_normal_numbers():
    weight = torch.randn(1024, 4096, generator=torch.manual_seed(0))
    for options, expected in (({"symmetric": True, "scale_dtype": "fp32"}, 0.1077), ({"scale_dtype": "fp32"}, 0.0911)):
        error = (kept(weight, 4, group_size=64, **options).dequantize() - weight).norm() / weight.norm()
        assert float(error) == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("kind", ["symmetric", "integer", "float"])
@pytest.mark.parametrize("value", [0.0, 3.0, -2.5, 1e-9, 1e6])
def test_constant_and_extreme_groups(kind, value):
    options = {"symmetric": True} if kind == "symmetric" else {"zero_point": kind}
    dense = kept(torch.full((2, 64), value), 4, **options).dequantize()
    assert torch.isfinite(dense).all()
    if abs(value) < 6e4:
        torch.testing.assert_close(dense, torch.full((2, 64), value), atol=1e-6, rtol=2e-3)


def test_unknown_options_and_calibrations_are_refused():
    with pytest.raises(UsageError, match="calibration"):
        make_config("storage", "int4", calibration="gtpq")
    with pytest.raises(UsageError, match="group_siz"):
        make_config("storage", "int4", group_siz=64)
    config = make_config("storage", "int4", calibration={"method": "gptq", "damp": 0.1})
    assert config.calibration == {"method": "gptq", "damp": 0.1, "act_order": False, "mse": 0.0}
    with pytest.raises(UsageError, match="calibration data"):
        make_storage(normal(4, 64), "int4", config)
