"""MeZO against closed forms on quadratics, autograd's JVP, the replay of its log, and a ledger of its memory."""

import math

import pytest
import torch
from torch import nn

import graftwork
import tiny
from graftwork.data.collate import Collator
from graftwork.estimators.base import StepContext
from graftwork.estimators.mezo import PIECE, MeZO, MeZOEstimator, add_noise, replay
from graftwork.modeling.arithmetic import round_stochastic
from graftwork.modeling.state import StateHolder, state_of
from graftwork.objectives.base import LossOutput
from graftwork.objectives.causal_lm import CausalLMObjective
from graftwork.registry import make_config
from graftwork.training.step import TrainStep
from memory_support import forward_peak, peak_of


class Quadratic(nn.Module):
    """L(theta) = g . theta + curvature / 2 |theta|^2, over two tensors."""

    def __init__(self, d=4000, curvature=0.0, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.a = nn.Parameter(torch.zeros(d // 2, dtype=dtype))
        self.b = nn.Parameter(torch.zeros(2, d // 4, dtype=dtype))
        self.g = torch.randn(d, generator=generator, dtype=torch.float64)
        self.curvature, self.calls = curvature, 0

    def value(self, flat):
        return self.g @ flat + self.curvature / 2 * (flat @ flat)

    @staticmethod
    def loss(model, batch, row_scale):
        model.calls += 1
        value = model.value(torch.cat([model.a.flatten(), model.b.flatten()]).double())
        return LossOutput(value, value.detach()[None], torch.ones(1))


class Plain:
    loss = staticmethod(Quadratic.loss)


def context(model, step=0, seed=1, lr=None, batches=({},)):
    named, scales = list(model.named_parameters()), [1.0] * len(batches)
    return StepContext(model, Plain(), named, batches, scales, StateHolder(), step, seed, lr)


def noise(name, shape, step=0, seed=1, sample=0, dtype=torch.float64):
    z = torch.zeros(shape, dtype=dtype)
    add_noise((seed, step, sample), name, z, 1.0)
    return z


@pytest.mark.slow
def test_mean_of_estimates_on_a_known_gradient():
    """Cosine with the gradient about sqrt(q / (q + d + 1)), expected squared norm (q + d + 1) / q times the gradient's."""
    d, q, trials = 1000, 64, 32
    cosines, ratios = [], []
    for step in range(trials):
        model = Quadratic(d)
        MeZOEstimator(MeZO(n_samples=q, eps=1e-2)).step(context(model, step, lr=1.0))
        estimate = -torch.cat([model.a.flatten(), model.b.flatten()]).detach()
        cosines.append(float(estimate @ model.g / estimate.norm() / model.g.norm()))
        ratios.append(float((estimate.norm() / model.g.norm()) ** 2))
        assert model.calls == 2 * q
    assert sum(cosines) / trials == pytest.approx(math.sqrt(q / (q + d + 1)), rel=0.05)
    assert sum(ratios) / trials == pytest.approx((q + d + 1) / q, rel=0.1)


def test_noise_is_standard_normal_and_keyed_by_name_step_and_sample():
    z = noise("a", (300, 300))
    assert abs(float(z.mean())) < 0.02 and float(z.std()) == pytest.approx(1.0, abs=0.01)
    assert torch.equal(z, noise("a", (300, 300)))
    for other in [dict(name="b"), dict(step=1), dict(sample=1), dict(seed=2)]:
        assert abs(float((z * noise(**{"name": "a", "shape": (300, 300), **other})).mean())) < 0.02
    before = torch.get_rng_state()
    noise("a", (5,))
    assert torch.equal(before, torch.get_rng_state())  # the global generator is not touched


def test_pieces_of_a_large_tensor_are_independent_and_transposed_tensors_move_too():
    z = torch.zeros(PIECE + 10)
    add_noise((1, 0, 0), "a", z, 1.0)
    assert not torch.equal(z[:10], z[PIECE:]) and float(z[PIECE:].abs().min()) > 0
    turned = torch.zeros(4, 3).T
    add_noise((1, 0, 0), "a", turned, 1.0)
    assert float(turned.abs().min()) > 0


def test_two_point_estimate_equals_the_directional_derivative_up_to_eps_squared():
    """Against autograd's gradient times z, of the loss of a model that computes in float64 throughout."""
    model, batch = tiny.gpt2(dtype=torch.float64).requires_grad_(True), batch_of()

    class Exact:
        @staticmethod
        def loss(model, batch, scale):
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
            return LossOutput(loss, loss.detach()[None], torch.ones(1))

    named = list(model.named_parameters())
    grads = torch.autograd.grad(Exact.loss(model, batch, 1.0).loss, [p for _, p in named])
    exact = float(sum((g * noise(n, p.shape)).sum() for g, (n, p) in zip(grads, named)))
    errors = []
    for eps in (2e-4, 1e-4):
        ctx = StepContext(model, Exact(), named, [batch], [1.0], state_of(model), 0, 1, 0.0)
        errors.append(float(MeZOEstimator(MeZO(eps=eps)).step(ctx).metrics["projected_gradient"]) - exact)
    assert abs(errors[1]) < 1e-3 * abs(exact) and errors[0] / errors[1] == pytest.approx(4, rel=0.05)  # O(eps^2)


def batch_of(rows=2, length=9, seed=3):
    ids = tiny.tokens(rows, length, seed).tolist()
    return Collator(0).collate([{"input_ids": row, "labels": [-100] * (3 + i) + row[3 + i:]} for i, row in enumerate(ids)])


def mezo_step(model, parameters=None, grafts=(), **options):
    options = {"eps": 1e-2, "lr": 1e-3, **options}
    parameters = parameters or list(model.named_parameters())
    return TrainStep(model, CausalLMObjective(), MeZOEstimator(MeZO(**options)), parameters, grafts, seed=4)


def test_fp32_weights_come_back_and_replay_from_the_log_repeats_the_run():
    model, start = tiny.llama(), {n: p.detach().clone() for n, p in tiny.llama().named_parameters()}
    step, log = mezo_step(model, lr=1e-3, n_samples=2, weight_decay=0.1), []
    for number in range(5):
        lr = 1e-3 / (number + 1)
        metrics = step.run([batch_of(seed=number)], number, lr).metrics
        log.append((number, [float(metrics["projected_gradient"]), float(metrics["projected_gradient_1"])], lr))
    moved = max(float((p.detach() - start[n]).abs().max()) for n, p in model.named_parameters())
    replay(list(start.items()), log, seed=4, weight_decay=0.1)
    worst = max(float((p.detach() - start[n]).abs().max()) for n, p in model.named_parameters())
    assert worst < 1e-6 < 1e-3 < moved


def test_perturbed_forwards_leave_bf16_weights_bit_identical_and_see_the_noise():
    model = tiny.llama(dtype=torch.bfloat16)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    seen = []
    handle = model.model.layers[0].mlp.up_proj.register_forward_hook(lambda m, x, y: seen.append(m.weight.detach().float()))
    result = mezo_step(model).run([batch_of()], 0, lr=0.0)
    handle.remove()
    assert all(torch.equal(p, start[n]) for n, p in model.named_parameters())
    assert float(result.metrics["projected_gradient"]) != 0
    name = "model.layers.0.mlp.up_proj.weight"
    z = noise(name, start[name].shape, seed=4, dtype=torch.float32) * 1e-2
    assert len(seen) == 2
    for weight, sign in zip(seen, (1, -1)):
        assert torch.equal(weight, (start[name].float() + sign * z).bfloat16().float())


def test_bf16_and_fp32_measure_the_same_slope():
    """Over all tensors of the model, the tied output head included: a head that the noise misses would show here."""
    slopes = []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny.llama(dtype=torch.bfloat16).to(dtype)
        slopes.append(float(mezo_step(model, eps=5e-2).run([batch_of(rows=6)], 0, lr=0.0).metrics["projected_gradient"]))
    assert slopes[0] == pytest.approx(slopes[1], rel=0.1) and abs(slopes[0]) > 0.5
    model = tiny.llama()
    head_only = [("model.embed_tokens.weight", model.lm_head.weight)]
    assert abs(float(mezo_step(model, head_only).run([batch_of()], 0, lr=0.0).metrics["projected_gradient"])) > 0.1


def test_bf16_updates_below_the_spacing_move_the_mean():
    weight = nn.Parameter(torch.ones(64, 512, dtype=torch.bfloat16))
    replay([("w", weight)], [(s, [1.0], 2e-4) for s in range(50)], seed=1)
    expected = -2e-4 * sum(noise("w", (64, 512), step=s, dtype=torch.float32) for s in range(50))
    change = (weight.detach().float() - 1).flatten()
    assert float(torch.corrcoef(torch.stack([change, expected.flatten()]))[0, 1]) > 0.15
    slope = float(change @ expected.flatten() / (expected.flatten() @ expected.flatten()))
    assert slope == pytest.approx(1.0, abs=0.1)  # rounding to nearest gives 0
    x = torch.full((40000,), 1.0 + 2**-10)
    rounded = round_stochastic(x, torch.bfloat16, torch.Generator().manual_seed(0)).float()
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + 2**-7}
    assert float(rounded.mean() - 1) == pytest.approx(2**-10, rel=0.1)


@pytest.mark.parametrize("what", ["lora", "full", "full bf16"])
def test_memory_is_that_of_the_forward_plus_one_tensor(what):
    shape = dict(vocab_size=512, hidden_size=128, intermediate_size=256)
    model = tiny.llama(dtype=torch.bfloat16 if what == "full bf16" else torch.float32, **shape)
    grafts = [graftwork.attach(model, make_config("adapter", "lora", r=8))] if what == "lora" else []
    parameters = list(grafts[0].named_parameters()) if grafts else list(model.named_parameters())
    batch = batch_of(4, 32)

    step = mezo_step(model, parameters, grafts, n_samples=2)
    largest = max(p.numel() * 4 for _, p in parameters)
    assert peak_of(lambda: step.run([batch], 0), model, batch) <= forward_peak(model, batch) + largest + 4096
    assert sum(p.numel() * p.element_size() for _, p in parameters) > 2 * largest  # a second copy of the weights would show


def test_a_lora_graft_learns_and_only_the_graft_moves():
    model = tiny.llama()
    graft = graftwork.attach(model, make_config("adapter", "lora", r=2, dropout=0.5))
    own = {id(p) for p in graft.parameters()}
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if id(p) not in own}
    model.train()
    step = mezo_step(model, list(graft.named_parameters()), [graft], lr=0.03)
    losses = [float(step.run([batch_of()], k).loss) for k in range(30)]
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.5
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if id(p) not in own)
    assert model.training and all(p.grad is None for p in model.parameters())


def test_micro_batches_enter_one_evaluation():
    """Two micro-batches of a step give the slope of the one large batch, and the loss is the mean of both sides."""
    whole, parts = batch_of(4), None
    ids = tiny.tokens(4, 9, 3).tolist()
    rows = [{"input_ids": row, "labels": [-100] * (3 + i) + row[3 + i:]} for i, row in enumerate(ids)]
    parts = [Collator(0).collate(rows[:2]), Collator(0).collate(rows[2:])]
    results = []
    for batches in ([whole], parts):
        model = tiny.llama()
        results.append(mezo_step(model).run(batches, 0, lr=0.0))
    a, b = (float(r.metrics["projected_gradient"]) for r in results)
    assert a == pytest.approx(b, rel=1e-3) and float(results[0].loss) == pytest.approx(float(results[1].loss), rel=1e-5)
    with torch.no_grad():
        model = tiny.llama()
        plain = float(CausalLMObjective().loss(model, whole, 1 / whole["n_targets"]).loss)
    assert float(results[0].loss) == pytest.approx(plain, abs=0.05)


def test_n_samples_is_the_mean_of_single_directions():
    model, moves = Quadratic(40), []
    MeZOEstimator(MeZO(n_samples=3, eps=1e-3)).step(context(model, lr=1.0))
    mean = model.a.detach()
    for sample in range(3):
        z = torch.cat([noise("a", (20,), sample=sample), noise("b", (2, 10), sample=sample).flatten()])
        moves.append(-(model.g @ z) * z[:20])
    torch.testing.assert_close(mean, torch.stack(moves).mean(0), rtol=1e-6, atol=1e-9)


def test_weight_decay_spares_one_dimensional_tensors():
    model = Quadratic(40)
    model.g.zero_()  # no slope: decay alone moves
    model.a.data.fill_(1.0)
    model.b.data.fill_(1.0)
    MeZOEstimator(MeZO(weight_decay=0.5)).step(context(model, lr=0.1))
    torch.testing.assert_close(model.a.detach(), torch.ones(20, dtype=torch.float64))
    torch.testing.assert_close(model.b.detach(), torch.full((2, 10), 0.95, dtype=torch.float64))


def test_frozen_tensors_stay_and_a_rate_of_zero_is_zero():
    model = Quadratic(40)
    model.a.requires_grad_(False)
    MeZOEstimator(MeZO(lr=1.0)).step(context(model))  # the estimator's own rate
    assert not model.a.any() and model.b.all()
    before = model.b.detach().clone()
    MeZOEstimator(MeZO(lr=1.0)).step(context(model, lr=0.0))
    torch.testing.assert_close(model.b.detach(), before, rtol=0, atol=1e-12)


def test_an_error_in_the_forward_leaves_weights_as_they_were():
    model = tiny.llama(dtype=torch.bfloat16)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}

    def boom(*args):
        raise RuntimeError("boom")

    handle = model.model.layers[1].mlp.register_forward_pre_hook(boom)
    with pytest.raises(RuntimeError, match="boom"):
        mezo_step(model).run([batch_of()], 0)
    handle.remove()
    assert all(torch.equal(p, start[n]) for n, p in model.named_parameters())
    assert not model.lm_head._forward_pre_hooks
