"""Fira against its equations in float64, written out densely, and against GaLore where the two coincide."""

import math

import pytest
import torch

from graftwork.optim import optimizer

SHAPES = [(24, 16), (16, 24), (20, 20)]


def gradient(shape, step):
    uneven = 1.0 + 2.0 * (step % 3)  # so that the limiter acts
    return uneven * torch.randn(shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def closed_form(weight, grads, *, lr, wd, rank, gap, scale, exact, channel, growth, b1=0.9, b2=0.999, eps=1e-6):
    """All of it on the tall side: a wide weight is transposed first."""
    wide = weight.shape[0] < weight.shape[1]
    w = (weight.T if wide else weight).clone()
    m = v = previous = None
    limited = 0
    for t, grad in enumerate(grads, 1):
        g = grad.T if wide else grad
        if (t - 1) % gap == 0:
            # The signs of singular vectors are the decomposition's own; take them where the method does, from the same call.
            u, _, vh = torch.linalg.svd(grad, full_matrices=False)
            q = u[:, :rank] if wide else vh[:rank].T
        low = g @ q
        m = (1 - b1) * low if m is None else b1 * m + (1 - b1) * low
        v = (1 - b2) * low ** 2 if v is None else b2 * v + (1 - b2) * low ** 2
        n = m / (v.sqrt() + eps)
        phi = n.norm(dim=1, keepdim=True) / (low.norm(dim=1, keepdim=True) + 1e-8) if channel else n.norm() / (low.norm() + 1e-8)
        s = phi * (g - (1.0 if exact else scale) * low @ q.T)
        if growth is not None and previous is not None and s.norm() > growth * previous:
            s, limited = s * growth * previous / s.norm(), limited + 1
        previous = s.norm()
        w = w - lr * math.sqrt(1 - b2 ** t) / (1 - b1 ** t) * (scale * n @ q.T + s)
        w = w - lr * wd * w
    return (w.T if wide else w), limited


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"scale": 1.0}, {"remainder": "reference"}, {"scale_type": "tensor"},
                                     {"growth_limit": None}, {"growth_limit": 1.5}],
                         ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()) or "default")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_equations_over_three_refreshes(shape, options):
    start = torch.randn(shape, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    p = torch.nn.Parameter(start.clone())
    mine = optimizer("fira", [p], lr=1e-2, rank=4, update_proj_gap=4, weight_decay=0.1, **options)
    grads = [gradient(shape, step) for step in range(11)]
    for grad in grads:
        p.grad = grad.clone()
        mine.step()
    growth = options.get("growth_limit", 1.01)
    expected, limited = closed_form(start, grads, lr=1e-2, wd=0.1, rank=4, gap=4, scale=options.get("scale", 0.25),
                                    exact=options.get("remainder") != "reference",
                                    channel=options.get("scale_type") != "tensor", growth=growth)
    assert (limited > 0) == (growth is not None)
    # The stored norm is a float32 number.
    torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=1e-7)


def first_moves(**options):
    moves = {}
    for name in ("fira", "galore"):
        p = torch.nn.Parameter(torch.zeros(24, 16, dtype=torch.float64))
        p.grad = gradient((24, 16), 1)
        known = {k: v for k, v in options.items() if name == "fira" or k != "remainder"}
        optimizer(name, [p], lr=1.0, **known).step()
        moves[name] = p.detach()
    return moves


def test_first_step_adds_the_rescaled_rest_to_galore():
    grad = gradient((24, 16), 1)
    q = torch.linalg.svd(grad, full_matrices=False)[2][:3]
    rest = grad - grad @ q.T @ q
    phi = math.sqrt(3) / (grad @ q.T).norm(dim=1, keepdim=True)  # |N / c_1| = 1 in each of the 3 coordinates
    moves = first_moves(rank=3, scale=0.25, eps=1e-14)
    torch.testing.assert_close(moves["galore"] - moves["fira"], phi * rest, rtol=1e-6, atol=1e-8)
    leaking = first_moves(rank=3, scale=0.25, eps=1e-14, remainder="reference")
    torch.testing.assert_close(moves["fira"] - leaking["fira"], phi * 0.75 * (grad - rest), rtol=1e-6, atol=1e-8)
    assert torch.linalg.matrix_rank(moves["fira"], rtol=1e-6) == 16


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_full_rank_leaves_nothing_to_rescale(shape):
    finals = []
    for name in ("fira", "galore"):
        p = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        mine = optimizer(name, [p], lr=1e-2, rank=99, update_proj_gap=3, scale=1.0)
        for step in range(5):
            p.grad = gradient(shape, step)
            mine.step()
        finals.append(p.detach())
    torch.testing.assert_close(*finals, rtol=1e-9, atol=1e-9)


def test_state_is_galores_and_one_norm():
    from graftwork.registry import lookup
    b, a, r = 1536, 576, 64
    fira, galore = (lookup("optimizer", name).cls for name in ("fira", "galore"))
    for shape in ((b, a), (a, b)):
        assert fira.state_bytes(shape, rank=r) == 4 * (a * r + 2 * b * r) + 4 + 4 == galore.state_bytes(shape, rank=r) + 4
        assert fira.state_bytes(shape, rank=r, growth_limit=None) == galore.state_bytes(shape, rank=r)
        assert fira.state_bytes(shape, rank=r, svd="randomized") == galore.state_bytes(shape, rank=r) + 4 + 8
