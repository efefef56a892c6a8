"""COSMOS: its eigenspace against eigh, its Adam part against Adam in that basis, Newton-Schulz against torch.optim.Muon and SVD."""

import math

import pytest
import torch

from graftwork.optim import optimizer
from graftwork.optim.cosmos import EigenSubspace
from graftwork.registry import lookup


def gradient(step, shape=(24, 16)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(24, 16), (16, 24)], ids=str)
def test_every_step_has_the_same_size(shape):
    p = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    built = optimizer("cosmos", [p], lr=1e-2, rank=4, lr_ratio=0.3)
    for step in range(5):
        before = p.detach().clone()
        p.grad = 10.0 ** (step - 2) * gradient(step, shape)
        built.step()
        assert math.isclose((p.detach() - before).norm(), 1e-2 * 0.3 * math.sqrt(p.numel()), rel_tol=1e-5)


def test_eigenspace_stays_orthonormal_and_finds_the_leading_directions():
    """Gradients with column variances 9, 8, 7, 1, ..., 1: U must find the first three columns, S their second moments."""
    subspace, b2 = EigenSubspace(3, 0.99), 0.99
    state = {k: torch.zeros(s, dtype=d) for k, (s, d) in subspace.slots((200, 10), torch.float64).items()}
    scales = torch.tensor([9.0, 8.0, 7.0] + [1.0] * 7, dtype=torch.float64).sqrt()
    for step in range(300):
        u, _ = subspace.advance(gradient(step, (200, 10)) * scales, state, step == 0)
    assert (u.T @ u - torch.eye(3, dtype=u.dtype)).norm() < 1e-12
    assert u[:3].norm() ** 2 / 3 > 0.99
    expected = u.T @ (200 * torch.diag(scales ** 2)) @ u * (1 - b2 ** 300)
    assert (state["spectrum"] - expected).norm() < 0.1 * expected.norm()


@pytest.mark.slow
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("gamma", [0.0, 0.2])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.95)], ids=str)
def test_equals_the_equations(nesterov, gamma, betas):
    """With G^T G formed, eigenvectors by eigh and Newton-Schulz as a polynomial of singular values; gamma 0, b1 0: Adam alone."""
    shape, r, (b1, b2), eps = (10, 6), 3, betas, 1e-8
    p = torch.nn.Parameter(gradient(99, shape))
    w = p.detach().clone()
    built = optimizer("cosmos", [p], lr=1e-2, rank=r, gamma=gamma, betas=betas, nesterov=nesterov, weight_decay=0.1,
                      newton_schulz="float32")
    momentum, v = torch.zeros(shape, dtype=w.dtype), torch.zeros(shape[0], r, dtype=w.dtype)
    for t in range(1, 7):
        g = gradient(t, shape)
        p.grad = g.clone()
        built.step()
        if t == 1:
            values, vectors = torch.linalg.eigh(g.T @ g)
            u = vectors[:, -r:].flip(1)
            u = u * (u * built.state[p]["projection_right"].T).sum(0).sign()          # an eigenvector's sign is free
            s = (1 - b2) * torch.diag(values[-r:].flip(0))
        else:
            new = torch.linalg.qr(b2 * u @ s + (1 - b2) * (g.T @ g) @ u)[0]
            s = b2 * (u.T @ new).T @ s @ (u.T @ new) + (1 - b2) * new.T @ (g.T @ g) @ new
            u = new
        momentum = b1 * momentum + g
        c1, c2 = sum(b1 ** k for k in range(t)), 1 - b2 ** t
        ahead = (g + b1 * momentum) / (1 + b1 * c1) if nesterov else momentum / c1
        v = b2 * v + (1 - b2) * (g @ u) ** 2
        d = (ahead @ u / (v.sqrt() / math.sqrt(c2) + eps)) @ u.T
        if gamma:
            x = ahead - ahead @ u @ u.T
            left, sigma, right = torch.linalg.svd(x / x.norm(), full_matrices=False)
            for _ in range(5):                                                         # the iteration acts on singular values
                sigma = 3.4445 * sigma - 4.7750 * sigma ** 3 + 2.0315 * sigma ** 5
            b = left @ torch.diag(sigma) @ right
            d = d + gamma * math.sqrt(60) * b / b.norm()
        w = (1 - 1e-3) * w - 1e-2 * 0.1 * math.sqrt(60) * d / d.norm()
        torch.testing.assert_close(p.detach(), w, rtol=1e-5, atol=1e-6)


def test_options_change_the_step_and_bytes_are_the_cards():
    finals = []
    for options in ({}, {"gamma": 0.5}, {"nesterov": False}, {"newton_schulz": "float32"}, {"lr_ratio": 0.2}, {"rank": 5}):
        p = torch.nn.Parameter(gradient(99).float())
        built = optimizer("cosmos", [p], lr=1e-2, **{"rank": 3, **options})
        for step in range(2):
            p.grad = gradient(step).float()
            built.step()
        finals.append(p.detach())
    assert all(not torch.equal(finals[0], other) for other in finals[1:])
    cls = lookup("optimizer", "cosmos").cls
    for m, n in ((1536, 576), (576, 1536)):
        assert cls.state_bytes((m, n)) == 4 * (m * n + 64 * (m + n) + 64 * 64) + 4
