"""GPTQ against its definition written out naively in float64, and what must hold: the identity for H = I, a smaller error otherwise."""

import pytest
import torch

from graftwork.errors import UsageError
from graftwork.registry import make_config
from graftwork.storage._second_order import inverse_factor, proxy_loss, solve
from graftwork.storage.base import make_storage
from graftwork.storage.calibration.statistics import InputStatistics


def inputs(tokens=300, features=96, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator) / features**0.5
    return torch.randn(tokens, features, generator=generator) @ mixing * torch.linspace(0.1, 3, features)


def statistics_of(x, needs=("hessian",)):
    found = InputStatistics(x.shape[1], needs)
    for part in x.split(70):
        found.add(part)
    return found


def kept(weight, x, bits=3, **calibration):
    config = make_config("storage", f"int{bits}", group_size=32, scale_dtype="fp32", calibration={"method": "gptq", **calibration})
    return make_storage(weight, f"int{bits}", config, statistics=statistics_of(x))


def naive(weight, hessian, bits, group, damp):
    """One column at a time over the whole rest, by removing a row and a column of H^-1: the published derivation, in float64."""
    work, h = weight.double().clone(), hessian.double()
    h = h + damp * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    inverse, out, top = torch.linalg.inv(h), torch.empty_like(work), 2**bits - 1
    for j in range(len(h)):
        if j % group == 0:
            part = work[:, j: j + group]
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            scale = ((high - low) / top).float().double()
            zero = (-low / scale).round()
        out[:, j] = (((work[:, j] / scale).round() + zero).clamp(0, top) - zero) * scale
        error = (work[:, j] - out[:, j]) / inverse[0, 0]
        work[:, j:] -= error[:, None] * inverse[0]
        inverse = (inverse - torch.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]
    return out


def test_equals_the_published_derivation():
    x, weight = inputs(), torch.randn(8, 96, generator=torch.Generator().manual_seed(1))
    expected = naive(weight, x.T @ x / len(x), 3, 32, 0.01)
    got = kept(weight, x).dequantize().double()
    assert ((got - expected).abs() > 1e-4).float().mean() < 0.02  # a tie in fp32 may fall the other way


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("options", [{}, {"act_order": True}, {"mse": 0.3}, {"act_order": True, "mse": 0.3}], ids=str)
def test_smaller_output_error_than_the_nearest(bits, options):
    x, weight = inputs(), torch.randn(24, 96, generator=torch.Generator().manual_seed(1))
    hessian, config = x.T @ x / len(x), make_config("storage", f"int{bits}", group_size=32, scale_dtype="fp32")
    nearest = proxy_loss(make_storage(weight, f"int{bits}", config).dequantize() - weight, hessian)
    assert proxy_loss(kept(weight, x, bits, **options).dequantize() - weight, hessian) < 0.8 * nearest


def test_uncorrelated_inputs_give_the_nearest():
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(1))
    config = make_config("storage", "int3", group_size=32, scale_dtype="fp32")
    assert torch.equal(kept(weight, 10 * torch.eye(96)).dequantize(), make_storage(weight, "int3", config).dequantize())


def test_pieces_and_long_groups():
    """Groups longer than a piece, groups that divide nothing, and a short last group: equal to a solver without pieces."""
    x, weight = inputs(features=300), torch.randn(4, 300, generator=torch.Generator().manual_seed(1))
    hessian = x.T @ x / len(x)

    class Rounded:
        def __init__(self, group):
            self.group, self.starts = group, []

        def start(self, j, columns, diagonal):
            self.starts.append((j, columns.clone()))

        def quantize(self, j, column, u):
            return column.round()

    for group in (1, 7, 64, 130, 300):
        rounded = Rounded(group)
        found = solve(weight, hessian, rounded)
        assert [j for j, _ in rounded.starts] == list(range(0, 300, group))
        upper, work = inverse_factor(hessian, 0.01), weight.clone()
        for j in range(300):
            if j % group == 0:
                torch.testing.assert_close(rounded.starts[j // group][1], work[:, j: j + group], atol=1e-3, rtol=1e-3)
            assert ((found[:, j] - work[:, j]).abs() <= 0.501).all()
            work[:, j + 1:] -= ((work[:, j] - found[:, j]) / upper[j, j])[:, None] * upper[j, j + 1:]


def test_dead_inputs_and_bad_statistics():
    x, weight = inputs(), torch.randn(4, 96, generator=torch.Generator().manual_seed(1))
    x[:, 5] = 0
    assert (kept(weight, x).dequantize()[:, 5] == 0).all()
    with pytest.raises(UsageError, match="NaN"):
        kept(weight, x * float("nan"))


def test_statistics_are_sums_over_the_real_tokens():
    x = inputs(500, 8)
    found = InputStatistics(8, keep=64)
    for part in x.split(33):
        padded = torch.cat([part, torch.full((5, 8), 9.0)])
        found.add(padded, torch.arange(len(padded)) < len(part))
    assert found.count == 500
    torch.testing.assert_close(found.hessian, x.T @ x / 500)
    torch.testing.assert_close(found.mean_abs, x.abs().mean(0))
    torch.testing.assert_close(found.max_abs, x.abs().amax(0))
    rows = {tuple(row) for row in x.tolist()}
    assert len(found.samples) == 64 and all(tuple(row) in rows for row in found.samples.tolist())
    assert InputStatistics(8).hessian is None
