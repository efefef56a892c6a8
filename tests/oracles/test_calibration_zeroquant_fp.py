"""ZeroQuant-FP's constrained scales against their definition in float64: exact powers, no weight cut unless asked for."""

import math

import pytest
import torch

from graftwork.errors import UsageError
from graftwork.registry import make_config
from graftwork.storage._second_order import proxy_loss
from graftwork.storage.base import make_storage
from graftwork.storage.calibration.statistics import InputStatistics
from graftwork.storage.calibration.zeroquant_fp import power_of_two

OUT, IN, GROUP = 12, 96, 16


def weights(seed=1):
    spread = torch.linspace(-4, 0, IN // GROUP).exp2().repeat_interleave(GROUP)  # groups of very different size
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed)) * spread


def statistics():
    generator = torch.Generator().manual_seed(3)
    found = InputStatistics(IN, {"hessian"})
    found.add(torch.randn(300, IN, generator=generator) @ (torch.randn(IN, IN, generator=generator) / IN**0.5))
    return found


def kept(weight, constraint="m1", bits=4, inner="rtn", clip=False, **storage):
    calibration = {"method": "zeroquant_fp", "constraint": constraint, "inner": inner, "clip": clip}
    config = make_config("storage", f"int{bits}", group_size=GROUP, calibration=calibration, **storage)
    return make_storage(weight, f"int{bits}", config, statistics=statistics())


def plain(weight, bits=4, calibration="rtn", **storage):
    return make_storage(weight, f"int{bits}", make_config("storage", f"int{bits}", group_size=GROUP, calibration=calibration, **storage),
                        statistics=statistics())


def powers(x):
    return all(math.frexp(value)[0] == 0.5 for value in x.double().reshape(-1).tolist())


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("constraint", ["m1", "m2"])
def test_values_are_those_of_the_definition(constraint, clip):
    weight = weights()
    scales = plain(weight, symmetric=True).leaves()["scale"]
    expected, wanted = torch.empty(OUT, IN, dtype=torch.float64), torch.empty(OUT, IN // GROUP, dtype=torch.float64)
    for row in range(OUT):
        top = float(scales[row].max())
        for group in range(IN // GROUP):
            s = float(scales[row, group])
            if constraint == "m1":
                new = 2.0 ** (math.floor if clip else math.ceil)(math.log2(s))
            else:
                new = top / 2.0 ** (math.ceil if clip else math.floor)(math.log2(top / s))
            wanted[row, group] = new
            part = slice(group * GROUP, (group + 1) * GROUP)
            expected[row, part] = (weight[row, part].double() / new).round().clamp(-8, 7) * new
    stored = kept(weight, constraint, symmetric=True, clip=clip)
    new = stored.leaves()["scale"].double()
    assert torch.equal(new, wanted)
    torch.testing.assert_close(stored.dequantize().double(), expected)
    ratio = new / scales.double()
    assert ((ratio > 0.5) & (ratio <= 1)).all() if clip else ((ratio >= 1) & (ratio < 2)).all()
    off = (stored.dequantize() - weight).abs().reshape(OUT, -1, GROUP).amax(-1)
    assert (off > 0.51 * new).any() if clip else (off < 0.51 * new).all()  # a weight that is cut is off by more than half a step
    assert powers(new) if constraint == "m1" else powers(new / new.amax(1, keepdim=True)) and not powers(new)
    assert stored.bits_per_weight == 4 + 16 / GROUP


@pytest.mark.slow
@pytest.mark.parametrize("kind", [{}, {"zero_point": "float"}, {"scale_dtype": "bf16"}], ids=str)
@pytest.mark.parametrize("constraint", ["m1", "m2"])
def test_with_zero_points_and_inside_gptq(constraint, kind):
    weight, hessian = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1)), statistics().hessian
    losses = {}
    for inner in ("rtn", "gptq", {"method": "gptq", "act_order": True, "mse": 0.3}):
        stored = kept(weight, constraint, 3, inner, **kind)
        scale = stored.leaves()["scale"].double()
        assert powers(scale) if constraint == "m1" else powers(scale / scale.amax(1, keepdim=True))
        losses[str(inner)] = proxy_loss(stored.dequantize() - weight, hessian)
    assert losses["gptq"] < 0.85 * losses["rtn"] and losses[str(inner)] != losses["gptq"]
    free = proxy_loss(plain(weight, 3, **kind).dequantize() - weight, hessian)
    assert losses["rtn"] < 3.5 * free  # at most twice the step
    rounded = kept(weight, constraint, 3, **kind)
    part, step = weight.reshape(OUT, -1, GROUP), rounded.leaves()["scale"].float()
    off = (rounded.dequantize() - weight).abs().reshape(part.shape).amax(-1)
    assert (off <= 1.02 * step).all()  # a whole zero is rounded, so that an end of the range may be off by a step


def test_powers_are_exact():
    x = torch.tensor([1.0, 1.0000001, 0.75, 2**-24, 3e-5, 65504.0, 2.0**15])
    assert power_of_two(x, up=True).tolist() == [1.0, 2.0, 1.0, 2.0**-24, 2.0**-15, 65536.0, 32768.0]
    assert power_of_two(x, up=False).tolist() == [1.0, 1.0, 0.5, 2.0**-24, 2.0**-16, 32768.0, 32768.0]


def test_very_small_and_large_weights_stay_exact():
    weight = weights() * torch.tensor([1e-6, 1e-4, 1.0, 1e5]).repeat(3)[:, None]
    for constraint in ("m1", "m2"):
        stored = kept(weight, constraint, symmetric=True)
        scale = stored.leaves()["scale"].double()
        assert torch.isfinite(stored.dequantize()).all() and (scale > 0).all()
        assert powers(scale) if constraint == "m1" else powers(scale / scale.amax(1, keepdim=True))


def test_what_sets_scales_itself_is_refused():
    with pytest.raises(UsageError, match="gptq or rtn"):
        make_config("storage", "int4", calibration={"method": "zeroquant_fp", "inner": "awq"})
    config = make_config("storage", "int4", calibration="zeroquant_fp")
    with pytest.raises(UsageError, match="no such data"):
        make_storage(weights(), "int4", config)
