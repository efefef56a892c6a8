"""AdaQuant: the straight-through gradient against its closed form, less error on other tokens, every rate in use."""

import pytest
import torch

from graftwork.registry import lookup, make_config
from graftwork.storage.base import make_storage
from graftwork.storage.calibration.adaquant import Tuned
from graftwork.storage.calibration.statistics import InputStatistics

OUT, IN = 16, 96


def weights(seed=1):
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed))


def inputs(seed=0, tokens=500):
    mixing = torch.randn(IN, IN, generator=torch.Generator().manual_seed(5)) / IN**0.5 * torch.linspace(0.1, 2, IN)
    return torch.randn(tokens, IN, generator=torch.Generator().manual_seed(seed)) @ mixing


def config_of(bits, calibration, **options):
    return make_config("storage", f"int{bits}", group_size=32, calibration=calibration, **options)


def kept(weight, x, bits=3, storage=None, **options):
    statistics = InputStatistics(IN, {"hessian"})
    statistics.add(x)
    return make_storage(weight, f"int{bits}", config_of(bits, {"method": "adaquant", **options}, **(storage or {})), statistics=statistics)


def error(dense, weight, x):
    return float(((dense - weight) @ x.T).square().mean())


@pytest.mark.parametrize("kind", [{}, {"zero_point": "float"}, {"symmetric": True}], ids=str)
def test_gradient_is_the_straight_through_one(kind):
    """d/dV 1 within the codes; d/ds  code - zero - V/s within, code - zero outside; d/dzero  0 within, -s outside."""
    bits, weight = 3, weights()
    quantizer = lookup("storage", "int3").cls.quantizer(config_of(bits, "rtn", **kind), IN)
    tuned = Tuned(weight, quantizer)
    with torch.no_grad():
        tuned.trained["units"].mul_(1.4)  # some lie outside the codes
    upstream = torch.randn(OUT, 3, 32, generator=torch.Generator().manual_seed(3))
    tuned.dense().backward(upstream)
    scale = tuned.start["scale"].double()[..., None]
    zero = torch.full_like(scale, 4.0) if kind.get("symmetric") else tuned.start["zero"].double()[..., None]
    unit = tuned.trained["units"].detach().double()
    codes = (unit + zero).round() if kind.get("zero_point") else unit.round() + zero
    inside = (unit + zero >= -0.4375) & (unit + zero <= 7.4375)  # 7/16 of a step beyond the last codes
    wanted = codes.clamp(0, 7) - zero
    torch.testing.assert_close(tuned.trained["units"].grad.double(), upstream * scale * inside, rtol=1e-4, atol=1e-5)
    by_scale = (upstream * torch.where(inside, wanted - unit, wanted)).sum(-1) * scale[..., 0]
    torch.testing.assert_close(tuned.trained["log_scale"].grad.double(), by_scale, rtol=1e-3, atol=1e-3)
    if not kind.get("symmetric"):
        by_zero = (upstream * torch.where(inside, 0.0, -scale)).sum(-1)
        torch.testing.assert_close(tuned.trained["shift"].grad.double(), by_zero, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [{}, {"zero_point": "float"}, {"symmetric": True}], ids=str)
def test_less_error_on_other_tokens(kind):
    weight, x, other = weights(), inputs(), inputs(9)
    for bits, part in ((3, 0.75), (2, 0.65)):
        plain = error(make_storage(weight, f"int{bits}", config_of(bits, "rtn", **kind)).dequantize(), weight, other)
        assert error(kept(weight, x, bits, kind, steps=100).dequantize(), weight, other) < part * plain


@pytest.mark.slow
def test_every_rate_is_used():
    weight, x = weights(), inputs()
    plain = make_storage(weight, "int3", config_of(3, "rtn")).leaves()
    still = kept(weight, x, steps=20, lr_weight=0, lr_scale=0, lr_zero=0).leaves()
    assert all(torch.equal(still[name], plain[name]) for name in plain)
    only = {name: kept(weight, x, steps=20, **{n: 0 for n in ("lr_weight", "lr_scale", "lr_zero") if n != name}).leaves()
            for name in ("lr_weight", "lr_scale", "lr_zero")}
    assert torch.equal(only["lr_weight"]["scale"], plain["scale"]) and torch.equal(only["lr_weight"]["zero"], plain["zero"])
    assert not torch.equal(only["lr_weight"]["codes"], plain["codes"])
    assert not torch.equal(only["lr_scale"]["scale"], plain["scale"]) and torch.equal(only["lr_scale"]["zero"], plain["zero"])
    assert torch.equal(only["lr_zero"]["scale"], plain["scale"]) and not torch.equal(only["lr_zero"]["zero"], plain["zero"])
    few, many = kept(weight, x, steps=5), kept(weight, x, steps=40)
    assert error(many.dequantize(), weight, x) < error(few.dequantize(), weight, x)
    assert few.bits_per_weight == 3 + 24 / 32


@pytest.mark.slow
def test_rows_are_alone_and_magnitude_does_not_matter():
    weight, x = weights(), inputs()
    whole = kept(weight, x, steps=30, storage={"scale_dtype": "fp32"}).dequantize()
    part = kept(weight[:5].contiguous(), x, steps=30, storage={"scale_dtype": "fp32"}).dequantize()
    assert ((whole[:5] - part).abs() > 1e-3).float().mean() < 0.05  # products of other shapes round otherwise
    small = kept(weight * 2**-6, x * 2**5, steps=30, storage={"scale_dtype": "fp32"}).dequantize() * 2**6
    assert ((whole - small).abs() > 1e-3).float().mean() < 0.05
    assert torch.isfinite(kept(weight, x * 0, steps=3).dequantize()).all()
