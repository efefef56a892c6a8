"""LOMO against torch.optim.SGD bit for bit, AdaLomo against torch.optim.Adafactor, and what updates inside backward hold."""

import pytest
import torch
from torch import nn

from graftwork.errors import UsageError
from graftwork.optim import optimizer
from graftwork.recipe import load_recipe
from graftwork.registry import lookup


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.inner = nn.Embedding(9, 6), nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 6))
        self.lm_head = nn.Linear(6, 9, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens):
        return self.lm_head(self.inner(self.embed(tokens)))


def tied():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tied()


def backward(model, step):
    tokens = torch.randint(0, 9, (4, 5), generator=torch.Generator().manual_seed(step))
    nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1, 1).flatten()).backward()


@pytest.mark.parametrize("fused", [True, False])
def test_lomo_equals_sgd_bit_for_bit_with_tied_weights(fused):
    ours, theirs = tied(), tied()
    mine, reference = optimizer("lomo", ours, lr=0.3, fused=fused), torch.optim.SGD(theirs.parameters(), lr=0.3)
    for step in range(5):
        backward(ours, step)
        assert all((p.grad is None) == fused for p in ours.parameters())
        mine.step()
        mine.zero_grad()
        backward(theirs, step)
        reference.step()
        reference.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters()))
    assert mine.state[ours.embed.weight]["step"] == 5  # once a step, though it is used twice


def test_lomo_decays_and_clips_by_value():
    p = nn.Parameter(torch.ones(4))
    built = optimizer("lomo", [{"params": [p], "weight_decay": 0.5}], lr=0.1, clip_value=0.2)
    (p * torch.tensor([0.1, 5.0, -5.0, 0.0])).sum().backward()
    torch.testing.assert_close(p.detach(), 0.95 - 0.1 * torch.tensor([0.1, 0.2, -0.2, 0.0]))
    assert p.grad is None and set(built.state[p]) == {"step"}


def test_gradients_of_at_most_one_tensor_are_alive():
    """Counted as each gradient arrives, just before the update that frees it."""
    model, alive = tied(), []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: alive.append(sum(q.grad is not None for q in model.parameters())))
    built = optimizer("lomo", model)
    backward(model, 0)
    assert alive == [1] * len(list(model.parameters())) and built.config.fused


def test_adalomo_equals_torch_adafactor():
    """torch's rate is min(lr, 1 / sqrt(t)) and its eps enters elsewhere: the same numbers for small lr."""
    ours, theirs = tied(), tied()
    mine = optimizer("adalomo", ours, lr=0.05)
    reference = torch.optim.Adafactor(theirs.parameters(), lr=0.05, eps=(1e-30, 1e-3))
    for step in range(8):
        backward(ours, step)
        mine.step()
        backward(theirs, step)
        reference.step()
        reference.zero_grad()
        for p, q in zip(ours.parameters(), theirs.parameters()):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_state_is_nothing_or_m_plus_n():
    def size(name, shape, **options):
        return lookup("optimizer", name).cls.state_bytes(shape, **options)

    assert size("lomo", (20, 10)) == 4 and size("adalomo", (20, 10)) == 4 * 30 + 4 and size("adalomo", (20,)) == 4 * 20 + 4
    with pytest.raises(UsageError, match="state_dtype"):
        optimizer("lomo", tied(), state_dtype="bfloat16")


@pytest.mark.parametrize("method", ["lomo", "adalomo"])
def test_accumulation_and_global_clipping_are_refused_unless_not_fused(method):
    plain = {"model": "m", "data": "d.jsonl", "adapter": None}
    for train, words in (({"grad_accumulation": 2, "max_grad_norm": 0}, "micro-batch"), ({}, "global norm")):
        with pytest.raises(UsageError, match=words):
            load_recipe({**plain, "optimizer": method, "train": train})
        assert load_recipe({**plain, "optimizer": {"method": method, "fused": False}, "train": train})
    assert load_recipe({**plain, "optimizer": method, "train": {"max_grad_norm": 0}}).optimizer.fused
