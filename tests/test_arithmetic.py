"""Wide products: as exact as fp32 rounded once, gradients included, and only where the processor needs them."""

import pytest
import torch

import tiny
from graftwork.modeling import arithmetic


@pytest.fixture
def slow(monkeypatch):
    monkeypatch.setattr(arithmetic, "slow_on_cpu", lambda dtype: dtype in (torch.bfloat16, torch.float16))


@pytest.mark.parametrize("rows", [2, 4, 33])
def test_equals_fp32_rounded_once(slow, rows):
    x = torch.randn(rows, 24, dtype=torch.bfloat16, requires_grad=True)
    W = torch.randn(10, 24, dtype=torch.bfloat16, requires_grad=True)
    b = torch.randn(10, dtype=torch.bfloat16, requires_grad=True)
    y = arithmetic.linear(x, W, b)
    g = torch.randn_like(y)
    y.backward(g)
    exact = x.detach().double() @ W.detach().double().T + b.detach().double()
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=2**-7)
    torch.testing.assert_close(x.grad.double(), g.double() @ W.detach().double(), rtol=2**-7, atol=2**-6)
    torch.testing.assert_close(W.grad.double(), g.double().T @ x.detach().double(), rtol=2**-7, atol=2**-6)
    torch.testing.assert_close(b.grad.double(), g.double().sum(0), rtol=2**-7, atol=2**-6)


def test_nothing_of_x_is_kept_for_a_frozen_weight(slow):
    W, saved = torch.randn(8, 16, dtype=torch.bfloat16), []
    x = torch.randn(6, 16, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        arithmetic.linear(x, W)
    assert saved == [W.data_ptr()]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_widened_model_agrees_and_keeps_its_state(slow, name):
    model = getattr(tiny, name)().bfloat16()
    ids = tiny.tokens()
    before, keys = model(ids).logits, list(model.state_dict())
    arithmetic.widen(model)
    assert any(isinstance(m, arithmetic.WideLinear) for m in model.modules())
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(ids).logits.float(), before.float(), atol=0.05, rtol=0.05)


def test_fp32_is_left_alone(slow):
    model = tiny.llama()
    arithmetic.widen(model)
    assert not any(isinstance(m, arithmetic.WideLinear) for m in model.modules())


@pytest.mark.parametrize("instructions", [False, True])
def test_products_that_are_emulated_are_slow(instructions, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    reported = not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert arithmetic.slow_on_cpu.__wrapped__(torch.bfloat16) == (reported or not instructions)
    assert not arithmetic.slow_on_cpu.__wrapped__(torch.float32)
