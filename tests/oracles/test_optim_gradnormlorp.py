"""GradNormLoRP against autograd through W = g v / ||v||, with torch's Adam and GaLore moving g and v, which are kept there."""

import pytest
import torch

from graftwork.optim import optimizer
from graftwork.registry import lookup


def target(shape, step):
    return torch.randn(shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def weight_of(g, v):
    return g[:, None] * v / v.norm(dim=1, keepdim=True)


def loss_of(w, step):
    return ((w - target(w.shape, step)).pow(2) * torch.arange(1.0, w.shape[1] + 1)).sum()


@pytest.mark.slow
@pytest.mark.parametrize("proj_type, rank", [("std", 4), ("std", 99), ("full", 4)])
@pytest.mark.parametrize("shape", [(24, 16), (16, 24)], ids=str)
def test_equals_explicit_magnitude_and_direction_by_autograd(shape, proj_type, rank):
    start = target(shape, 99)
    p = torch.nn.Parameter(start.clone())
    options = dict(rank=rank, update_proj_gap=4, proj_type=proj_type, scale=0.5)
    mine = optimizer("gradnormlorp", [p], lr=1e-2, eps=1e-3, weight_decay=0.1, **options)
    g, v = torch.nn.Parameter(start.norm(dim=1)), torch.nn.Parameter(start.clone())
    on_v = optimizer("galore", [v], lr=1e-2, eps=1e-3, **options)
    m = s = torch.zeros(shape[0], dtype=torch.float64)
    for step in range(1, 11):
        p.grad = None
        loss_of(p, step).backward()
        mine.step()
        g.grad = v.grad = None
        loss_of(weight_of(g, v), step).backward()
        assert (v.grad * v).sum(dim=1).abs().max() < 1e-10 * v.grad.norm()
        on_v.step()
        with torch.no_grad():
            m, s = 0.9 * m + 0.1 * g.grad, 0.999 * s + 0.001 * g.grad ** 2
            g -= 1e-2 * (1 - 0.999 ** step) ** 0.5 / (1 - 0.9 ** step) * m / (s.sqrt() + 1e-3)
            g *= 1 - 1e-3
        torch.testing.assert_close(p.detach(), weight_of(g, v).detach(), rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(mine.state[p]["direction_norm"], v.detach().norm(dim=1), rtol=1e-9, atol=1e-9)
    assert (mine.state[p]["direction_norm"] - p.detach().norm(dim=1)).abs().min() > 1e-3  # two lengths, not one


def test_the_magnitude_learns_in_full_and_the_direction_in_the_subspace():
    """A gradient along W only changes lengths; the rank-1 view of the direction sees nothing of it."""
    p = torch.nn.Parameter(target((6, 5), 1))
    before = p.detach().clone()
    p.grad = before.clone()
    optimizer("gradnormlorp", [p], lr=0.1, rank=1, eps=1e-6).step()
    after = p.detach()
    torch.testing.assert_close(after.norm(dim=1), before.norm(dim=1) - 0.1, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after / after.norm(dim=1, keepdim=True), before / before.norm(dim=1, keepdim=True),
                               rtol=1e-6, atol=1e-6)


def test_rows_of_zeros_and_sign_changes_stay_finite_and_move():
    p = torch.nn.Parameter(torch.cat([torch.zeros(3, 5), 0.01 * torch.ones(4, 5)]))
    built = optimizer("gradnormlorp", [p], lr=0.1, rank=3)
    for step in range(6):
        p.grad = target((7, 5), step).float()
        built.step()
        assert p.isfinite().all() and (p.norm(dim=1) > 0).all()


def test_state_is_galores_and_three_numbers_a_row():
    ours, galore = (lookup("optimizer", name).cls for name in ("gradnormlorp", "galore"))
    for shape in ((1536, 576), (576, 1536)):
        for proj_type in ("std", "full"):
            options = dict(rank=64, proj_type=proj_type)
            assert ours.state_bytes(shape, **options) == galore.state_bytes(shape, **options) + 4 * 3 * shape[0]
