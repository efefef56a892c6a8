"""The ZO-Bench family against mezo, torch.optim on the same gradients, and closed forms; its memory by the ledger."""

import pytest
import torch
from torch import nn

import graftwork
import tiny
from graftwork.data.collate import Collator
from graftwork.errors import UsageError
from graftwork.estimators._spsa import blocks_of
from graftwork.estimators.base import StepContext
from graftwork.estimators.mezo import MeZO, MeZOEstimator, add_noise
from graftwork.modeling.state import StateHolder
from graftwork.objectives.base import LossOutput
from graftwork.objectives.causal_lm import CausalLMObjective
from graftwork.registry import lookup, make_config
from graftwork.training.step import TrainStep
from memory_support import forward_peak, peak_of

FAMILY = ["zo_sgd", "zo_sgd_sign", "zo_momentum", "zo_adam", "zo_conservative", "zo_blockwise"]
slow = pytest.mark.slow


class Bowl(nn.Module):
    """L = g . theta + |theta|^2 / 2 over the tensors of two numbered layers and one outside; not quadratic with `quartic`."""

    def __init__(self, dtype=torch.float64, quartic=0.0):
        super().__init__()
        self.head = nn.Parameter(torch.zeros(6, dtype=dtype))
        self.layers = nn.ModuleList(nn.Linear(4, 3, bias=False, dtype=dtype) for _ in range(2))
        generator = torch.Generator().manual_seed(5)
        self.g, self.calls, self.quartic = torch.randn(30, generator=generator, dtype=torch.float64), 0, quartic
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))

    def value(self):
        flat = torch.cat([p.flatten() for p in self.parameters()]).double()
        return self.g @ flat + flat @ flat / 2 + self.quartic * (flat**4).sum()


class Value:
    @staticmethod
    def loss(model, batch, row_scale):
        model.calls += 1
        value = model.value()
        return LossOutput(value, value.detach()[None], torch.ones(1))


def estimator(name, **options):
    return lookup("estimator", name).cls(make_config("estimator", name, **options))


def context(model, step=0, lr=None):
    return StepContext(model, Value(), list(model.named_parameters()), [{}], [1.0], StateHolder(), step, 1, lr)


def noise(name, p, step=0, sample=0):
    z = torch.zeros(p.shape, dtype=torch.float64)
    add_noise((1, step, sample), name, z, 1.0)
    return z


def copies(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def steps(method, count, model=None, **options):
    model = model or Bowl()
    each = estimator(method, **options)
    results = [each.step(context(model, at)) for at in range(count)]
    return model, each, results


def gradient(model, names, result, step, samples=1):
    """g of one step, from its log."""
    slopes = [result.metrics["projected_gradient" + (f"_{q}" if q else "")] for q in range(samples)]
    return {n: sum(c * noise(n, p, step, q) for q, c in enumerate(slopes)) / samples for n, p in names}


def test_zo_sgd_is_mezo_number_for_number():
    options = dict(lr=1e-2, eps=1e-3, n_samples=2, weight_decay=0.1)
    ours, _, _ = steps("zo_sgd", 3, **options)
    theirs = Bowl()
    each = MeZOEstimator(MeZO(**options))
    for at in range(3):
        each.step(context(theirs, at))
    for (n, p), q in zip(ours.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12, msg=n)


@slow
@pytest.mark.parametrize("name, make", [
    ("zo_adam", lambda ps: torch.optim.AdamW(ps, lr=1e-2, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.1)),
    ("zo_momentum", lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.7)),
])
def test_rules_equal_the_composition_of_mezo_and_a_torch_optimizer(name, make):
    """mezo measures c at the same weights; torch's optimizer gets c z as the gradient."""
    options = dict(lr=1e-2, eps=1e-3, n_samples=2)
    extra = dict(betas=(0.8, 0.99), adam_eps=1e-6) if name == "zo_adam" else dict(momentum=0.7)
    model, other = Bowl(), Bowl()
    each, probe, reference = estimator(name, **options, **extra, weight_decay=0.1 if name == "zo_adam" else 0), \
        estimator("mezo", **options), make(list(other.parameters()))
    if name == "zo_adam":  # no decay on vectors
        reference = torch.optim.AdamW([{"params": [other.head], "weight_decay": 0.0}, {"params": list(other.layers.parameters())}],
                                      lr=1e-2, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.1)
    for at in range(6):
        each.step(context(model, at))
        before = copies(other)
        g = gradient(other, list(other.named_parameters()), probe.step(context(other, at, lr=0.0)), at, 2)
        for n, p in other.named_parameters():
            p.data.copy_(before[n])
            p.grad = g[n]
        reference.step()
    for (n, p), q in zip(model.named_parameters(), other.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9, msg=n)


