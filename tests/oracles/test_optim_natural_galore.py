"""Natural GaLore: its transform against a dense solve and Woodbury's form, its steps against GaLore fed with the dense solution."""

import pytest
import torch

from graftwork.optim import optimizer
from graftwork.optim.natural_galore import FisherTransform
from graftwork.registry import lookup


def gradients(shape, count, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def dense(history, damping):
    """(damping I + H H^T)^-1 g by a k x k solve; the last entry of `history` is g."""
    h = torch.stack([g.flatten().double() for g in history], dim=1)
    fisher = damping * torch.eye(h.shape[0], dtype=h.dtype) + h @ h.T
    return torch.linalg.solve(fisher, h[:, -1]).reshape(history[-1].shape)


def test_transform_equals_the_dense_solve_and_woodbury():
    transform, damping = FisherTransform(5, 1e-2), 1e-2
    state = {k: torch.zeros(s, dtype=d) for k, (s, d) in transform.slots((6, 3), torch.float64).items()}
    seen = []
    for step, g in enumerate(gradients((6, 3), 8), 1):
        seen = [*seen, g][-5:]
        out = transform.apply(g, state, step)
        expected = dense(seen, damping)
        assert (out - expected).norm() < 1e-10 * expected.norm()
        h = torch.stack([each.flatten() for each in seen], dim=1)
        small = torch.eye(len(seen), dtype=h.dtype) + h.T @ h / damping
        z = torch.cholesky_solve((h.T @ g.flatten())[:, None], torch.linalg.cholesky(small))[:, 0]
        woodbury = g.flatten() / damping - h @ z / damping ** 2
        assert (out.flatten() - woodbury).norm() < 1e-8 * woodbury.norm()


def test_one_gradient_is_divided_by_damping_and_its_square():
    transform = FisherTransform(1, 1e-3)
    state = {k: torch.zeros(s, dtype=d) for k, (s, d) in transform.slots((6, 3), torch.float64).items()}
    for step, g in enumerate(gradients((6, 3), 3), 1):
        torch.testing.assert_close(transform.apply(g, state, step), g / (1e-3 + g.norm() ** 2), rtol=1e-12, atol=0)


def test_float32_keeps_its_digits_where_woodbury_loses_them():
    state = {"history": torch.zeros(4, 30, 3)}
    transform, seen = FisherTransform(4, 1e-3), gradients((30, 3), 4, torch.float32)
    for step, g in enumerate(seen, 1):
        out = transform.apply(1e2 * g, state, step)
    scaled = [1e2 * g.double() for g in seen]
    h = torch.stack([g.flatten() for g in scaled], dim=1)
    exact = (h @ torch.linalg.solve(1e-3 * torch.eye(4, dtype=h.dtype) + h.T @ h, torch.eye(4, dtype=h.dtype)[:, 3:])).flatten()
    assert (out.flatten().double() - exact).norm() < 1e-5 * exact.norm()


@pytest.mark.slow
@pytest.mark.parametrize("proj_type", ["std", "full"])
@pytest.mark.parametrize("shape", [(24, 16), (16, 24)], ids=str)
@pytest.mark.parametrize("moments", ["keep", "reset", "rotate"])
def test_equals_adam_on_the_dense_solution_over_two_refreshes(shape, proj_type, moments):
    p = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    built = optimizer("natural_galore", [p], lr=1e-2, rank=3, update_proj_gap=4, history=3, damping=0.1, scale=0.5,
                      proj_type=proj_type, moments=moments)
    w, m, v, age, seen, bases = torch.zeros(shape, dtype=torch.float64), 0.0, 0.0, 0, [], None
    for step, g in enumerate(gradients(shape, 10)):
        p.grad = g.clone()
        built.step()
        state = built.state[p]
        now = tuple(state.get(f"projection_{side}", torch.eye(size, dtype=g.dtype)).clone()
                    for side, size in zip(("left", "right"), shape))
        if step and step % 4 == 0:
            if moments == "rotate":
                left, right = now[0] @ bases[0].T, bases[1] @ now[1].T
                m, v, seen = left @ m @ right, left ** 2 @ v @ right ** 2, [left @ each @ right for each in seen]
            else:
                seen = []
            if moments == "reset":
                m, v, age = 0.0, 0.0, 0
        left, right = bases = now
        age += 1
        seen = [*seen, left @ g @ right.T][-3:]
        low = dense(seen, 0.1)
        m, v = 0.9 * m + 0.1 * low, 0.999 * v + 0.001 * low ** 2
        n = (1 - 0.999 ** age) ** 0.5 / (1 - 0.9 ** age) * m / (v.sqrt() + 1e-6)
        w = w - 1e-2 * 0.5 * left.T @ n @ right
        torch.testing.assert_close(p.detach(), w, rtol=1e-8, atol=1e-9)


def test_the_history_is_in_the_byte_count():
    cls, (b, a, r) = lookup("optimizer", "natural_galore").cls, (1536, 576, 64)
    assert cls.state_bytes((b, a), rank=r) == 4 * (a * r + 2 * b * r + 20 * b * r) + 4
    assert cls.state_bytes((a, b), rank=r, history=5) == 4 * (a * r + 7 * b * r) + 4
    assert cls.state_bytes((b, a), rank=r, proj_type="full") == 4 * ((a + b) * r + 22 * r * r) + 4
