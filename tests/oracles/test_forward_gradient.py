"""Forward gradients against reverse-mode autograd's g . v, on whole models, tied and bf16 ones, and adapters."""

from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import graftwork
import tiny
from graftwork.data.collate import Collator
from graftwork.errors import IncompatibleError
from graftwork.estimators.forward_gradient import ForwardGradient, ForwardGradientEstimator, direction
from graftwork.objectives.causal_lm import CausalLMObjective
from graftwork.registry import make_config
from graftwork.training.step import TrainStep
from memory_support import forward_peak, peak_of

slow = pytest.mark.slow


def batch_of(rows=2, length=9, seed=3):
    ids = tiny.tokens(rows, length, seed).tolist()
    return Collator(0).collate([{"input_ids": row, "labels": [-100] * (3 + i) + row[3 + i:]} for i, row in enumerate(ids)])


def built(model, graft=None, **options):
    named = list((graft or model.requires_grad_(True)).named_parameters())
    each = ForwardGradientEstimator(ForwardGradient(**{"lr": 1e-2, **options}))
    return TrainStep(model, CausalLMObjective(), each, named, [graft] if graft else [], seed=4)


def exact(step, batches, sample=0):
    """Reverse mode: (g . v, gradients) with a finished backward pass over the same batches."""
    step.model.eval()
    scales = step.row_scales(batches)
    loss = sum(CausalLMObjective().loss(step.model, b, s).loss for b, s in zip(batches, scales))
    params = [(n, p) for n, p in step.parameters]
    grads = torch.autograd.grad(loss, [p for _, p in params], allow_unused=True)
    return float(sum((g.double() * direction((4, 0, sample), n, p)).sum() for g, (n, p) in zip(grads, params) if g is not None))


def fresh(kind):
    if kind == "lora":
        model = tiny.llama()
        graft = graftwork.attach(model, make_config("adapter", "lora", r=2, dropout=0.3))
        with torch.no_grad():
            for p in graft.parameters():
                p.add_(0.1)
        return model, graft
    return getattr(tiny, kind)(), None


@slow
@pytest.mark.parametrize("kind", ["llama", "gpt2", "lora"])
def test_slope_equals_gradient_times_direction_and_the_update_follows(kind):
    batches = [batch_of(2), batch_of(3, seed=8)]
    model, graft = fresh(kind)
    step = built(model, graft, n_samples=2, weight_decay=0.1)
    before = {n: p.detach().clone() for n, p in step.parameters}
    expected = [exact(step, batches, q) for q in range(2)]
    order = [n for n, _ in model.named_parameters()]
    result = step.run(batches, 0)
    got = [float(result.metrics["projected_gradient"]), float(result.metrics["projected_gradient_1"])]
    assert got == pytest.approx(expected, rel=1e-3, abs=1e-4) and abs(got[0]) > 1e-2
    assert [n for n, _ in model.named_parameters()] == order and all(p.grad is None for p in model.parameters())
    for n, p in step.parameters:
        v = [direction((4, 0, q), n, before[n]) for q in range(2)]
        decayed = before[n] * (1 - 1e-3 if p.dim() > 1 else 1)
        torch.testing.assert_close(p.detach(), decayed - 1e-2 * sum(c * each for c, each in zip(got, v)) / 2, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        model.eval()
        scales = step.row_scales(batches)
        for name, p in step.parameters:
            p.copy_(before[name])
        loss = sum(float(CausalLMObjective().loss(model, b, s).loss) for b, s in zip(batches, scales))
    assert float(result.loss) == pytest.approx(loss, rel=1e-4)


@slow
def test_bf16_models_and_frozen_tensors():
    model = tiny.llama(dtype=torch.bfloat16)
    from graftwork.modeling.arithmetic import widen
    widen(model)
    step = built(model)
    slope = float(step.run([batch_of()], 0, lr=0.0).metrics["projected_gradient"])
    wide = built(tiny.llama(dtype=torch.bfloat16).float())
    assert slope == pytest.approx(exact(wide, [batch_of()]), rel=0.1, abs=0.2)
    model.model.embed_tokens.weight.requires_grad_(False)
    before = model.model.embed_tokens.weight.clone()
    step.run([batch_of()], 1, lr=1e-2)
    assert torch.equal(before, model.model.embed_tokens.weight)


@slow
def test_a_model_without_forward_derivative_is_refused_and_stays_whole():
    class Silent(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, g):
            return g * 2

    model = tiny.llama()
    names = [n for n, _ in model.named_parameters()]
    model.model.layers[0].mlp.register_forward_hook(lambda m, i, y: Silent.apply(y))
    with pytest.raises(IncompatibleError, match="no forward derivative"):
        built(model).run([batch_of()], 0)
    assert [n for n, _ in model.named_parameters()] == names
    assert all(isinstance(p, torch.nn.Parameter) and not m._forward_pre_hooks for m in model.modules() for p in m._parameters.values()
               if p is not None)


@slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_twice_the_forward_and_the_tangents_of_one_module(dtype):
    """Not the tangents of all weights, and no graph: deeper models need no more."""
    beside = {}
    for depth in (2, 6):
        model = tiny.llama(dtype=dtype, vocab_size=1024, num_hidden_layers=depth)
        step, batch = built(model), batch_of(4, 32)
        step.run([batch], 0)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        beside[depth] = peak_of(partial(step.run, [batch], 1), model, batch) - weights
        with sdpa_kernel(SDPBackend.MATH):
            activations = forward_peak(model, batch) - weights
        largest = max(p.numel() for p in model.parameters())
        assert beside[depth] <= 2 * activations + largest * (4 + dtype.itemsize) + 4096
    assert beside[6] <= beside[2] + 8192  # four layers have tangents of 100 KiB and more
    assert all(p.grad is None for p in model.parameters())