@slow
@pytest.mark.parametrize("samples", [1, 3])
def test_sign_moves_every_entry_by_the_rate_against_the_sign_of_the_mean(samples):
    before = copies(Bowl())
    model, _, (result,) = steps("zo_sgd_sign", 1, lr=0.25, eps=1e-3, n_samples=samples)
    g = gradient(model, list(model.named_parameters()), result, 0, samples)
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[n] - 0.25 * g[n].sign(), rtol=0, atol=1e-9)


@slow
def test_differences_in_closed_form_and_their_forwards():
    """L(theta + e z) - L(theta) = e g'z + e^2 z'z / 2 for a quadratic, exactly."""
    eps, n = 0.1, 3
    start = Bowl()
    theta = torch.cat([p.detach().flatten() for p in start.parameters()])
    z = [torch.cat([noise(m, p, 0, q).flatten() for m, p in start.named_parameters()]) for q in range(n)]
    base, slope = float(start.value().detach()), [float((start.g + theta) @ each) for each in z]
    plus = [base + eps * s + eps**2 * float(each @ each) / 2 for s, each in zip(slope, z)]
    for difference, expected, calls, loss in [
            ("two_sided", slope, 2 * n, None), ("one_sided", [(p - base) / eps for p in plus], n + 1, base),
            ("residual", [0.0, *((b - a) / eps for a, b in zip(plus, plus[1:]))], n, sum(plus) / n)]:
        model, each, (result,) = steps("zo_sgd", 1, difference=difference, eps=eps, n_samples=n, lr=1e-9)
        got = [float(result.metrics["projected_gradient" + (f"_{q}" if q else "")]) for q in range(n)]
        assert got == pytest.approx(expected, rel=1e-8, abs=1e-8) and model.calls == calls
        assert loss is None or float(result.loss) == pytest.approx(loss, rel=1e-6)
    assert float(each.state_dict()["previous"]) == pytest.approx(plus[-1])
    again = estimator("zo_sgd", difference="residual", eps=eps, lr=1e-9)
    again.load_state_dict(each.state_dict())
    model = Bowl()
    first = again.step(context(model, 1))
    assert float(first.metrics["projected_gradient"]) != 0  # the last evaluation of the run before counts


@slow
def test_conservative_keeps_the_best_of_three():
    seen = set()
    for seed in range(12):
        for lr in (1e-3, 5.0):
            model = Bowl(quartic=0.01)
            start, base = copies(model), float(model.value().detach())
            each = estimator("zo_conservative", lr=lr, eps=2.0)
            ctx = context(model)
            ctx.seed = seed
            result = each.step(ctx)
            three = [float(result.metrics[f"loss_{n}"]) for n in ("stay", "descent", "ascent")]
            assert model.calls == 5 and three[0] == pytest.approx(base)
            assert float(model.value().detach()) == pytest.approx(min(three), rel=1e-9)
            kept = float(result.metrics["kept"])
            assert kept == (0.0, 1.0, -1.0)[three.index(min(three))]
            if kept == 0:
                assert all(torch.allclose(p, start[n], atol=1e-12) for n, p in model.named_parameters())
            seen.add(kept)
    assert {0.0, 1.0} <= seen


@slow
def test_one_block_is_zo_sgd_and_sweeps_are_gauss_seidel_or_jacobi():
    options = dict(lr=0.05, eps=1e-3)
    plain, one = steps("zo_sgd", 2, **options)[0], steps("zo_blockwise", 2, blocks="all", **options)[0]
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), one.parameters()))
    for sequential in (True, False):
        model, _, (result,) = steps("zo_blockwise", 1, sequential=sequential, **options)
        assert model.calls == 6
        other, pending = Bowl(), []
        for name, p in other.named_parameters():
            z = noise(name, p)
            flat = torch.cat([q.detach().flatten() for q in other.parameters()])
            full = torch.cat([(z if m == name else torch.zeros_like(q)).flatten() for m, q in other.named_parameters()])
            c = (other.g + flat) @ full
            if sequential:
                p.data -= 0.05 * c * z
            else:
                pending.append((p, 0.05 * c * z))
        for p, change in pending:
            p.data -= change
        for p, q in zip(model.parameters(), other.parameters()):
            torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)
    names = [(n, p) for n, p in tiny.llama().named_parameters()]
    counts = {by: len(blocks_of(names, by)) for by in ("all", "layer", "part", "map")}
    assert counts == {"all": 1, "layer": 4, "part": 2 * 4 + 2, "map": 2 * 9 + 2}
    assert sum(len(b) for b in blocks_of(names, "part")) == len(names)


