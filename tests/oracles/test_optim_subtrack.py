"""SubTrack++ against its equations in float64: the geodesic step, the turned moments, whole runs, and the transposed run."""

import math

import pytest
import torch

from graftwork.optim import optimizer
from graftwork.optim.subtrack import turned
from graftwork.registry import lookup

SHAPE = (12, 20)


def gradient(step, shape=SHAPE):
    return (1 + step % 3) * torch.randn(shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def geodesic(s, grad, step):
    """The matrix exponential of the turn: independent of the cosine formula."""
    tangent = -2 * (grad - s @ s.T @ grad) @ (s.T @ grad).T
    u, sigma, vh = torch.linalg.svd(tangent, full_matrices=False)
    descent = -u[:, :1] @ vh[:1] * min(float(sigma[0]) * step, math.pi / 2)   # rank one, orthogonal to S
    return torch.linalg.matrix_exp(descent @ s.T - s @ descent.T) @ s


def test_a_turn_is_the_geodesic_and_captures_more():
    generator = torch.Generator().manual_seed(3)
    low = torch.randn(64, 3, generator=generator, dtype=torch.float64) @ torch.randn(3, 96, generator=generator, dtype=torch.float64)
    s = torch.linalg.qr(torch.randn(64, 4, generator=generator, dtype=torch.float64))[0]
    captured = [(s.T @ low).norm() / low.norm()]
    for step in (1e-5, 1e-4, 2e-4):
        new = turned(s, low, step)
        torch.testing.assert_close(new, geodesic(s, low, step), rtol=1e-9, atol=1e-10)
        assert (new.T @ new - torch.eye(4, dtype=s.dtype)).norm() < 1e-12
        captured.append((new.T @ low).norm() / low.norm())
    assert captured == sorted(captured) and captured[-1] > captured[0] + 0.01
    beyond = turned(s, low, 1e6)                    # a right angle at most
    torch.testing.assert_close(beyond, geodesic(s, low, 1e6), rtol=1e-9, atol=1e-9)


def test_repeated_turns_stay_orthonormal_and_find_the_subspace():
    generator = torch.Generator().manual_seed(4)
    low = torch.randn(32, 3, generator=generator) @ torch.randn(3, 48, generator=generator)
    p = torch.nn.Parameter(torch.zeros(32, 48))
    built = optimizer("subtrack", [p], lr=0.0, rank=3, update_proj_gap=1, tracking_step=1e-4)
    p.grad = torch.randn(32, 48, generator=generator)
    built.step()
    captured = []
    for _ in range(60):
        p.grad = low.clone()
        built.step()
        captured.append((built.state[p]["projection_left"] @ low).norm() / low.norm())
    q = built.state[p]["projection_left"]
    assert (q @ q.T - torch.eye(3)).norm() < 1e-5 and captured[0] < 0.6 and captured[-1] > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"growth_limit": None}, {"tracking_step": 10.0}, {"scale": 1.0}],
                         ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()) or "default")
@pytest.mark.parametrize("tall", [False, True])
def test_equals_the_equations_over_three_turns(options, tall):
    options = {"tracking_step": 1e-3, **options}
    p = torch.nn.Parameter(torch.zeros(SHAPE[::-1] if tall else SHAPE, dtype=torch.float64))
    built = optimizer("subtrack", [p], lr=1e-2, rank=3, update_proj_gap=3, weight_decay=0.1, **options)
    w, m, v, previous, growth = torch.zeros(SHAPE, dtype=torch.float64), 0.0, 0.0, None, options.get("growth_limit", 1.01)
    for t in range(1, 11):
        g = gradient(t)
        p.grad = g.T.clone() if tall else g.clone()
        built.step()
        if t == 1:
            s = built.state[p]["projection_right" if tall else "projection_left"].T.clone()
            exact = torch.linalg.svd(g, full_matrices=False)[0][:, :3]
            torch.testing.assert_close(s @ s.T, exact @ exact.T, rtol=1e-9, atol=1e-9)
        elif (t - 1) % 3 == 0:
            new = geodesic(s, g, options["tracking_step"])
            c = new.T @ s
            m, v, s = c @ m, ((c * c) @ (v - m * m) + (c @ m) * (c @ m)).abs(), new
        low = s.T @ g
        m, v = 0.9 * m + 0.1 * low, 0.999 * v + 0.001 * low ** 2
        n = m / (v.sqrt() + 1e-6)
        rest = n.norm(dim=0) / (low.norm(dim=0) + 1e-8) * (g - s @ low)
        if growth is not None and previous is not None and rest.norm() > growth * previous:
            rest = rest * growth * previous / rest.norm()
        previous = rest.norm()
        w = w - 1e-2 * math.sqrt(1 - 0.999 ** t) / (1 - 0.9 ** t) * (options.get("scale", 0.25) * s @ n + rest)
        w = w * (1 - 1e-3)
        torch.testing.assert_close(p.detach().T if tall else p.detach(), w, rtol=1e-6, atol=1e-8)


def test_state_is_firas_and_the_basis_stays_float32():
    subtrack, fira = (lookup("optimizer", name).cls for name in ("subtrack", "fira"))
    for shape in ((1536, 576), (576, 1536)):
        assert subtrack.state_bytes(shape, rank=64) == fira.state_bytes(shape, rank=64)
        small = subtrack.state_bytes(shape, torch.bfloat16, rank=64, state_dtype="bfloat16")
        assert small == 4 * 576 * 64 + 2 * 2 * 1536 * 64 + 8
