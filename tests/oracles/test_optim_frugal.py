"""FRUGAL against torch.optim.AdamW at density 1, signSGD at 0, GaLore without a state-free part, and its equations in between."""

import math

import pytest
import torch

from graftwork.optim import optimizer
from graftwork.optim.base import Clock
from graftwork.optim.sampled import ColumnSubspace, OrthogonalSubspace
from graftwork.optim.subspace import SVDSubspace, project, remainder
from graftwork.registry import lookup

SHAPES = [(24, 16), (16, 24)]


def gradient(shape, step):
    return torch.randn(shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def start(shape):
    return torch.nn.Parameter(gradient(shape, 99))


def run(built, p, steps):
    for step in range(steps):
        p.grad = gradient(p.shape, step)
        built.step()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_density_one_is_adamw_and_density_zero_is_the_sign(shape):
    p, q = start(shape), start(shape)
    run(optimizer("frugal", [p], lr=1e-2, density=1.0, update_proj_gap=100, weight_decay=0.1), p, 5)
    run(torch.optim.AdamW([q], lr=1e-2, weight_decay=0.1), q, 5)
    torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-12, atol=1e-12)
    p, expected = start(shape), start(shape).detach()
    built = optimizer("frugal", [p], lr=1e-2, density=0.0, update_proj_gap=2, weight_decay=0.1)
    run(built, p, 5)
    for step in range(5):
        expected = expected * (1 - 1e-3) - 1e-2 * gradient(shape, step).sign()
    torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-12)
    assert sum(t.numel() for t in built.state[p].values()) == 2  # step and seed


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_a_free_part_it_is_galore(shape):
    finals = []
    for name, options in (("frugal", dict(density=0.25, subspace="svd", state_free="none", moments="keep", eps=1e-14)),
                          ("galore", dict(rank=4, eps=1e-14)), ("frugal", dict(density=0.25, subspace="svd", eps=1e-14))):
        p = start(shape)
        run(optimizer(name, [p], lr=1e-2, update_proj_gap=4, scale=0.5, **options), p, 10)
        finals.append(p.detach())
    torch.testing.assert_close(finals[0], finals[1], rtol=1e-9, atol=1e-9)
    assert (finals[0] - finals[2]).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"subspace": "random"}, {"subspace": "svd"}, {"state_free": "sgd", "free_scale": 0.3},
                                     {"state_free": "none"}, {"moments": "keep"}, {"scale": 0.5, "free_scale": 0.1}],
                         ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()) or "default")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_equations_over_three_choices(shape, options):
    p, w = start(shape), start(shape).detach()
    built = optimizer("frugal", [p], lr=1e-2, density=0.3, update_proj_gap=4, weight_decay=0.1, **options)
    kind, gap, b1, b2, eps = options.get("subspace", "columns"), 4, 0.9, 0.999, 1e-8
    bases, m, v, age = [], 0.0, 0.0, 0
    for step in range(11):
        p.grad = gradient(shape, step)
        built.step()
        g = gradient(shape, step)
        if step % gap == 0:  # the choice itself is read from the state, and looked at below
            state = built.state[p]
            if kind == "columns":
                k = int(0.3 * shape[1])
                chosen = torch.randperm(shape[1], generator=torch.Generator().manual_seed(int(state["seed"])))[:k]
                left, right = torch.eye(shape[0], dtype=g.dtype), torch.eye(shape[1], dtype=g.dtype)[chosen]
            else:
                left, right = (state.get(f"projection_{side}", torch.eye(size, dtype=g.dtype)).clone()
                               for side, size in zip(("left", "right"), shape))
                assert min(left.shape[0], right.shape[0]) == round(0.3 * 16)
            bases.append(left.T @ left @ torch.ones(shape, dtype=g.dtype) @ right.T @ right)
            if options.get("moments") != "keep":
                m, v, age = 0.0, 0.0, 0
        age += 1
        low = left @ g @ right.T
        m, v = b1 * m + (1 - b1) * low, b2 * v + (1 - b2) * low ** 2
        n = (m / (1 - b1 ** age)) / ((v / (1 - b2 ** age)).sqrt() + eps)
        rest = g - left.T @ low @ right
        if kind == "columns":
            rest = rest * (rest.abs() > 0)
        free = {"sign": torch.sign(rest), "sgd": rest, "none": 0 * rest}[options.get("state_free", "sign")]
        scale = options.get("scale", 1.0)
        w = (1 - 1e-3) * w - 1e-2 * scale * (left.T @ n @ right + options.get("free_scale", 1.0) * free)
        torch.testing.assert_close(p.detach(), w, rtol=1e-9, atol=1e-9)
    assert not torch.equal(bases[0], bases[1]) and not torch.equal(bases[1], bases[2])


@pytest.mark.parametrize("kind", [ColumnSubspace, SVDSubspace, OrthogonalSubspace], ids=lambda k: k.__name__)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_rest_holds_nothing_of_the_part_and_both_are_everything(kind, shape):
    subspace, grad = kind(0.4, 5), gradient(shape, 1)
    state = {k: torch.zeros(s, dtype=d) for k, (s, d) in subspace.slots(shape, torch.float64).items()}
    clock = Clock(1, 0, seed=3)
    subspace.refresh(grad, state, clock)
    basis = subspace.basis(grad, state, clock)
    low = project(grad, basis)
    rest = remainder(grad, low, basis)
    assert low.shape == subspace.low_shape(shape) and project(rest, basis).abs().max() < 1e-12
    assert math.isclose(low.norm() ** 2 + rest.norm() ** 2, grad.norm() ** 2, rel_tol=1e-10)
    if kind is ColumnSubspace:
        assert (rest == 0).sum() == low.numel()  # exactly zero, so its sign is too


def test_seed_and_state_bytes():
    cls, (b, a) = lookup("optimizer", "frugal").cls, (1536, 576)
    assert cls.state_bytes((b, a)) == 4 * 2 * b * (a // 4) + 4 + 8
    assert cls.state_bytes((a, b)) == 4 * 2 * a * (b // 4) + 4 + 8
    assert cls.state_bytes((b, a), density=0.0) == 12
    for shape in ((b, a), (a, b)):
        assert cls.state_bytes(shape, subspace="svd") == 4 * (a + 2 * b) * (a // 4) + 4
        assert cls.state_bytes(shape, subspace="random") == 4 * (a + 2 * b) * (a // 4) + 4 + 8
    finals = []
    for seed in (0, 0, 5):
        p = start((24, 16))
        run(optimizer("frugal", [p], lr=1e-2, seed=seed), p, 2)
        finals.append(p.detach())
    assert torch.equal(finals[0], finals[1]) and not torch.equal(finals[0], finals[2])
