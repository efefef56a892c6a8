"""AdamW against torch.optim.AdamW."""

import pytest
import torch

from graftwork.optim import optimizer

SHAPES = [(12, 8), (8, 12), (9,), ()]


def pair(dtype=torch.float32):
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(s).to(dtype)) for s in SHAPES]
    return ours, [torch.nn.Parameter(p.detach().clone().float()) for p in ours]


def give_gradients(ours, theirs, generator):
    for p, q in zip(ours, theirs):
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        q.grad = p.grad.to(q.dtype)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_equals_torch_fused_bit_for_bit_and_its_loop_closely(decay):
    ours, fused = pair()
    loop = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    generator = torch.Generator().manual_seed(1)
    mine = optimizer("adamw", [{"params": ours}], lr=1e-2, weight_decay=decay)
    a = torch.optim.AdamW(fused, lr=1e-2, weight_decay=decay, fused=True)
    b = torch.optim.AdamW(loop, lr=1e-2, weight_decay=decay, foreach=False)
    for _ in range(20):
        give_gradients(ours, fused, generator)
        for p, q in zip(ours, loop):
            q.grad = p.grad.clone()
        for each in (mine, a, b):
            each.step()
    for p, q, s in zip(ours, fused, loop):
        assert torch.equal(p, q)
        assert torch.equal(mine.state[p]["exp_avg_sq"], a.state[q]["exp_avg_sq"])
        torch.testing.assert_close(p, s, rtol=1e-6, atol=1e-6)


def test_bf16_weight_is_the_rounded_fp32_step_with_fp32_state():
    ours, theirs = pair(torch.bfloat16)
    generator = torch.Generator().manual_seed(2)
    mine = optimizer("adamw", [{"params": ours}], lr=1e-2, weight_decay=0.1)
    reference = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1, fused=True)
    for _ in range(5):
        give_gradients(ours, theirs, generator)
        mine.step()
        reference.step()
        for p, q in zip(ours, theirs):
            assert torch.equal(p.detach(), q.detach().bfloat16())
            assert mine.state[p]["exp_avg"].dtype == torch.float32
            assert torch.equal(mine.state[p]["exp_avg"], reference.state[q]["exp_avg"])
            q.data.copy_(p.detach())  # the reference also starts each step from the rounded weight


def test_bf16_state_follows_fp32_state_coarsely_and_takes_half():
    results = {}
    for kept in ("float32", "bfloat16"):
        ours, _ = pair()
        mine = optimizer("adamw", [{"params": ours}], lr=1e-2, state_dtype=kept)
        generator = torch.Generator().manual_seed(3)
        for _ in range(5):
            for p in ours:
                p.grad = torch.randn(p.shape, generator=generator)
            mine.step()
        assert {s["exp_avg"].dtype for s in mine.state.values()} == {getattr(torch, kept)}
        results[kept] = torch.cat([p.detach().flatten() for p in ours])
    start = torch.cat([p.detach().flatten() for p in pair()[0]])
    moved = (results["float32"] - start).norm()
    assert 0 < (results["float32"] - results["bfloat16"]).norm() < 0.02 * moved


def test_non_contiguous_weights():
    base = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    p, q = torch.nn.Parameter(base.clone().T), torch.nn.Parameter(base.T.contiguous())
    assert not p.is_contiguous()
    grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    for each in (p, q):
        each.grad = grad.clone()
        optimizer("adamw", [each], lr=0.1).step()
    assert torch.equal(p, q)
