"""Every calibration over every format of groups, taken from the registry: what a calibration promises whatever its method is."""

import functools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from graftwork.errors import UsageError
from graftwork.registry import lookup, make_config, methods
from graftwork.storage._channels import restored
from graftwork.storage._groups import GroupStorage
from graftwork.storage._second_order import proxy_loss
from graftwork.storage.base import make_storage
from graftwork.storage.calibration.base import Calibrated, calibration_of
from graftwork.storage.calibration.statistics import InputStatistics

#: output error allowed, as a multiple of that of the nearest codes on the same inputs; 1 where it is not here
MARGIN = {"hqq": 1.15, "zeroquant_fp": 2, "repquant": 2}
#: options that make a slow method short
SHORT = {"adaquant": {"steps": 20}, "cbq": {"steps": 20}, "qllm": {"steps": 20, "search": 5}}
FORMATS = [info.name for info in methods("storage") if issubclass(info.cls, GroupStorage)]
CALIBRATIONS = [info.name for info in methods("calibration")]
BASIC = {"int4", "int2"}
every = pytest.mark.parametrize("method", CALIBRATIONS)
OUT, IN = 12, 70
both = pytest.mark.parametrize(("method", "kind"), [
    pytest.param(method, kind, marks=() if kind == "int2" else pytest.mark.slow) for method in CALIBRATIONS for kind in FORMATS])


def weights(dtype=torch.float32):
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1)).to(dtype)


@functools.cache
def inputs():
    generator = torch.Generator().manual_seed(2)
    mixing = torch.randn(IN, IN, generator=generator) / IN**0.5
    x = torch.randn(240, IN, generator=generator) @ mixing * torch.linspace(0.3, 2, IN)
    x[:, 7] *= 12
    return x


def statistics(x=None, needs=None):
    x = inputs() if x is None else x
    found = InputStatistics(x.shape[1]) if needs is None else InputStatistics(x.shape[1], needs)
    found.add(x)
    return found


def options(kind, calibration):
    fields = lookup("storage", kind).config.model_fields
    given = {"group_size": 32} if "group_size" in fields else {}
    if calibration == "hqq" and "zero_point" in fields:
        given["zero_point"] = "float"
    return given


def config_of(kind, calibration):
    return make_config("storage", kind, **options(kind, calibration), calibration={"method": calibration, **SHORT.get(calibration, {})})


def quantizer_of(kind, config):
    return lookup("storage", kind).cls.quantizer(config, IN)


def source(kind, config, dtype=torch.float32):
    """(what the calibration is given, the scale beside the grid's): a format may divide the weight and pad it."""
    cls, weight = lookup("storage", kind).cls, weights(dtype)
    outer = cls.prescale(weight, config) if hasattr(cls, "prescale") else None
    weight = weight if outer is None else weight.float() / outer.float()
    return torch.nn.functional.pad(weight, (0, quantizer_of(kind, config).columns - IN)), outer


@functools.cache
def kept(method, kind, dtype=torch.float32):
    """(the storage, what the calibration found), or what it said against this format."""
    config = config_of(kind, method)
    calibration = calibration_of(config.calibration)
    try:
        stored = make_storage(weights(dtype), kind, config, statistics=statistics(needs=calibration.needs))
    except UsageError as error:
        return error, None
    return stored, calibration.calibrate(source(kind, config, dtype)[0], quantizer_of(kind, config), statistics(needs=calibration.needs))


def same(left: Calibrated, right: Calibrated):
    pairs = [(left.codes, right.codes), *((left.parameters[n], right.parameters[n]) for n in {*left.parameters, *right.parameters})]
    for name in ("input_scale", "channels"):
        if getattr(left, name) is not None or getattr(right, name) is not None:
            pairs.append((getattr(left, name), getattr(right, name)))
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)


