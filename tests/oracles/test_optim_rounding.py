"""Rounding of bfloat16 weights: what stochastic rounding must do to the bit, and what each keeps of many small updates."""

import pytest
import torch

from graftwork.errors import UsageError
from graftwork.modeling.arithmetic import round_stochastic
from graftwork.optim import optimizer, parameter_groups
from graftwork.registry import lookup


@pytest.mark.slow
def test_stochastic_rounding_goes_to_the_neighbors_with_the_right_mean():
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(50, generator=generator), torch.tensor([1e-39, -3e38, 1.0 + 2**-9])])
    bits = x.view(torch.int32) & -65536
    inner, outer = bits.view(torch.float32), (bits + 65536).view(torch.float32)  # next toward zero, and away from it
    draws = torch.stack([round_stochastic(x, torch.bfloat16, generator).float() for _ in range(4000)])
    assert torch.all((draws == inner) | (draws == outer))
    share = (draws == outer).float().mean(0)
    expected = ((x.double() - inner.double()) / (outer.double() - inner.double())).float()
    assert (share - expected).abs().max() < 0.04  # 5 sigma of 4000 draws


def test_stochastic_rounding_keeps_exact_and_non_finite_values():
    x = torch.tensor([0.0, -0.0, 1.5, -2.0, float("inf"), -float("inf")])
    nan = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # noise would carry it over into -0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        assert torch.equal(round_stochastic(x, torch.bfloat16, generator).float(), x)
        assert round_stochastic(nan, torch.bfloat16, generator).isnan().all()


@pytest.mark.slow
@pytest.mark.parametrize("rounding, low, high", [("nearest", 0.0, 0.0), ("stochastic", 0.9, 1.1), ("kahan", 0.96, 1.04)])
def test_small_updates_add_up(rounding, low, high):
    """1000 updates of 1/20 of half a unit in the last place: lost, kept in the mean, kept."""
    p = torch.nn.Parameter(torch.ones(4000, dtype=torch.bfloat16))
    built = optimizer("sgd", [p], lr=2.0**-9 / 20, momentum=0.0, rounding=rounding)
    for _ in range(1000):
        p.grad = -torch.ones_like(p)
        built.step()
    assert low <= (p.detach().double().mean() - 1).item() / (1000 * 2.0**-9 / 20) <= high


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["adamw", "lion", "galore"])
def test_kahan_follows_float32_more_closely(name, dtype):
    finals = {}
    for rounding in ("float32", "nearest", "kahan"):
        start = torch.randn(24, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
        p = torch.nn.Parameter(start.float() if rounding == "float32" else start)
        built = optimizer(name, [p], lr=1e-3, **({} if rounding == "float32" else {"rounding": rounding}),
                          **({"rank": 4} if name == "galore" else {}))
        generator = torch.Generator().manual_seed(1)
        for _ in range(60):
            p.grad = (torch.randn(24, 16, generator=generator) + 1).to(dtype).to(p.dtype)
            built.step()
        finals[rounding] = p.detach().double()
    assert built.state[p]["compensation"].dtype == dtype
    finals["sum"] = finals["kahan"] + built.state[p]["compensation"].double()
    errors = {k: (v - finals["float32"]).abs().mean() for k, v in finals.items()}
    assert errors["kahan"] < 0.5 * errors["nearest"] and errors["sum"] < 0.05 * errors["nearest"], errors


def test_state_of_the_roundings():
    size = lookup("optimizer", "adamw").cls.state_bytes
    for dtype, more in ((torch.bfloat16, 2), (torch.float16, 2), (torch.float32, 0), (torch.float64, 0)):
        assert size((6, 5), dtype, rounding="kahan") == size((6, 5), dtype) + 30 * more
    assert size((6, 5), torch.bfloat16, rounding="stochastic") == size((6, 5), torch.bfloat16)


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_float32_weights_are_not_touched_and_draws_differ(rounding):
    finals = {}
    for dtype in (torch.float32, torch.bfloat16):
        for chosen in ("nearest", rounding):
            params = [torch.nn.Parameter(torch.ones(300, dtype=dtype)) for _ in range(2)]
            built = optimizer("sgd", params, lr=1e-3, rounding=chosen)
            for p in params:
                p.grad = torch.full_like(p, 0.3)
            built.step()
            finals[dtype, chosen] = [p.detach() for p in params]
    assert torch.equal(finals[torch.float32, rounding][0], finals[torch.float32, "nearest"][0])
    if rounding == "stochastic":
        first, second = finals[torch.bfloat16, rounding]
        assert not torch.equal(first, second)  # each parameter draws its own numbers


def test_rates_per_weight_are_rounded_with_the_update():
    """A gain of 1/4 on each entry's step must act before the rounding, and leave the compensation right."""
    p = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    built = optimizer("sgd", [{"params": [p], "update_gain": lambda old: torch.full_like(old, 0.25)}], lr=2.0**-10,
                      momentum=0.0, rounding="kahan")
    for _ in range(64):
        p.grad = torch.ones_like(p)
        built.step()
    assert torch.equal(p.detach().float() + built.state[p]["compensation"].float(), torch.full((8,), 1 - 64 * 2.0**-12))


def test_float16_cannot_round_stochastically():
    model = torch.nn.Linear(3, 2).half()
    with pytest.raises(UsageError, match="bfloat16"):
        optimizer("adamw", model, rounding="stochastic")
    assert parameter_groups(model) and optimizer("adamw", model, rounding="kahan")
