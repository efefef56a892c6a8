"""Muon against torch.optim.Muon and AdamW step by step, and the properties of its iteration."""

import pytest
import torch

from graftwork.modeling import arithmetic
from graftwork.optim import optimizer
from graftwork.optim.muon import orthogonalized
from graftwork.registry import lookup

SHAPES = [(24, 16), (16, 24), (8, 8)]


def parameters(shapes=SHAPES, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


@pytest.mark.parametrize("options", [{}, {"nesterov": False, "momentum": 0.8}, {"adjust_lr_fn": "match_rms_adamw", "ns_steps": 3}],
                         ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_equals_torch(monkeypatch, options, decay):
    monkeypatch.setattr(arithmetic, "slow_on_cpu", lambda dtype: False)  # torch's own products, whatever the processor
    ours, theirs, vectors, vectors_theirs = parameters(), parameters(), parameters([(7,), (3, 5)]), parameters([(7,), (3, 5)])
    mine = optimizer("muon", [{"params": ours, "weight_decay": decay},
                              {"params": vectors, "role": "other", "weight_decay": decay}], lr=0.02, **options)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=decay, **options)
    aux = torch.optim.AdamW(vectors_theirs, lr=0.02 * 0.015, betas=(0.9, 0.95), eps=1e-10, weight_decay=decay)
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        for p, q in zip(ours + vectors, theirs + vectors_theirs):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        mine.step()
        reference.step()
        aux.step()
    for p, q in zip(ours, theirs):
        assert torch.equal(p, q) and torch.equal(mine.state[p]["momentum_buffer"], reference.state[q]["momentum_buffer"])
    for p, q in zip(vectors, vectors_theirs):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_float32_iteration_equals_its_polynomial_on_the_singular_values():
    """NS acts on the singular values alone: s <- 3.4445 s - 4.775 s^3 + 2.0315 s^5, from s / ||U||_F."""
    for shape in SHAPES:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        s = s / x.norm()
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        expected = u @ torch.diag(s) @ vh
        torch.testing.assert_close(orthogonalized(x.float(), 5).double(), expected, rtol=1e-3, atol=1e-4)
        moves = {}
        for dtype in ("float32", "bfloat16"):
            p = torch.nn.Parameter(torch.zeros(shape))
            built = optimizer("muon", [p], lr=1.0, ns_dtype=dtype, momentum=0.0, nesterov=False)
            p.grad = x.float()
            built.step()
            moves[dtype] = -p.detach().double() / max(1.0, shape[0] / shape[1]) ** 0.5
        errors = {k: (v - expected).norm() / expected.norm() for k, v in moves.items()}
        assert errors["float32"] < 1e-3 < errors["bfloat16"] < 0.1


def test_wide_products_round_as_narrow_ones(monkeypatch):
    """Without products in bfloat16 the same values come from float32, up to one rounding of a sum."""
    x = torch.randn((24, 16), generator=torch.Generator().manual_seed(5)).bfloat16()
    found = []
    for slow in (False, True):
        monkeypatch.setattr(arithmetic, "slow_on_cpu", lambda dtype, slow=slow: slow and dtype == torch.bfloat16)
        found.append(orthogonalized(x.clone(), 5))
        assert found[-1].dtype == torch.bfloat16
    torch.testing.assert_close(*found, rtol=0, atol=2**-6)


def test_singular_values_of_the_update():
    values = torch.linalg.svdvals(orthogonalized(torch.randn(256, 128, generator=torch.Generator().manual_seed(3)), 5))
    assert 0.6 < values.min() and values.max() < 1.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_and_transposition_do_not_matter(dtype):
    x = torch.randn(24, 16, generator=torch.Generator().manual_seed(4)).to(dtype)
    once = orthogonalized(x.clone(), 5)
    assert torch.equal(once, orthogonalized(x * 1024, 5))
    torch.testing.assert_close(once.T, orthogonalized(x.T.clone(), 5), rtol=1e-2, atol=1e-2)
    assert torch.equal(orthogonalized(torch.zeros(4, 3, dtype=dtype), 5), torch.zeros(4, 3, dtype=dtype))


def test_gradient_is_left_alone_and_roles_decide():
    p, q, vector = parameters([(6, 5), (6, 5), (6,)])
    built = optimizer("muon", [{"params": [p, vector]}, {"params": [q], "role": "other"}])
    for each in (p, q, vector):
        each.grad = torch.ones_like(each)
    before = p.grad.clone()
    built.step()
    assert torch.equal(p.grad, before)
    assert "momentum_buffer" in built.state[p] and all("exp_avg_sq" in built.state[t] for t in (q, vector))


def test_state_is_one_buffer():
    size = lookup("optimizer", "muon").cls.state_bytes
    assert size((20, 10)) == 4 * 200 + 4 and size((20, 10), role="other") == 4 * 400 + 4 and size((20,)) == 4 * 40 + 4
