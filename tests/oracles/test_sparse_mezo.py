"""Sparse MeZO: what moves and what must not, against explicit perturb-then-forward and the closed form of its estimate."""

import pytest
import torch
from torch import nn

import graftwork
import tiny
from graftwork.data.collate import Collator
from graftwork.estimators.mezo import add_noise
from graftwork.estimators.sparse_mezo import SparseMeZO, SparseMeZOEstimator, threshold
from graftwork.objectives.causal_lm import CausalLMObjective
from graftwork.training.step import TrainStep
from memory_support import forward_peak, peak_of

slow = pytest.mark.slow


def batch_of(rows=2, length=9, seed=3):
    ids = tiny.tokens(rows, length, seed).tolist()
    return Collator(0).collate([{"input_ids": row, "labels": [-100] * (3 + i) + row[3 + i:]} for i, row in enumerate(ids)])


def built(model, graft=None, **options):
    named = list((graft or model).named_parameters())
    each = SparseMeZOEstimator(SparseMeZO(**{"eps": 1e-2, "lr": 1e-2, **options}))
    return TrainStep(model, CausalLMObjective(), each, named, [graft] if graft else [], seed=4)


def values(step):
    return {n: p.detach().clone() for n, p in step.parameters}


def noise(name, p, step=0):
    z = torch.zeros(p.shape)
    add_noise((4, step, 0), name, z, 1.0)
    return z


def test_threshold_is_the_order_statistic_of_sizes():
    for shape, sparsity in [((300, 7), 0.8), ((5,), 0.5), ((4, 4), 0.0), ((1,), 0.9)]:
        p = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        expected = p.abs().flatten().sort().values[max(1, round((1 - sparsity) * p.numel())) - 1]
        assert threshold(p, sparsity) == (expected if p.numel() > 1 else torch.inf)
    assert threshold(torch.zeros(3, 3), 0.5) == torch.inf and threshold(torch.tensor([1.0, -1.0]), 0.5) == torch.inf
    half = torch.randn(1000, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert threshold(half, 0.75) == half.float().abs().sort().values[249]


@slow
@pytest.mark.parametrize("what", ["full", "full bf16", "lora"])
def test_large_entries_stay_to_the_bit_and_small_ones_move(what):
    model = tiny.llama(dtype=torch.bfloat16 if "bf16" in what else torch.float32)
    graft = graftwork.attach(model, "lora", r=2) if what == "lora" else None
    if graft:
        with torch.no_grad():
            for _, p in graft.named_parameters():
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(7)) * 0.1)
    step = built(model, graft, sparsity=0.75, weight_decay=0.5, lr=0.05)
    before = values(step)
    step.run([batch_of()], 0)
    step.run([batch_of()], 1)
    for n, p in step.parameters:
        stays = before[n].float().abs() > threshold(before[n], 0.75)
        assert stays.float().mean() == pytest.approx(0.75, abs=0.06 if p.dim() > 1 else 0.2)
        assert torch.equal(p[stays], before[n][stays]), n
        assert (p != before[n])[~stays].float().mean() > 0.5, n


@slow
@pytest.mark.parametrize("mask", ["magnitude", "random"])
def test_masked_forwards_equal_explicit_perturbation_and_restore(mask):
    model = tiny.llama()
    step = built(model, sparsity=0.6, mask=mask)
    start = values(step)
    result = step.run([batch_of()], 0, lr=0.0)
    tolerance = 0 if mask == "magnitude" else 1e-6  # copied back, or restored by arithmetic
    assert all(float((p.detach() - start[n]).abs().max()) <= tolerance for n, p in step.parameters)
    losses = []
    for sign in (1, -1):
        other = tiny.llama()
        with torch.no_grad():
            for n, p in other.named_parameters():
                m = p.abs() <= threshold(p, 0.6) if mask == "magnitude" else torch.stack(list(step.estimator.masks(n, p))[:1])[0]
                p.add_(sign * 1e-2 * m.reshape(p.shape) * noise(n, p))
            losses.append(float(CausalLMObjective().loss(other, batch_of(), 1 / batch_of()["n_targets"]).loss))
    assert float(result.metrics["projected_gradient"]) == pytest.approx((losses[0] - losses[1]) / 2e-2, abs=2e-3)


