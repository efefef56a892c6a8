"""CAME against the authors' package step by step, and one step against its equations in float64."""

import pytest
import torch

from graftwork.optim import optimizer
from graftwork.registry import lookup

SHAPES = [(24, 16), (6, 30), (7,), (5, 1), (2, 3, 4)]


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"betas": (0.8, 0.9, 0.99)}, {"clip_threshold": 0.3, "eps": (1e-6, 1e-3)}], ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_it_equals_the_package(options, decay):
    package = pytest.importorskip("came_pytorch")
    ours, theirs = parameters(), parameters()
    mine = optimizer("came", [{"params": ours, "weight_decay": decay}], lr=1e-2, **options)
    reference = package.CAME(theirs, lr=1e-2, weight_decay=decay, **options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(8):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        mine.step()
        with torch.no_grad():
            reference.step()
        for p, q in zip(ours, theirs):
            torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=1e-6)
    for p, q in zip(ours, theirs):
        for key, value in mine.state[p].items():
            torch.testing.assert_close(value, torch.as_tensor(reference.state[q][key], dtype=torch.float32), rtol=1e-5, atol=1e-12)


def test_two_steps_are_the_equations():
    def average(old, square, beta):
        new = [beta * o + (1 - beta) * square.mean(dim) for o, dim in zip(old, (1, 0))]
        return new, torch.outer(new[0], new[1]) / new[0].mean()

    (W,) = [torch.randn(5, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)]
    p = torch.nn.Parameter(W.clone())
    built = optimizer("came", [p], lr=0.1, betas=(0.5, 0.9, 0.8), eps=(1e-3, 1e-2), clip_threshold=0.7)
    V, S, M = [torch.zeros(5).double(), torch.zeros(8).double()], [torch.zeros(5).double(), torch.zeros(8).double()], 0.0
    for seed in range(2):
        p.grad = torch.randn(5, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        V, F = average(V, p.grad**2 + 1e-3, 0.9)
        U = p.grad / F.sqrt()
        U = U / max(1.0, float(U.square().mean().sqrt() / 0.7))
        M = 0.5 * M + 0.5 * U
        S, F = average(S, (U - M)**2 + 1e-2, 0.8)
        W = W - 0.1 * M / F.sqrt()
        built.step()
    torch.testing.assert_close(p.detach(), W)


def test_it_keeps_the_first_moment_and_two_factored_ones():
    size = lookup("optimizer", "came").cls.state_bytes
    assert size((20, 10)) == 4 * (200 + 60) + 4 and size((20,)) == 4 * 40 + 4
    assert size((20, 10), torch.bfloat16, state_dtype="bfloat16", rounding="kahan") == 2 * 260 + 2 * 200 + 4
