"""HQQ against the hqq package (its own steps where it is installed) and the published errors of seeded normal numbers."""

import pytest
import torch

from graftwork.errors import UsageError
from graftwork.registry import make_config
from graftwork.storage.base import make_storage


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def kept(weight, bits, group=64, scale_dtype="fp32", **options):
    config = make_config("storage", f"int{bits}", group_size=group, scale_dtype=scale_dtype, zero_point="float",
                         calibration={"method": "hqq", **options} if options.pop("on", True) else "rtn")
    return make_storage(weight, f"int{bits}", config)


def relative(dense, weight):
    return float((dense - weight).norm() / weight.norm())


def naive(groups, bits, steps, p=0.7, beta=10.0, kappa=1.01):
    """By its definition, in float64: (zeros, mean error) of every step."""
    groups, top = groups.double(), 2**bits - 1
    scale = (groups.amax(1) - groups.amin(1)) / top
    zero, history = -groups.amin(1) / scale, []
    for _ in range(steps + 1):
        codes = (groups / scale[:, None] + zero[:, None]).round().clamp(0, top)
        off = groups - (codes - zero[:, None]) * scale[:, None]
        history.append((zero, off.abs().mean(1)))
        let_pass = off.sign() * (off.abs() - off.abs() ** (p - 1) / beta).clamp(min=0)
        zero = (codes - (groups - let_pass) / scale[:, None]).mean(1)
        beta *= kappa
    return history


@pytest.mark.parametrize("bits", [2, 4])
def test_equals_its_definition(bits):
    weight = normal(12, 64)
    stored, history = kept(weight, bits, 32, steps=6), naive(weight.reshape(-1, 32), bits, 6)
    errors = torch.stack([error for _, error in history])
    expected = torch.stack([zero for zero, _ in history]).gather(0, errors.argmin(0)[None])[0]
    got = stored.leaves()["zero"].reshape(-1)
    assert ((got - expected).abs() < 1e-4).float().mean() > 0.9  # a code at a tie may fall the other way
    mean = (stored.dequantize() - weight).reshape(-1, 32).abs().mean(1)
    torch.testing.assert_close(mean.double(), errors.amin(0), rtol=2e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "without", "published"), [(2, 0.4500, 0.4326), (3, 0.1920, 0.1825), (4, 0.0896, 0.0859)])
def test_published_errors(bits, without, published):
    weight = normal(512, 1024)
    assert relative(kept(weight, bits, on=False).dequantize(), weight) == pytest.approx(without, abs=1e-3)
    assert relative(kept(weight, bits).dequantize(), weight) <= published * 1.005


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_worse_than_the_package(bits):
    optimize = pytest.importorskip("hqq.core.optimize")
    weight = normal(64, 256, seed=1)
    groups, top = weight.reshape(-1, 64), 2**bits - 1
    inverse = top / (groups.amax(1, keepdim=True) - groups.amin(1, keepdim=True))
    zero = -groups.amin(1, keepdim=True) * inverse
    # One step of ours is one of theirs; kappa=1, as they leave beta as it is.
    _, _, first, _ = optimize.optimize_weights_proximal_legacy_step(groups, inverse, zero, [0, top], 10.0, 0.7, 1)
    ours = kept(weight, bits, steps=1, kappa=1.0).leaves()["zero"].reshape(-1, 1)
    agree = ((ours - first).abs() < 1e-3) | ((ours - zero).abs() < 1e-3)  # the first zero stays where it is the better one
    assert agree.float().mean() > 0.95 and ((ours - first).abs() < 1e-3).float().mean() > 0.5
    codes, scale, zero = optimize.optimize_weights_proximal_legacy(groups, inverse, zero, [0, top], axis=1)
    theirs = ((codes - zero) / scale).reshape(64, 256)
    got = kept(weight, bits, kappa=1.0).dequantize()
    assert (got - weight).abs().mean() <= (theirs - weight).abs().mean() + 1e-6
    assert relative(got, weight) < relative(theirs, weight) * 1.01


def test_every_option_and_short_groups():
    weight = normal(16, 70)
    plain = kept(weight, 2, 32, "fp16").leaves()["zero"]
    for options in ({"steps": 1}, {"p": 0.3}, {"beta": 2.0}, {"kappa": 1.3}):
        assert not torch.equal(kept(weight, 2, 32, "fp16", **options).leaves()["zero"], plain), options
    # the last group has 6 weights: alone, it gets the same (but for sums in another order)
    alone = kept(weight[:, 64:].contiguous(), 2, 32, "fp16").leaves()["zero"]
    assert (plain[:, 2:] == alone).float().mean() > 0.8
    assert kept(normal(16, 64), 2, 32, "fp16").bits_per_weight == 2 + 32 / 32


def test_formats_without_a_float_zero_are_refused():
    for options in ({}, {"symmetric": True}):
        config = make_config("storage", "int4", calibration="hqq", **options)
        with pytest.raises(UsageError, match="float zero") as caught:
            make_storage(normal(4, 64), "int4", config)
        assert "zero_point: float" in caught.value.remedy
