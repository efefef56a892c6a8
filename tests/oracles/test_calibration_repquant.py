"""RepQuant's reparameterised scales: the two identities, the cut of each channel by brute force, the error with rounded inputs."""

import pytest
import torch

from graftwork.errors import UsageError
from graftwork.registry import make_config
from graftwork.storage.base import make_storage
from graftwork.storage.calibration.repquant import cuts
from graftwork.storage.calibration.statistics import InputStatistics

OUT, IN = 16, 64


def weights(seed=1):
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed))


def inputs(seed=0, tokens=300):
    """Channels up to a hundred times as large as others."""
    spread = 10 ** torch.linspace(-1, 1, IN)[torch.randperm(IN, generator=torch.Generator().manual_seed(8))]
    return torch.randn(tokens, IN, generator=torch.Generator().manual_seed(seed)) * spread


def statistics_of(x):
    found = InputStatistics(IN)
    found.add(x)
    return found


def kept(weight, x, bits=4, **options):
    config = make_config("storage", f"int{bits}", group_size=32, calibration={"method": "repquant", "inner": "rtn", **options})
    return make_storage(weight, f"int{bits}", config, statistics=statistics_of(x))


def nearest(x, by_token):
    scale = x.abs().amax(-1, keepdim=True) / 7 if by_token else x.abs().max() / 7
    return (x / scale).round() * scale


def test_codes_of_the_inputs_are_those_of_a_step_for_every_channel():
    x = inputs()
    ratio = kept(weights(), x, clip=False).leaves()["input_scale"].double()
    step = x.abs().amax(0).double() / 7
    torch.testing.assert_close(ratio, step / step.mean(), rtol=1e-3, atol=0)
    one = float((step / ratio).mean())
    same = (x.double() / ratio / one).round() == (x.double() / step).round()
    assert same.float().mean() > 0.995  # but for values next to a tie: r is kept in fp16
    exact = step / step.mean()
    assert torch.equal((x.double() / exact / step.mean()).round(), (x.double() / step).round())


def test_the_function_stays_and_the_scale_costs_16_bits_an_input():
    weight, x = weights(), inputs()
    stored = kept(weight, x, clip=False)
    ratio = stored.leaves()["input_scale"].float()
    torch.testing.assert_close((weight * ratio) @ (x / ratio).T, weight @ x.T, rtol=1e-4, atol=1e-3)
    inner = make_storage(weight * ratio, "int4", make_config("storage", "int4", group_size=32))
    assert torch.equal(stored.leaves()["codes"], inner.leaves()["codes"])
    torch.testing.assert_close(inner(x / ratio), stored(x), rtol=1e-4, atol=1e-2)
    assert stored.bits_per_weight == 4 + 24 / 32 + 16 / OUT


@pytest.mark.slow
def test_inputs_of_4_bits_lose_much_less():
    weight, x, other = weights(), inputs(), inputs(9)
    plain = make_storage(weight, "int4", make_config("storage", "int4", group_size=32)).dequantize()
    stored = kept(weight, x)
    ratio = stored.leaves()["input_scale"].float()

    def error(x, dense):
        return float((x @ dense.T - other @ weight.T).square().mean())

    # one step for all tokens, as in the paper; a step a token, as storages round; that with a weight of 4 bits, which loses by the scale
    both = stored.dequantize()
    for by_token, before, after, part in ((False, weight, weight, 0.5), (True, weight, weight, 0.75), (True, plain, both, 0.95)):
        assert error(nearest(other / ratio, by_token) * ratio, after) < part * error(nearest(other, by_token), before)


@pytest.mark.slow
def test_cuts_are_the_best_of_those_tried():
    x = inputs() ** 3  # heavy tails
    largest = x.abs().amax(0)
    found = cuts(x, largest, 4)
    assert (found < 1).any()
    for channel in range(0, IN, 7):
        losses = {}
        for i in range(11):
            values, unit = x[:, channel].double(), float(largest[channel]) * (1 - i / 20) / 7
            losses[1 - i / 20] = float(((values / unit).round().clamp(-7, 7) * unit - values).square().sum())
        assert losses[min(losses, key=lambda part: abs(part - float(found[channel])))] == pytest.approx(min(losses.values()), rel=1e-4)


