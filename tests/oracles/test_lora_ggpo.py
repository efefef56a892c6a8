"""LoRA-GGPO against autograd at weights that are really perturbed, in float64; its scales against the dense formula."""

import math

import pytest
import torch
from torch import nn

import graftwork
import tiny
from graftwork.data.collate import Collator
from graftwork.errors import IncompatibleError, UsageError
from graftwork.estimators import lora_ggpo
from graftwork.estimators.backprop import BackpropEstimator
from graftwork.estimators.base import StepContext
from graftwork.estimators.lora_ggpo import LoRAGGPO, LoRAGGPOEstimator, Noise, blocks
from graftwork.modeling.state import state_of
from graftwork.objectives.base import LossOutput
from graftwork.objectives.causal_lm import CausalLMObjective
from graftwork.recipe import load_recipe
from graftwork.recipe_rules import reasons_against
from graftwork.training.step import TrainStep
from training_support import completions, folder, recipe


def batch_of(rows=2, length=9, seed=3):
    ids = tiny.tokens(rows, length, seed).tolist()
    return Collator(0).collate([{"input_ids": row, "labels": [-100] * (3 + i) + row[3 + i:]} for i, row in enumerate(ids)])


class Exact:
    """Cross-entropy in the model's own dtype throughout."""

    @staticmethod
    def loss(model, batch, scale):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100) * scale
        return LossOutput(loss, loss.detach()[None], torch.ones(1))


def grafted(build=tiny.llama, targets=("q_proj", "down_proj"), dtype=torch.float64, seed=5, **options):
    """A LoRA away from its start, so that both of its factors have gradients."""
    model = build(dtype=dtype)
    graft = graftwork.attach(model, "lora", **{"r": 3, "alpha": 6, "target_modules": list(targets), **options})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in graft.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
            p.data = p.data.to(dtype)
    return model.train(), graft


def context(model, graft, batches, step=0, optimizer=None):
    parameters = list(graft.named_parameters()) if graft else list(model.named_parameters())
    return StepContext(model, Exact(), parameters, batches, [1 / len(batches)] * len(batches), state_of(model), step, 7, 1e-2, optimizer)


def gradients(ctx, estimator):
    for _, p in ctx.parameters:
        p.grad = None
    estimator.step(ctx)
    return {n: p.grad.clone() for n, p in ctx.parameters if p.grad is not None}


def noise_of(site, step, micro, width, like, seed=7):
    holder = graftwork.modeling.state.StateHolder()
    with holder.scope(seed=seed, step=step, micro=micro):
        key = holder.generator(f"{site}/ggpo").initial_seed()
    return torch.cat([eps for _, eps in blocks(key, width, like)])


@pytest.mark.parametrize("build, targets", [(tiny.llama, ("q_proj", "down_proj")), (tiny.gpt2, ("q", "v", "c_fc"))])
def test_gradients_are_those_at_weights_that_are_really_perturbed(build, targets, monkeypatch):
    """Two micro-batches with noise of their own; the fused, transposed projection of GPT-2 by its slices."""
    monkeypatch.setattr(lora_ggpo, "BLOCK", 300)  # several blocks a matrix
    model, graft = grafted(build, targets)
    batches = [batch_of(), batch_of(3, 8, 4)]
    estimator = LoRAGGPOEstimator(LoRAGGPO(sigma=0.5, beta=0.1))
    plain = gradients(context(model, graft, batches), BackpropEstimator(None))
    first = gradients(context(model, graft, batches), estimator)
    assert all(torch.equal(plain[n], first[n]) for n in plain)  # nothing to go by yet
    scales = {k: c.double() for k, c in estimator.state_dict().items()}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    got = gradients(context(model, graft, batches, 1), estimator)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    wanted = {n: torch.zeros_like(g) for n, g in got.items()}
    for micro, batch in enumerate(batches):
        for name, site in graft.sites.items():
            W = site.product.dense()
            E = scales[f"default/{name}"][:, None] * noise_of(name, 1, micro, site.out_features, W)
            with torch.no_grad():
                W.add_(E)  # a view of the parameter
        for n, g in gradients(context(model, graft, [batch], 1), BackpropEstimator(None)).items():
            wanted[n] += g / 2
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_(before[n])
    for n in got:
        torch.testing.assert_close(got[n], wanted[n], rtol=1e-9, atol=1e-12)
    worst = max(float((got[n] - plain[n]).norm() / plain[n].norm()) for n in got)
    assert worst > 0.05  # and the perturbation matters


