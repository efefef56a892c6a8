"""AWQ against its definition in float64, the identity of the folded scale, and what it is for: a few inputs that are much larger."""

import pytest
import torch

from graftwork.registry import make_config
from graftwork.storage.base import make_storage
from graftwork.storage.calibration.statistics import InputStatistics

OUT, IN = 16, 96


def weights(seed=1):
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed))


def inputs(seed=0, tokens=200):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, IN, generator=generator)
    x[:, [5, 40, 77]] *= torch.tensor([30.0, 20.0, 40.0])
    return x


def statistics_of(x):
    found = InputStatistics(x.shape[1], {"samples", "mean_abs"})
    found.add(x)
    return found


def kept(weight, x, bits=3, scale_dtype="fp32", group=32, **options):
    config = make_config("storage", f"int{bits}", group_size=group, scale_dtype=scale_dtype, calibration={"method": "awq", **options})
    return make_storage(weight, f"int{bits}", config, statistics=statistics_of(x))


def nearest(weight, bits, group=32):
    """The format's own rounding in float64: integer zero, range stretched to 0."""
    part, top = weight.double().reshape(len(weight), -1, group), 2**bits - 1
    low, high = part.amin(-1, keepdim=True).clamp(max=0), part.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / top
    zero = (-low / scale).round().clamp(0, top)
    return scale, zero


def rounded(weight, scale, zero, bits):
    part = weight.double().reshape(len(weight), scale.shape[1], -1)
    return ((((part / scale).round() + zero).clamp(0, 2**bits - 1) - zero) * scale).reshape(weight.shape)


def error(dense, weight, x):
    return float(((dense.double() - weight.double()) @ x.double().T).square().mean())


def test_equals_its_definition():
    weight, x, bits = weights(), inputs(), 3
    size, best = x.abs().mean(0).double(), None
    for i in range(20):
        scale = (size ** (i / 20)).clamp(min=1e-4)
        scale = (scale / (scale.max() * scale.min()).sqrt()).half().double()
        found = rounded(weight * scale, *nearest(weight * scale, bits), bits) / scale
        best = min(best, (error(found, weight, x), i, scale), key=lambda each: each[0]) if best else (error(found, weight, x), i, scale)
    _, exponent, scale = best
    assert exponent > 0
    stored = kept(weight, x, bits, clip=False)
    assert torch.equal(stored.leaves()["input_scale"].double(), scale)
    assert error(stored.dequantize(), weight, x) == pytest.approx(best[0], rel=1e-3)
    # ranges, group by group, each judged by its own part of the outputs
    scaled, chosen, least = weight.double() * scale, None, None
    for i in range(10):
        limit = scaled.reshape(OUT, -1, 32).abs().amax(-1, keepdim=True) * (1 - i / 20)
        tried = rounded(scaled, *nearest(scaled.reshape(OUT, -1, 32).clamp(-limit, limit).reshape(OUT, IN), bits), bits)
        off = (tried - scaled).reshape(OUT, -1, 32)
        loss = torch.einsum("ogi,ngi->ogn", off, (x / scale).reshape(len(x), -1, 32)).square().sum(-1)
        better = torch.ones_like(loss, dtype=torch.bool) if chosen is None else loss < least
        values = tried.reshape(OUT, -1, 32)
        chosen = values if chosen is None else torch.where(better[..., None], values, chosen)
        least = loss if least is None else torch.where(better, loss, least)
    got = kept(weight, x, bits).dequantize().double()
    assert ((got - chosen.reshape(OUT, IN) / scale).abs() > 1e-4).float().mean() < 0.02


@pytest.mark.slow
def test_one_step_without_ranges_is_the_nearest_and_so_is_neither():
    weight, x = weights(), inputs()
    plain = make_storage(weight, "int3", make_config("storage", "int3", group_size=32, scale_dtype="fp32"))
    stored = kept(weight, x, steps=1, clip=False)
    assert (stored.leaves()["input_scale"] == 1).all() and torch.equal(stored.dequantize(), plain.dequantize())
    config = make_config("storage", "int3", group_size=32, scale_dtype="fp32", calibration={"method": "awq", "scale": False, "clip": False})
    without = make_storage(weight, "int3", config)  # reads no statistics
    assert torch.equal(without.dequantize(), plain.dequantize()) and "input_scale" not in without.leaves()


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_each_part_lowers_the_error_on_other_tokens(bits):
    weight, x, other = weights(), inputs(), inputs(9)
    plain = error(make_storage(weight, f"int{bits}", make_config("storage", f"int{bits}", group_size=32)).dequantize(), weight, other)
    scaled = error(kept(weight, x, bits, clip=False).dequantize(), weight, other)
    clipped = error(kept(weight, x, bits, scale=False).dequantize(), weight, other)
    both = error(kept(weight, x, bits).dequantize(), weight, other)
    assert scaled < 0.6 * plain and clipped < 0.95 * plain and both < 0.95 * scaled


@pytest.mark.slow
def test_the_scale_divides_the_weight_and_costs_16_bits_an_input():
    weight, x = weights(), inputs()
    stored = kept(weight, x, scale_dtype="fp16")
    scale = stored.leaves()["input_scale"].float()
    without = {name: leaf for name, leaf in stored.leaves().items() if name != "input_scale"}
    plain = type(stored)(OUT, IN, stored.options, without, None, torch.float32)
    torch.testing.assert_close(plain(x / scale), stored(x), rtol=1e-4, atol=1e-3)  # folded into what is before: the same outputs
    assert stored.bits_per_weight == 3 + 24 / 32 + 16 / OUT
    assert kept(weight, x, scale_dtype="fp16", scale=False).bits_per_weight == 3 + 24 / 32


@pytest.mark.slow
def test_dead_inputs_and_the_number_of_steps():
    weight, x = weights(), inputs()
    coarse, fine = kept(weight, x, steps=3, clip=False), kept(weight, x, clip=False)
    assert not torch.equal(coarse.leaves()["input_scale"], fine.leaves()["input_scale"])
    x[:, 9] = 0
    stored = kept(weight, x)
    assert float((stored.dequantize()[:, 9] - weight[:, 9]).abs().max()) < 4 and torch.isfinite(stored.dequantize()).all()
    assert torch.isfinite(kept(weight, torch.zeros(20, IN)).dequantize()).all()