@both
def test_what_is_found(method, kind):
    """In range, what the storage keeps, the same again, the size that is promised, and no worse than the nearest."""
    before = torch.get_rng_state()
    stored, found = kept(method, kind)
    if found is None:
        assert kind not in BASIC and stored.remedy, "every calibration works with integers, and a refusal says what to do"
        return
    config = config_of(kind, method)
    quantizer, calibration = quantizer_of(kind, config), calibration_of(config.calibration)
    given, outer = source(kind, config)
    assert found.codes.shape == given.shape and found.codes.dtype == torch.uint8 and int(found.codes.max()) < 2**quantizer.grid.bits
    assert {n: v.dtype for n, v in found.parameters.items()} == quantizer.grid.parameters
    assert (found.input_scale is not None) == calibration.scales_input and (found.channels is not None) == calibration.reassembles
    dense = quantizer.decode(found.codes, found.parameters)[:, :IN] * (1 if outer is None else outer.float())
    if found.channels is not None:
        assert found.channels.shape == (2, IN)
        dense = restored(dense, found.channels)
    if found.input_scale is not None:
        assert found.input_scale.dtype == torch.float16 and found.input_scale.shape == (IN,)
        dense = dense / found.input_scale.float()
    assert torch.isfinite(dense).all() and torch.equal(stored.dequantize(), dense)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    assert same(calibration_of(config.calibration).calibrate(given, quantizer, statistics()), found)
    assert torch.equal(torch.get_rng_state(), state)
    torch.set_rng_state(before)
    plain = make_storage(weights(), kind, make_config("storage", kind, **options(kind, method)))
    more = 16 * calibration.scales_input + 32 * calibration.reassembles
    assert stored.bits_per_weight == pytest.approx(plain.bits_per_weight + more / OUT)
    hessian = statistics().hessian
    nearest, error = (proxy_loss(each.dequantize() - weights(), hessian) for each in (plain, stored))
    assert error <= (MARGIN.get(method, 1) + 1e-6) * nearest


@both
def test_shapes_without_values(method, kind):
    stored, found = kept(method, kind)
    config = config_of(kind, method)
    calibration, quantizer = calibration_of(config.calibration), quantizer_of(kind, config)
    if found is None:
        with pytest.raises(UsageError), FakeTensorMode():
            make_storage(torch.empty(OUT, IN), kind, config)
        return

    def kinds(result):
        tensors = (result.codes, *(result.parameters[n] for n in quantizer.grid.parameters), result.input_scale, result.channels)
        return [None if t is None else (t.shape, t.dtype) for t in tensors]

    assert kinds(calibration.shapes(source(kind, config)[0], quantizer)) == kinds(found)
    with FakeTensorMode():
        fake = make_storage(torch.empty(OUT, IN), kind, config)
        assert {n: (p.shape, p.dtype) for n, p in fake.named_parameters()} == {n: (p.shape, p.dtype) for n, p in stored.named_parameters()}
        assert fake(torch.empty(3, IN)).shape == (3, OUT)


@every
@pytest.mark.slow
def test_bfloat16_weights(method):
    stored, found = kept(method, "int4", torch.bfloat16)
    assert stored.dequantize().dtype == torch.bfloat16 and torch.isfinite(stored.dequantize()).all()
    wide = calibration_of(config_of("int4", method).calibration).calibrate(
        weights(torch.bfloat16).float(), quantizer_of("int4", config_of("int4", method)), statistics())
    assert same(wide, found)


@every
def test_missing_and_damaged_statistics_are_refused(method):
    config = config_of("int4", method)
    calibration = calibration_of(config.calibration)
    assert calibration.needs == lookup("storage", "int4").cls.needs(config)
    if not calibration.needs:
        make_storage(weights(), "int4", config)
        return
    for absent in (None, InputStatistics(IN, calibration.needs), statistics(needs=())):
        with pytest.raises(UsageError, match="no such data") as caught:
            make_storage(weights(), "int4", config, statistics=absent)
        assert "calibration: rtn" in caught.value.remedy
    for value in (float("nan"), float("inf")):
        damaged = inputs().clone()
        damaged[3, 4] = value
        with pytest.raises(UsageError, match="NaN or infinite") as caught:
            make_storage(weights(), "int4", config, statistics=statistics(damaged, calibration.needs))
        assert caught.value.remedy


@every
@pytest.mark.slow
def test_pieces_of_rows_change_nothing(method, monkeypatch):
    stored, found = kept(method, "int4")
    config = config_of("int4", method)
    monkeypatch.setattr("graftwork.storage.calibration.base.PIECE", 5 * IN)
    again = calibration_of(config.calibration).calibrate(weights(), quantizer_of("int4", config), statistics())
    # products of other shapes round otherwise, and a weight may lie between two codes
    assert (again.codes == found.codes).float().mean() > 0.95
    for name, value in found.parameters.items():
        near = 1.01 if value.dtype == torch.uint8 else 0.02
        torch.testing.assert_close(again.parameters[name].float(), value.float(), rtol=0.02, atol=near)