@pytest.mark.parametrize("initializer", [None, "pissa"])
def test_scales_are_the_dense_formula(initializer):
    model, graft = grafted(dtype=torch.float32, initializer=initializer)
    estimator = LoRAGGPOEstimator(LoRAGGPO(sigma=0.2, beta=3.0))
    grads = gradients(context(model, graft, [batch_of()]), estimator)
    graft.model.requires_grad_(False)
    for name, adapter in graft.adapters.items():
        W, s = graft.sites[name].product.dense().double(), adapter.scale
        B, A = adapter.lora_B.double(), adapter.lora_A.double()
        change = s * B @ A - (0 if initializer is None else adapter.lora_B0.double() @ adapter.lora_A0.double())
        G = s * (B @ grads[f"{name}.lora_A"].double() + grads[f"{name}.lora_B"].double() @ A)
        mean = W.norm(dim=1).mean()
        c = (0.2 * (mean**2 + change.square().sum(1)).sqrt() + 3.0 * G.square().sum(1)) / math.sqrt(W.shape[0])
        torch.testing.assert_close(estimator.state_dict()[f"default/{name}"].double(), c, rtol=1e-4, atol=1e-7)
        weight_part = 0.2 * (mean**2 + change.square().sum(1)).sqrt() / math.sqrt(W.shape[0])
        assert float((c - weight_part).max() / weight_part.max()) > 1e-3  # beta shows


def test_full_tuning_goes_by_the_rows_of_each_map_and_its_own_gradient():
    model = tiny.gpt2().requires_grad_(True).train()
    estimator = LoRAGGPOEstimator(LoRAGGPO(sigma=0.2, beta=3.0))
    gradients(context(model, None, [batch_of()]), estimator)
    scales = estimator.state_dict()
    assert len(scales) == 4 * tiny.LAYERS and not any("lm_head" in k for k in scales)
    conv = model.transformer.h[0].mlp.c_fc
    c = (0.2 * conv.weight.norm(dim=0) + 3.0 * conv.weight.grad.square().sum(0)) / math.sqrt(conv.weight.shape[1])
    torch.testing.assert_close(scales["transformer.h.0.mlp.c_fc"], c.detach(), rtol=1e-4, atol=1e-7)


def test_rows_of_the_noise_have_their_variance_and_every_clock_its_own():
    c = torch.linspace(0.1, 2.0, 8)
    samples = torch.stack([Noise.apply(torch.eye(500), c, seed).T for seed in range(20)])  # x = I: the noise is E^T
    torch.testing.assert_close(samples.var(dim=(0, 2)), c.square(), rtol=0.05, atol=0)
    assert abs(float(samples.mean())) < 0.02
    assert abs(float(torch.corrcoef(samples.flatten(1))[~torch.eye(20, dtype=torch.bool)].abs().max())) < 0.1
    keys = [(0, 0), (0, 1), (1, 0)]
    drawn = [noise_of("a", *key, 8, torch.eye(500)) for key in keys] + [noise_of("b", 0, 0, 8, torch.eye(500))]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_autograd_of_the_noise():
    x, c = torch.randn(3, 5, dtype=torch.float64, requires_grad=True), torch.rand(4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: Noise.apply(x, c, 11), (x,))
    rows = torch.rand(3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: Noise.apply(x, rows, 11), (x,))


def trained(estimator, steps=4, **options):
    model = tiny.llama()
    graft = graftwork.attach(model, "lora", r=2, dropout=0.1, **options)
    groups = [{k: v for k, v in g.items() if k != "names"} for g in graft.parameter_groups()]
    step = TrainStep(model.train(), CausalLMObjective(), estimator, list(graft.named_parameters()), [graft], (),
                     graftwork.optimizer("adamw", groups, lr=1e-2), 1.0, (), steps, 3)
    results = [step.run([batch_of(seed=k), batch_of(3, 7, k + 50)], k) for k in range(steps)]
    return model, graft, results


