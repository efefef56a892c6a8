"""APOLLO against apollo-torch, step by step, and against the identities of its equations."""

import math

import apollo_torch
import pytest
import torch

from graftwork.optim import optimizer
from graftwork.optim.subspace import next_seed

SHAPES = [(24, 16), (16, 24), (20, 20)]


def parameters(shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]


@pytest.mark.parametrize("projection", ["seeded", "cached"])
@pytest.mark.parametrize("scale_type, rank, scale, front", [("channel", 4, 1.0, False), ("channel", 4, 4.0, True),
                                                            ("tensor", 1, 128.0, False), ("tensor", 1, 128.0, True)])
@pytest.mark.parametrize("growth", [1.01, None])
def test_equals_apollo_torch_over_three_refreshes(projection, scale_type, rank, scale, front, growth):
    ours, plain = parameters(SHAPES), parameters([(7,), (6, 5)])
    theirs, plain_theirs = ([torch.nn.Parameter(p.detach().clone()) for p in each] for each in (ours, plain))
    options = {"rank": rank, "update_proj_gap": 4, "scale": scale, "scale_type": scale_type}
    mine = optimizer("apollo", [{"params": ours, "role": "linear"}, {"params": plain, "role": "other"}], lr=1e-3,
                     weight_decay=0.1, projection=projection, growth_limit=growth, **options)
    reference = apollo_torch.APOLLOAdamW([{"params": theirs, "proj": "random", "proj_type": "std", **options},
                                          {"params": plain_theirs}], lr=1e-3, weight_decay=0.1, scale_front=front,
                                         disable_nl=growth is None)
    generator = torch.Generator().manual_seed(1)
    for step in range(11):
        for p, q in zip(ours + plain, theirs + plain_theirs):
            p.grad = torch.randn(p.shape, generator=generator) * (1 + step % 3)  # uneven norms, so that the limiter acts
            q.grad = p.grad.clone()
        mine.step()
        reference.step()
        for p, q in zip(ours + plain, theirs + plain_theirs):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=2e-6)
        for p, q in zip(ours, theirs):
            assert torch.equal(mine.state[p]["exp_avg"], reference.state[q]["exp_avg"])  # same P bit for bit
            assert torch.equal(mine.state[p]["exp_avg_sq"], reference.state[q]["exp_avg_sq"])


def test_mini_is_rank_one_tensor_scale_128():
    results = []
    for name, options in (("apollo_mini", {}), ("apollo", {"rank": 1, "scale": 128, "scale_type": "tensor"})):
        (p,) = parameters([(24, 16)])
        mine = optimizer(name, [p], lr=1e-3, **options)
        for step in range(3):
            p.grad = torch.randn(24, 16, generator=torch.Generator().manual_seed(step))
            mine.step()
        results.append(p.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize("shape", SHAPES)
def test_first_step_is_the_gradient_with_rescaled_channels(shape):
    r = 4
    (p,) = parameters([shape])
    before, grad = p.detach().clone(), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    p.grad = grad.clone()
    optimizer("apollo", [p], lr=0.1, rank=r, scale=4.0, eps=1e-12).step()
    drawn = torch.Generator().manual_seed(1)  # the first parameter's seed is 1
    if shape[0] >= shape[1]:
        low = grad @ (torch.randn(r, shape[1], generator=drawn) / math.sqrt(r)).T
        expected = 0.1 * 2 * grad * math.sqrt(r) / low.norm(dim=1, keepdim=True)
    else:
        low = (torch.randn(shape[0], r, generator=drawn) / math.sqrt(r)).T @ grad
        expected = 0.1 * 2 * grad * math.sqrt(r) / low.norm(dim=0, keepdim=True)
    torch.testing.assert_close(before - p.detach(), expected, rtol=1e-3, atol=1e-5)
    assert torch.linalg.matrix_rank(before - p.detach(), rtol=1e-5) == min(shape)


def test_first_mini_step():
    (p,) = parameters([(24, 16)])
    before, grad = p.detach().clone(), torch.randn(24, 16, generator=torch.Generator().manual_seed(1))
    p.grad = grad.clone()
    optimizer("apollo_mini", [p], lr=0.1, eps=1e-12).step()
    low = grad @ torch.randn(1, 16, generator=torch.Generator().manual_seed(1)).T
    expected = 0.1 * math.sqrt(128) * grad * math.sqrt(24) / low.norm()
    torch.testing.assert_close(before - p.detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("limit", [1.01, 1.2])
def test_update_norm_grows_at_most_by_the_limit(limit):
    p = torch.nn.Parameter(torch.zeros(24, 16))
    mine = optimizer("apollo", [p], lr=1.0, rank=4, update_proj_gap=3, growth_limit=limit)
    norms = []
    for step in range(8):
        p.grad = torch.randn(24, 16, generator=torch.Generator().manual_seed(step)) * 1.5 ** step
        before = p.detach().clone()
        mine.step()
        correction = math.sqrt(1 - 0.999 ** (step + 1)) / (1 - 0.9 ** (step + 1))
        norms.append(((p.detach() - before).norm() / correction).item())
    ratios = [b / a for a, b in zip(norms, norms[1:])]
    assert max(ratios) < limit * 1.0001 and max(ratios) > limit * 0.999


def test_a_zero_gradient_does_not_stall_the_tensor():
    p = torch.nn.Parameter(torch.zeros(24, 16))
    mine = optimizer("apollo", [p], lr=1.0, rank=4)
    moves = []
    for factor in (1.0, 0.0, 1.0):
        p.grad = factor * torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
        before = p.detach().clone()
        mine.step()
        moves.append((p.detach() - before).norm().item())
    assert moves[1] == 0.0 and moves[2] > 0.1 * moves[0]


def test_projection_preserves_norms_better_with_rank():
    from graftwork.optim.base import Clock
    from graftwork.optim.subspace import RandomSubspace, project
    grad = torch.randn(64, 512, generator=torch.Generator().manual_seed(3)).T  # rows of length 64
    errors = []
    for rank in (2, 8, 64):
        low = project(grad, RandomSubspace(rank, 10).basis(grad, {}, Clock(1, 0, seed=5)))
        errors.append((low.norm(dim=1) / grad.norm(dim=1) - 1).pow(2).mean().sqrt().item())
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2] and errors[2] < 0.15


def test_seed_sequence_and_user_seed():
    from apollo_torch.random_projector import next_seed as reference
    seed = 1
    for _ in range(3):
        assert next_seed(seed) == reference(seed)
        seed = next_seed(seed)
    finals = []
    for base in (0, 0, 5):
        (p,) = parameters([(24, 16)])
        p.grad = torch.randn(24, 16, generator=torch.Generator().manual_seed(1))
        mine = optimizer("apollo", [p], lr=0.1, rank=4, seed=base)
        mine.step()
        assert mine.state[p]["seed"] == base + 1
        finals.append(p.detach())
    assert torch.equal(finals[0], finals[1]) and not torch.equal(finals[0], finals[2])