@pytest.mark.slow
def test_every_option():
    weight, x = weights(), inputs()
    x = x.sign() * x.abs() ** 1.5  # heavier tails
    plain = kept(weight, x)
    scale = plain.leaves()["input_scale"]
    config = {"clip": False}, {"inner": "gptq"}, {"inner": {"method": "adaquant", "steps": 5}}
    without, gptq, ada = (kept(weight, x, **options) for options in config)
    assert not torch.equal(without.leaves()["input_scale"], scale)
    fewer = make_config("storage", "int4", group_size=32, calibration={"method": "repquant", "inner": "rtn", "bits": 3})
    assert not torch.equal(make_storage(weight, "int4", fewer, statistics=statistics_of(x)).leaves()["input_scale"], scale)
    for other in (gptq, ada):
        assert torch.equal(other.leaves()["input_scale"], scale) and not torch.equal(other.leaves()["codes"], plain.leaves()["codes"])
    x[:, 3] = 0
    assert kept(weight, x).leaves()["input_scale"][3] == 1 and torch.isfinite(kept(weight, x * 0).dequantize()).all()
    with pytest.raises(UsageError, match="scales the inputs itself"):
        make_config("storage", "int4", calibration={"method": "repquant", "inner": "awq"})


@pytest.mark.slow
def test_a_zero_for_every_channel():
    """The codes of the inputs are those of an asymmetric step for every channel, and the function stays, in float64."""
    weight, x, other = weights(), inputs() + 20 * torch.linspace(-2, 3, IN), inputs(9) + 20 * torch.linspace(-2, 3, IN)
    options = {"method": "repquant", "inner": "rtn", "clip": False, "asymmetric": True}
    config = make_config("storage", "int4", group_size=32, activations="int4", calibration=options)
    stored = make_storage(weight, "int4", config, statistics=statistics_of(x))
    leaves = stored.leaves()
    ratio, middle = leaves["input_scale"].double(), leaves["input_shift"].double()
    low, high = x.double().amin(0), x.double().amax(0)
    torch.testing.assert_close(middle, (low + high) / 2, rtol=1e-3, atol=1e-3)
    step = torch.maximum(high - middle, middle - low) / 7
    exact = step / step.mean()
    codes = ((x.double() - middle) / exact / step.mean()).round()
    assert torch.equal(codes, ((x.double() - middle) / step).round()) and codes.abs().max() == 7
    torch.testing.assert_close(ratio, exact, rtol=1e-3, atol=0)
    changed = weight.double() * ratio
    torch.testing.assert_close((x.double() - middle) / ratio @ changed.T + middle @ weight.double().T, x.double() @ weight.double().T)
    dense = stored.dequantize().double()
    z = (other.double() - middle) / ratio
    scale = z.abs().amax(1, keepdim=True) / 7
    expected = ((z / scale).round() * scale * ratio + middle) @ dense.T
    torch.testing.assert_close(stored(other).double(), expected, rtol=1e-3, atol=1e-2 * float(expected.abs().mean()))
    given = other.clone().requires_grad_()
    torch.testing.assert_close(stored(given, leaves), stored(given), rtol=1e-3, atol=1e-2 * float(expected.abs().mean()))
    upstream = torch.randn(len(other), OUT, generator=torch.Generator().manual_seed(3))
    for y in (stored(given), stored(given, leaves)):
        torch.testing.assert_close(torch.autograd.grad(y, given, upstream)[0], upstream @ dense.float(), rtol=1e-3, atol=1e-3)
    plain = make_storage(weight, "int4", make_config("storage", "int4", group_size=32, activations="int4",
                                                     calibration={**options, "asymmetric": False}), statistics=statistics_of(x))
    wanted = other @ dense.float().T
    assert (stored(other) - wanted).square().mean() < 0.3 * (plain(other) - other @ plain.dequantize().T).square().mean()
    assert stored.bits_per_weight == 4 + 24 / 32 + 32 / OUT and not stored._given({"scale": leaves["scale"]}).keys() - leaves.keys()
    x[:, 3] = 5  # a channel that does not move costs nothing
    still = make_storage(weight, "int4", config, statistics=statistics_of(x)).leaves()
    assert still["input_shift"][3] == 5 and still["input_scale"][3] == 1
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = make_storage(torch.empty(OUT, IN), "int4", config)
        assert {n: p.shape for n, p in fake.named_parameters()} == {n: p.shape for n, p in stored.named_parameters()}
        assert fake(torch.empty(3, IN)).shape == (3, OUT)