@pytest.mark.slow
def test_without_noise_training_is_that_of_backprop_to_the_last_bit_and_each_option_shows():
    _, plain, _ = trained(BackpropEstimator(None))
    _, same, results = trained(LoRAGGPOEstimator(LoRAGGPO(sigma=0, beta=0)))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), same.parameters()))
    assert [float(r.metrics["perturbation"]) for r in results] == [0] * 4
    for options in ({"sigma": 0.1, "beta": 0}, {"sigma": 0, "beta": 0.1}):
        model, other, results = trained(LoRAGGPOEstimator(LoRAGGPO(**options)))
        assert any(not torch.equal(a, b) for a, b in zip(plain.parameters(), other.parameters()))
        assert float(results[0].metrics["perturbation"]) == 0 < float(results[-1].metrics["perturbation"])
        fresh = tiny.llama()
        assert all(torch.equal(p, model.get_parameter(n)) for n, p in fresh.named_parameters())


def test_evaluation_after_training_is_the_plain_model():
    model, graft, _ = trained(LoRAGGPOEstimator(LoRAGGPO(sigma=1.0)))
    pairs, _ = graft.to_lora()
    fresh = tiny.llama()
    with torch.no_grad():
        for name, (B, A) in pairs.items():
            fresh.get_submodule(name).weight += B @ A
        torch.testing.assert_close(model.eval()(tiny.tokens()).logits, fresh(tiny.tokens()).logits, atol=1e-5, rtol=1e-5)
    assert not any(m._forward_hooks for m in model.modules())


def test_references_without_gradients_and_failed_steps_are_left_alone():
    model, graft = grafted(dtype=torch.float32)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    estimator = LoRAGGPOEstimator(LoRAGGPO(sigma=1.0))
    gradients(context(model, graft, [batch_of()]), estimator)
    with torch.no_grad():
        plain = model(tiny.tokens()).logits
        with graft.disabled():
            bare = model(tiny.tokens()).logits

    class Watching(Exact):
        @staticmethod
        def loss(model, batch, scale):
            with torch.no_grad():
                assert torch.equal(model(tiny.tokens()).logits, plain)
            with graft.disabled():
                torch.testing.assert_close(model(tiny.tokens()).logits, bare)
            assert not torch.allclose(model(tiny.tokens()).logits, plain)
            raise RuntimeError("boom")

    ctx = context(model, graft, [batch_of()], 1)
    ctx.objective = Watching()
    with pytest.raises(RuntimeError, match="boom"):
        estimator.step(ctx)
    assert all(torch.equal(p, start[n]) for n, p in model.named_parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_activation_checkpointing_repeats_the_noise():
    found = []
    for checkpointing in (False, True):
        model, graft = grafted()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=state_of(model).checkpoint_kwargs())
        estimator = LoRAGGPOEstimator(LoRAGGPO(sigma=0.5))
        gradients(context(model, graft, [batch_of()]), estimator)
        found.append(gradients(context(model, graft, [batch_of()], 1), estimator))
    for n in found[0]:
        torch.testing.assert_close(found[0][n], found[1][n], rtol=1e-10, atol=1e-13)


def test_rows_of_a_fleet_are_perturbed_by_their_own_scales():
    """Adapter a's gradient does not depend on b's scale, and equals that of a alone in the same rows."""
    def build(scale_of_b):
        model, a = grafted(dtype=torch.float64, name="a")
        b = graftwork.attach(model, "lora", name="b", r=2, target_modules=["q_proj"])
        parameters = [(f"{g.name}/{n}", p) for g in (a, b) for n, p in g.named_parameters()]
        estimator = LoRAGGPOEstimator(LoRAGGPO(sigma=0.5))
        batch = {**batch_of(4), "rows": ["a", "b", None, "a"]}
        ctx = StepContext(model, Sums(), parameters, [batch], [1.0], state_of(model), 1, 7, 1e-2)
        targets = lora_ggpo.targets(ctx)
        estimator.load_state_dict({t.key: torch.full((t.site.out_features,), 0.05 if t.graft == "a" else scale_of_b)
                                   for t in targets})
        return gradients(ctx, estimator)

    class Sums:
        @staticmethod
        def loss(model, batch, scale):
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            rows = logits.square().mean((1, 2))
            return LossOutput(rows.sum(), rows.detach(), torch.ones(4))

    quiet, loud = build(0.0), build(0.3)
    assert all(torch.equal(quiet[n], loud[n]) == n.startswith("a/") for n in quiet if quiet[n].any())
    assert any(quiet[n].any() for n in quiet if n.startswith("b/"))


