"""ALLoRA: the gain of a row in closed form; the step of any optimizer is multiplied by it, or the gradient is."""

from __future__ import annotations

import copy

import pytest
import torch

import graftwork
import tiny
from adapter_support import attach, output
from graftwork.adapters.allora import row_gain
from graftwork.errors import UsageError

IDS = tiny.tokens(2, 7)
TARGETS = ["q_proj", "down_proj"]


def test_gain_is_eta_at_zero_and_falls():
    rows = torch.tensor([[0.0, 0.0], [0.3, 0.4], [3.0, 4.0], [30.0, 40.0]], dtype=torch.float64)
    gain = row_gain(rows, 3.0)
    wanted = [1 / (norm + 1 / 9) ** 0.5 for norm in (0.0, 0.5, 5.0, 50.0)]
    assert gain.shape == (4, 1) and gain.flatten().tolist() == pytest.approx(wanted)
    assert gain[0] == 3.0 and (gain.diff(dim=0) < 0).all()
    for wrong in (0.0, float("inf")):
        with pytest.raises(UsageError):
            graftwork.attach(tiny.llama(), "allora", eta=wrong)


def one_step(graft, optimizer):
    """Gradient step of the squared logits; returns B before it, by site."""
    before = {n: a.lora_B.detach().clone() for n, a in graft.adapters.items()}
    optimizer.zero_grad()
    output(graft.model, IDS).square().mean().backward()
    optimizer.step()
    return before


def test_the_first_sgd_step_is_eta_times_loras():
    """Under SGD gradient and update are one thing; A's gradient is zero at B = 0."""
    lora = graftwork.attach(tiny.llama(), "lora", r=4, target_modules=TARGETS, seed=3)
    one_step(lora, torch.optim.SGD(lora.parameters(), lr=0.1 * 5.0))
    ours = graftwork.attach(tiny.llama(), "allora", r=4, eta=5.0, gain_on="gradient", target_modules=TARGETS, seed=3)
    one_step(ours, torch.optim.SGD(ours.parameters(), lr=0.1))
    for name, adapter in ours.adapters.items():
        torch.testing.assert_close(adapter.lora_B, lora.adapters[name].lora_B, rtol=1e-6, atol=0.0)
        assert adapter.lora_B.abs().max() > 0 and torch.equal(adapter.lora_A, lora.adapters[name].lora_A)


@pytest.mark.parametrize("fused", [False, True])
def test_adamw_steps_of_b_times_the_gain(fused):
    """Against torch's AdamW on a twin whose B is put where ours is before every step. The norm is the one before the step."""
    model = tiny.llama()
    twin = copy.deepcopy(model)
    ours = attach(model, "allora", eta=2.5, target_modules=TARGETS)
    plain = attach(twin, "lora", r=4, alpha=4.0, target_modules=TARGETS)
    for name, adapter in ours.adapters.items():
        plain.adapters[name].load_state_dict(adapter.state_dict())
    moving = graftwork.optimizer("adamw", ours.parameter_groups(), lr=1e-2, weight_decay=0.1, fused=fused)
    assert len(moving.param_groups) == 2, "all sites in two groups"
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(4):
        before = one_step(ours, moving)
        one_step(plain, reference)
        with torch.no_grad():
            for name, adapter in ours.adapters.items():
                theirs, old = plain.adapters[name], before[name]
                torch.testing.assert_close(adapter.lora_B, old + row_gain(old, 2.5) * (theirs.lora_B - old), rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(adapter.lora_A, theirs.lora_A, rtol=1e-5, atol=1e-6)
                theirs.lora_B.copy_(adapter.lora_B)


def test_gain_on_the_gradient():
    """dL/dB of plain LoRA times the gain of the present B, also through the batched form; under Adam the place matters."""
    grads = {}
    for place in ("gradient", "update"):
        graft = attach(tiny.llama(), "allora", eta=3.0, gain_on=place, target_modules=TARGETS)
        output(graft.model, IDS).square().mean().backward()
        grads[place] = {n: a.lora_B.grad.clone() for n, a in graft.adapters.items()}
        with graftwork.routing(graft.model, ["a", "a"]):
            graft.model.zero_grad()
            output(graft.model, IDS).square().mean().backward()
        for name, adapter in graft.adapters.items():
            torch.testing.assert_close(adapter.lora_B.grad, grads[place][name], rtol=1e-3, atol=1e-6)
    for name, adapter in graft.adapters.items():
        torch.testing.assert_close(grads["gradient"][name], grads["update"][name] * row_gain(adapter.lora_B, 3.0).detach(),
                                   rtol=1e-4, atol=1e-7)

    def after(place, eta):
        graft = graftwork.attach(tiny.llama(), "allora", r=4, eta=eta, gain_on=place, target_modules=TARGETS)
        one_step(graft, graftwork.optimizer("adamw", graft.parameter_groups(), lr=1e-3))
        return torch.cat([a.lora_B.detach().flatten() for a in graft.adapters.values()])

    plain = after("gradient", 1.0)
    torch.testing.assert_close(after("gradient", 4.0), plain, rtol=1e-2, atol=2e-5)  # Adam divides the gain out again
    torch.testing.assert_close(after("update", 4.0), 4 * after("update", 1.0), rtol=1e-4, atol=1e-8)


def test_count_and_bounds():
    graft = graftwork.attach(tiny.llama(), "allora", r=3, rank_pattern={"q_proj": 2})
    for name, adapter in graft.adapters.items():
        rank = 2 if name.endswith("q_proj") else 3
        assert sum(p.numel() for p in adapter.parameters()) == rank * (adapter.in_features + adapter.out_features)
    with pytest.raises(UsageError, match="r=33.*32 x 64"):
        graftwork.attach(tiny.llama(), "allora", r=33, target_modules=["k_proj"])