@slow
def test_a_mask_taken_from_perturbed_weights_would_not_restore():
    """The mistake that the in-forward form avoids, shown to be one."""
    p = torch.randn(100, 100, generator=torch.Generator().manual_seed(3))
    h, z, start = threshold(p, 0.8), noise("w", p), p.clone()
    p = p + 0.05 * z * (p.abs() <= h)
    p = p - 0.05 * z * (p.abs() <= h)
    assert float((p - start).abs().max()) > 1e-2


@slow
def test_random_masks_have_the_density_and_last_as_long_as_asked():
    step = built(tiny.llama(), sparsity=0.7, mask="random", resample=2)
    moved = []
    for at in range(4):
        before = values(step)
        step.run([batch_of()], at)
        moved.append({n: p.detach() != before[n] for n, p in step.parameters})
    share = torch.cat([m.flatten() for m in moved[0].values()]).float().mean()
    assert float(share) == pytest.approx(0.3, abs=0.02)
    name = "model.layers.0.mlp.up_proj.weight"

    def overlap(a, b):
        return float((moved[a][name] & moved[b][name]).float().mean())

    assert overlap(0, 1) > 0.25 and overlap(2, 3) > 0.25 and overlap(1, 2) < 0.15


@slow
def test_no_sparsity_is_zo_sgd_and_thresholds_are_saved():
    dense, sparse = tiny.llama(), tiny.llama()
    reference = graftwork.registry.lookup("estimator", "zo_sgd")
    plain = TrainStep(dense, CausalLMObjective(), reference.cls(reference.config(eps=1e-2, lr=1e-2)),
                      list(dense.named_parameters()), seed=4)
    step = built(sparse, sparsity=0.0)
    for at in range(2):
        a, b = plain.run([batch_of()], at), step.run([batch_of()], at)
        assert float(a.metrics["projected_gradient"]) == pytest.approx(float(b.metrics["projected_gradient"]), rel=1e-2, abs=1e-2)
    state = step.estimator.state_dict()["thresholds"]
    assert len(state) == len(step.parameters) and all(t.dim() == 0 and t.dtype == torch.float32 for t in state.values())
    again = built(tiny.llama())
    again.estimator.load_state_dict(step.estimator.state_dict())
    assert again.estimator.thresholds == state  # and not those of the weights as they are


@slow
def test_a_fresh_lora_moves_its_zero_factor_whole():
    model = tiny.llama()
    graft = graftwork.attach(model, "lora", r=2)
    step = built(model, graft, sparsity=0.5)
    for at in range(3):
        before = values(step)
        step.run([batch_of()], at)
        for n, p in step.parameters:
            share = float((p != before[n]).float().mean())
            assert share == pytest.approx(1.0 if n.endswith("lora_B") else 0.5, abs=0.06), n


@slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_that_of_the_forward_plus_one_tensor(dtype):
    model = tiny.llama(dtype=dtype, vocab_size=4096)
    named, batch = list(model.named_parameters()), batch_of(4, 32)
    step = built(model)

    largest = max(p.numel() * 4 for _, p in named)
    assert peak_of(lambda: step.run([batch], 0), model, batch) <= forward_peak(model, batch) + largest + 4096


@slow
def test_the_estimate_is_that_of_the_masked_gradient():
    """On a linear loss the mean of c z over many directions is m * g."""

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.map = nn.Linear(20, 1, bias=False)

    model = Linear()
    with torch.no_grad():
        model.map.weight.copy_(torch.linspace(-1, 1, 20)[None])
    start, x = model.map.weight.detach().clone(), torch.randn(1, 20, generator=torch.Generator().manual_seed(2))

    class Value:
        @staticmethod
        def loss(model, batch, scale):
            from graftwork.objectives.base import LossOutput
            value = model.map(x).sum()
            return LossOutput(value, value.detach()[None], torch.ones(1))

    from graftwork.estimators.base import StepContext
    from graftwork.modeling.state import StateHolder
    each = SparseMeZOEstimator(SparseMeZO(n_samples=1000, lr=1.0, eps=1e-2, sparsity=0.5))
    each.step(StepContext(model, Value(), list(model.named_parameters()), [{}], [1.0], StateHolder(), 0, 1))
    m = start.abs() <= threshold(start, 0.5)
    torch.testing.assert_close(start - model.map.weight.detach(), m * x, rtol=0.25, atol=0.4)
    assert torch.equal(model.map.weight.detach()[~m], start[~m])
