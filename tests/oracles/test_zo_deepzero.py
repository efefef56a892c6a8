"""DeepZero against autograd, its restarted forwards against whole ones, masks, and ZO-GraSP in closed form."""

import pytest
import torch
from torch import nn

import graftwork
import tiny
from graftwork.data.collate import Collator
from graftwork.estimators.base import StepContext
from graftwork.estimators.deepzero import DeepZero, DeepZeroEstimator
from graftwork.estimators.mezo import add_noise
from graftwork.modeling.state import StateHolder, state_of
from graftwork.objectives.base import LossOutput
from graftwork.objectives.causal_lm import CausalLMObjective
from memory_support import forward_peak, peak_of

slow = pytest.mark.slow


class Exact:
    """The causal loss in the dtype of the model; counts its evaluations."""

    def __init__(self):
        self.calls = 0

    def loss(self, model, batch, scale):
        self.calls += 1
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
        return LossOutput(loss, loss.detach()[None], torch.ones(1))


def batch_of(rows=2, length=7, seed=3):
    ids = tiny.tokens(rows, length, seed).tolist()
    return Collator(0).collate([{"input_ids": row, "labels": [-100] * (3 + i) + row[3 + i:]} for i, row in enumerate(ids)])


def measured(model, named, objective=None, step=0, batches=None, each=None, **options):
    each = each or DeepZeroEstimator(DeepZero(**{"ratios": "uniform", **options}))
    ctx = StepContext(model, objective or CausalLMObjective(), named, batches or [batch_of()], [0.1] * len(batches or [0]),
                      state_of(model), step, 4)
    result = each.step(ctx)
    return {n: p.grad for n, p in named if p.grad is not None}, result, each


@slow
def test_differences_of_all_coordinates_are_autograd_s_gradient_at_one_forward_each():
    model = tiny.llama(dtype=torch.float64)
    graft = graftwork.attach(model, "lora", r=1, target_modules=["q_proj"])
    for p in graft.parameters():
        p.data = p.data.double()
    named = list(graft.named_parameters())
    with torch.no_grad():
        for _, p in named:
            p.add_(0.05)
    objective, size = Exact(), sum(p.numel() for _, p in named)
    exact = torch.autograd.grad(objective.loss(model, batch_of(), 1.0).loss, [p for _, p in named])
    objective.calls = 0
    found, _, each = measured(model, named, objective, sparsity=0, eps=1e-4, max_coordinates=None)
    assert objective.calls == size + 2 and each._restarts  # the mask, the base, and once the comparison of a restart
    a, b = torch.cat([g.flatten() for g in exact]), torch.cat([found[n].flatten() for n, _ in named])
    assert float(torch.cosine_similarity(a, b, 0)) > 0.999
    assert float((a - b).norm() / a.norm()) < 5e-2  # the norms of the model compute in fp32
    objective.calls = 0
    measured(model, named, objective, step=1, each=each)
    assert objective.calls == size + 1


@slow
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_restarted_losses_are_identical_and_run_fewer_blocks(kind):
    found, runs = [], []
    for reuse in (True, False):
        model = getattr(tiny, kind)()
        model.requires_grad_(True)
        named, calls = list(model.named_parameters()), [0]
        first = (model.model.layers if kind == "llama" else model.transformer.h)[0]
        (first.mlp).register_forward_hook(lambda *_, calls=calls: calls.__setitem__(0, calls[0] + 1))
        grads, result, each = measured(model, named, batches=[batch_of(), batch_of(3, seed=5)], sparsity=0.5, max_coordinates=60,
                                       reuse=reuse)
        found.append((grads, result.loss))
        runs.append(calls[0])
    assert torch.equal(found[0][1], found[1][1]) and all(torch.equal(g, found[1][0][n]) for n, g in found[0][0].items())
    assert runs[0] < 0.75 * runs[1] and sum(int((g != 0).sum()) for g in found[0][0].values()) > 30
    assert not [m for m in model.modules() if "forward" in m.__dict__] and len(found[0][0]) == len(named)


def test_a_model_whose_blocks_add_terms_is_run_whole():
    model = tiny.llama()
    model.config.output_router_logits = True
    named = [("norm", model.model.norm.weight.requires_grad_(True))]
    assert measured(model, named, sparsity=0.9)[2]._restarts is False


@slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_last_an_interval_are_swept_and_values_come_back(dtype):
    model = tiny.llama(dtype=dtype)
    named = [(n, p.requires_grad_(True)) for n, p in model.named_parameters() if "1.self_attn.k_proj" in n or n.endswith("norm.weight")]
    before = {n: p.detach().clone() for n, p in named}
    each = DeepZeroEstimator(DeepZero(ratios="uniform", sparsity=0.98, interval=3, max_coordinates=20, eps=5e-2))
    total = sum(max(1, round(0.02 * p.numel())) for _, p in named)
    stride = -(-total // 20)
    assert stride == 3
    sets = []
    for step in range(2 * stride):
        ctx = StepContext(model, CausalLMObjective(), named, [batch_of()], [0.1], state_of(model), step, 4)
        sets.append({(n, int(i)) for (n, p), (q, index) in zip(named, each_coordinates(each, ctx, named)) for i in index})
        assert len(sets[-1]) in (total // stride, total // stride + 1)
    assert len(set.union(*sets[:3])) == total == sum(map(len, sets[:3])) and len(set.union(*sets)) > 1.7 * total
    grads, _, _ = measured(model, named, each=each)
    flat = {(n, i) for n, g in grads.items() for i, x in enumerate(g.flatten().tolist()) if x}
    assert flat <= sets[0] and len(flat) > len(sets[0]) // 2
    assert all(torch.equal(p, before[n]) for n, p in named)


def each_coordinates(each, ctx, named):
    each.counts = each.counts or each._counts(ctx, named)
    return each.coordinates(ctx, named)


class Bowl(nn.Module):
    """L = sum d theta^2 / 2 over a tensor with values and one of zeros."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.a = nn.Parameter(torch.randn(5, 8, generator=generator, dtype=torch.float64))
        self.c = nn.Parameter(torch.randn(30, generator=generator, dtype=torch.float64) * 3)
        self.b = nn.Parameter(torch.zeros(20, dtype=torch.float64))
        self.d = torch.rand(90, generator=generator, dtype=torch.float64) + 0.5

    @staticmethod
    def loss(model, batch, scale):
        flat = torch.cat([p.flatten() for p in model.parameters()])
        value = (model.d * flat.square()).sum() / 2
        return LossOutput(value, value.detach()[None], torch.ones(1))


def test_grasp_scores_in_closed_form_keep_their_sign():
    eps, samples = 1e-2, 7
    model = Bowl()
    named = list(model.named_parameters())
    ctx = StepContext(model, Bowl, named, [{}], [1.0], StateHolder(), 0, 4)
    theta, draws = torch.cat([p.detach().flatten() for _, p in named]), []
    for q in range(samples):
        parts = [torch.zeros_like(p) for _, p in named]
        for (n, _), z in zip(named, parts):
            add_noise((4, "grasp", q), n, z, 1.0)
        draws.append(torch.cat([z.flatten() for z in parts]))
    g0 = sum(u * ((model.d * theta) @ u + eps / 2 * (model.d * u) @ u) for u in draws) / samples
    hg = sum(u * ((model.d * g0) @ u) for u in draws) / samples
    counts = {}
    for score in ("signed", "absolute"):
        each = DeepZeroEstimator(DeepZero(eps=eps, grasp_samples=samples, score=score, sparsity=0.8))
        found = torch.cat([s.flatten() for s in each.scores(ctx, named).values()])
        expected = -theta * hg if score == "signed" else (theta * hg).abs()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
        top = expected[:70].topk(14).indices
        counts[score] = each._counts(ctx, named)
        assert counts[score] == {"a": max(1, int((top < 40).sum())), "c": max(1, int((top >= 40).sum())), "b": 4}
    assert (found >= 0).all() and torch.equal(torch.cat([p.detach().flatten() for _, p in named]), theta)


@slow
def test_a_recipe_plans_within_memory_and_runs_with_an_optimizer(tmp_path):
    from training_support import completions, folder, recipe, run

    estimator = {"method": "deepzero", "max_coordinates": 4, "grasp_samples": 2, "sparsity": 0.5}
    document = recipe(folder(tmp_path), completions(tmp_path / "d.jsonl"), tmp_path / "o", estimator=estimator,
                      adapter={"method": "lora", "r": 2, "target_modules": ["v_proj"]}, train={"max_steps": 3})
    assert not graftwork.plan(document, estimate_time=False).notes
    assert run(document).steps == 3


@slow
def test_memory_is_the_forward_the_outputs_of_blocks_the_gradient_and_a_permutation():
    model = tiny.llama(vocab_size=512)
    named, batch = list(model.requires_grad_(True).named_parameters()), batch_of(4, 32)
    each = DeepZeroEstimator(DeepZero(max_coordinates=30, grasp_samples=2, sparsity=0.9))
    size, largest = (f(p.numel() for _, p in named) for f in (sum, max))
    records, plain = len(model.model.layers) * 4 * 32 * tiny.HIDDEN * 4, forward_peak(model, batch)
    for at, once in ((0, 4 * size * 4), (1, 0)):  # ZO-GraSP: the values, those shifted, two estimates
        found = peak_of(lambda at=at: measured(model, named, step=at, batches=[batch], each=each), model, batch)
        assert found <= plain + records + size * 4 + 16 * largest + once + 4096
        assert once or found > plain + size * 4
        for _, p in named:
            p.grad = None
