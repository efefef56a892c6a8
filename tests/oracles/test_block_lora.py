"""Block-LoRA: the paper's n copies trained by hand have the trajectory of one pair whose B learns n times as fast."""

from __future__ import annotations

import pytest
import torch

import graftwork
import tiny
from adapter_support import attach, close, output
from graftwork.errors import UsageError

IDS = tiny.tokens(2, 7)
N, R, ALPHA = 4, 3, 18.0


def paper_form(model, starts, lr, optimizer):
    """The n blocks themselves in float64: {site: (A, [B_1 .. B_n])} after 25 steps on the model's own weights."""
    trained = {n: (A.clone().requires_grad_(), [torch.zeros(out, R, dtype=A.dtype).requires_grad_() for _ in range(N)])
               for n, (A, out) in starts.items()}
    weights = {n: model.get_submodule(n).weight.detach() for n in starts}
    moving = optimizer([p for A, blocks in trained.values() for p in (A, *blocks)], lr=lr)
    for _ in range(25):
        moving.zero_grad()
        now = {f"{n}.weight": weights[n] + ALPHA / (N * R) * torch.cat(blocks, 1) @ torch.cat([A] * N)
               for n, (A, blocks) in trained.items()}
        torch.func.functional_call(model, now, (IDS,)).logits.square().mean().backward()
        moving.step()
    return {n: (A.detach(), [B.detach() for B in blocks]) for n, (A, blocks) in trained.items()}


@pytest.mark.parametrize("optimizer, lr", [(torch.optim.SGD, 0.02), (torch.optim.Adam, 2e-3)], ids=["sgd", "adam"])
def test_25_steps_equal_the_copies(optimizer, lr):
    by_hand = tiny.llama().double().requires_grad_(False)
    model = tiny.llama().double()
    graft = graftwork.attach(model, "block_lora", r=R, n_blocks=N, alpha=ALPHA, target_modules=["q_proj", "down_proj"])
    for adapter in graft.adapters.values():
        adapter.double()
    starts = {n: (a.lora_A.detach().clone(), a.out_features) for n, a in graft.adapters.items()}
    wanted = paper_form(by_hand, starts, lr, optimizer)
    ours = optimizer([{"params": g["params"], "lr": lr * g["lr_scale"]} for g in graft.parameter_groups()])
    for _ in range(25):
        ours.zero_grad()
        output(model, IDS).square().mean().backward()
        ours.step()
    for name, (A, blocks) in wanted.items():
        adapter = graft.adapters[name]
        assert all(torch.equal(blocks[0], B) for B in blocks), "the copies stay equal"
        assert blocks[0].abs().max() > 1e-3
        assert (adapter.lora_A - A).abs().max() < 1e-10 and (adapter.lora_B - sum(blocks)).abs().max() < 1e-10
        change = ALPHA / (N * R) * torch.cat(blocks, 1) @ torch.cat([A] * N)
        assert torch.linalg.matrix_rank(change) <= R, "the advertised rank n r is never reached"


def test_every_option_counts():
    graft = graftwork.attach(model := tiny.llama(), "block_lora", r=3, n_blocks=4, rank_pattern={"q_proj": 2})
    for name, adapter in graft.adapters.items():
        rank = 2 if name.endswith("q_proj") else 3
        assert sum(p.numel() for p in adapter.parameters()) == rank * (adapter.in_features + adapter.out_features)
        assert adapter.scale == 1.0
    scales = {tuple(n.rsplit(".")[-1] for n in g["names"][:1])[0]: g["lr_scale"] for g in graft.parameter_groups()}
    assert scales == {"lora_A": 1.0, "lora_B": 4.0}
    graft.detach()
    one = attach(model, "block_lora", r=3, n_blocks=1, alpha=6.0)
    alone = output(model, IDS)
    one.detach()
    attach(model, "block_lora", r=3, n_blocks=2, alpha=12.0)
    close(output(model, IDS), alone, 1e-6)  # alpha is over n r
    with pytest.raises(UsageError, match="r=33.*32 x 64"):
        graftwork.attach(tiny.llama(), "block_lora", r=33, target_modules=["k_proj"])