def batch_of(rows=2, length=9, seed=3):
    ids = tiny.tokens(rows, length, seed).tolist()
    return Collator(0).collate([{"input_ids": row, "labels": [-100] * (3 + i) + row[3 + i:]} for i, row in enumerate(ids)])


@slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILY)
def test_memory_is_forward_state_and_one_tensor_and_no_gradient_is_made(name, dtype):
    model = tiny.llama(dtype=dtype, vocab_size=4096)
    named, batch = list(model.named_parameters()), batch_of(4, 32)
    cls = lookup("estimator", name).cls
    step = TrainStep(model, CausalLMObjective(), estimator(name, eps=1e-2, lr=1e-4), named, seed=4)
    step.run([batch], 0)
    state = sum(t.nbytes for slots in step.estimator.kept.values() for t in slots.values())
    assert state == sum(cls.state_bytes(tuple(p.shape), p.dtype) for _, p in named)
    assert state == sum(p.numel() for _, p in named) * 4 * {"zo_momentum": 1, "zo_adam": 2}.get(name, 0)

    largest = max(p.numel() * 4 for _, p in named)
    kept = step.estimator.state_dict()
    assert peak_of(lambda: step.run([batch], 1), model, batch, kept) <= forward_peak(model, batch, kept) + largest + 4096
    assert all(p.grad is None for _, p in named)


@slow
def test_state_of_frozen_tensors_is_dropped_and_what_returns_starts_anew():
    model, each, _ = steps("zo_adam", 2, lr=1e-2)
    model.head.requires_grad_(False)
    before = model.head.detach().clone()
    each.step(context(model, 2))
    assert "head" not in each.kept and "head" not in each.counts and torch.equal(model.head, before)
    model.head.requires_grad_(True)
    each.step(context(model, 3))
    assert each.counts["head"] == 1 and each.counts["layers.0.weight"] == 4
    torch.testing.assert_close((model.head - before).abs(), torch.full((6,), 1e-2, dtype=torch.float64), rtol=1e-4, atol=0)


@slow
def test_transposed_and_bf16_tensors_keep_their_state_in_step():
    turned = Bowl()
    turned.layers[0].weight = nn.Parameter(torch.randn(4, 3, dtype=torch.float64).T)
    straight = Bowl()
    straight.layers[0].weight = nn.Parameter(turned.layers[0].weight.detach().clone(memory_format=torch.contiguous_format))
    for model in (turned, straight):
        steps("zo_adam", 3, model, lr=1e-2)
    torch.testing.assert_close(turned.layers[0].weight, straight.layers[0].weight)
    weight, drift = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16), 0.0

    class Toy(nn.Module):
        def __init__(self):
            super().__init__()
            self.map, self.calls = weight, 0

        def value(self):
            return self.map(torch.ones(1, 64, dtype=torch.bfloat16)).double().sum()

    model = Toy()
    model.map.weight.data.fill_(1.0)
    each = estimator("zo_sgd_sign", lr=1e-3, eps=1e-2)
    for at in range(20):
        each.step(context(model, at))
    drift = float((model.map.weight.detach().float() - 1).pow(2).mean()) ** 0.5
    assert drift == pytest.approx((20 * 1e-3 * 2**-7) ** 0.5, rel=0.3)  # stochastic rounding; to nearest nothing would move


@slow
@pytest.mark.parametrize("name", ["zo_adam", "zo_sgd"])
def test_adapters_learn_by_the_family(name):
    model = tiny.llama()
    graft = graftwork.attach(model, "lora", r=2)
    step = TrainStep(model, CausalLMObjective(), estimator(name, lr=0.02, eps=1e-2), list(graft.named_parameters()), [graft], seed=4)
    losses = [float(step.run([batch_of()], k).loss) for k in range(40)]
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.3


def test_options_out_of_range_are_refused():
    for name, wrong in [("zo_adam", {"betas": (1.0, 0.9)}), ("zo_momentum", {"momentum": 1.0}), ("zo_sgd", {"blocks": "word"})]:
        with pytest.raises(UsageError):
            make_config("estimator", name, **wrong)


def test_rates_of_an_adapter_s_own_are_refused_where_one_rate_moves_all():
    from graftwork.recipe import load_recipe
    from graftwork.training.build import check_groups

    plain = {"model": "m", "data": {"train": "d"}, "estimator": {"method": "zo_sgd", "weight_decay": 0.1}}
    for options, own in [({"r": 2}, False), ({"r": 2, "loraplus_lr_ratio": 4.0}, True)]:
        graft = graftwork.attach(tiny.llama(), "lora", **options)
        if own:
            with pytest.raises(UsageError, match="one rate"):
                check_groups(load_recipe(plain), [graft])
        else:
            check_groups(load_recipe(plain), [graft])