def test_quantized_bases_are_perturbed_in_the_product(tmp_path):
    tiny.save(tiny.llama(), tmp_path / "base")
    model = graftwork.load(tmp_path / "base", storage="nf4", dtype="fp32")[0].train()
    graft = graftwork.attach(model, "lora", r=2)
    codes = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    estimator = LoRAGGPOEstimator(LoRAGGPO(sigma=0.3))
    losses = [float(estimator.step(context(model, graft, [batch_of()], k)).loss) for k in (0, 1, 2)]
    assert len(set(losses)) == 3 and all(torch.equal(model.get_parameter(n), p) for n, p in codes.items())


@pytest.mark.slow
def test_a_plan_sees_the_blocks_and_the_state(tmp_path):
    document = recipe(folder(tmp_path), completions(tmp_path / "d.jsonl"), tmp_path / "o", estimator="lora_ggpo")
    made = graftwork.plan(document, estimate_time=False)
    plain = graftwork.plan({**document, "estimator": "backprop"}, estimate_time=False)
    assert not made.notes and made.categories["optimizer_state"] == plain.categories["optimizer_state"]
    assert made.peak_bytes > plain.peak_bytes


def test_refusals():
    model = tiny.llama()
    graft = graftwork.attach(model, "nola")
    with pytest.raises(IncompatibleError, match="factors of lora, not of 'nola'"):
        LoRAGGPOEstimator().step(context(model, graft, [batch_of()]))
    model = tiny.mixtral()
    graft = graftwork.attach(model, "lora", r=2)
    with pytest.raises(IncompatibleError, match="experts"):
        LoRAGGPOEstimator().step(context(model, graft, [batch_of()]))
    model, graft = grafted()
    fused = type("Fused", (), {"config": type("Config", (), {"fused": True})})
    with pytest.raises(UsageError, match="fused"):
        LoRAGGPOEstimator().step(context(model, graft, [batch_of()], optimizer=fused))
    plain = {"model": "m", "adapter": "lora", "data": {"train": "d"}, "output_dir": "o", "estimator": "lora_ggpo"}
    assert reasons_against(load_recipe(plain, check=False)) == []
    for more, words in [({"adapter": "paca"}, "trains lora, not paca"),
                        ({"optimizer": {"method": "adamw", "fused": True}, "train": {"max_grad_norm": 0}}, "inside backward")]:
        found = reasons_against(load_recipe({**plain, **more}, check=False))
        assert [(s, words in why) for s, why, _ in found] == [("estimator", True)], found


@pytest.mark.slow
def test_it_ends_where_the_loss_is_flatter():
    """An over-parameterized LoRA on a few rows: trained to a like loss, random changes of one size raise ours less."""
    def sharpness(estimator):
        model = tiny.llama()
        graft = graftwork.attach(model, "lora", r=32)
        groups = [{k: v for k, v in g.items() if k != "names"} for g in graft.parameter_groups()]
        step = TrainStep(model.train(), CausalLMObjective(), estimator, list(graft.named_parameters()), [graft], (),
                         graftwork.optimizer("adamw", groups, lr=5e-3), 1.0, (), 60, 3)
        for k in range(60):
            step.run([batch_of(4, 12, 1)], k)
        model.eval()

        def loss():
            with torch.no_grad():
                return float(CausalLMObjective().loss(model, batch_of(4, 12, 1), 1 / 30).loss)

        found, generator = [], torch.Generator().manual_seed(9)
        plain, kept = loss(), {n: s.module.weight.detach().clone() for n, s in graft.sites.items()}
        for _ in range(8):
            for n, site in graft.sites.items():
                z = torch.randn(kept[n].shape, generator=generator)
                site.module.weight.data = kept[n] + 0.1 * kept[n].norm() / z.norm() * z
            found.append(loss())
        return plain, sum(found) / 8 - plain

    plain, ours = sharpness(BackpropEstimator(None)), sharpness(LoRAGGPOEstimator(LoRAGGPO(sigma=0.05, beta=0.0)))
    assert abs(ours[0] - plain[0]) < 0.05 and ours[1] < 0.6 * plain[1]
