"""Distillation against whole logits in float64 and autograd, its teacher in runs and plans, and INT2.1's correction of a 2-bit base."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from graftwork.adapters.attach import attach
from graftwork.errors import GraftworkError, IncompatibleError, UsageError
from graftwork.objectives.causal_lm import CausalLM, CausalLMObjective
from graftwork.objectives.distill import Distill, DistillObjective
from graftwork.recipe import load_recipe
from graftwork.registry import lookup, make_config
from graftwork.storage import apply_storage


def pair(make=tiny.llama, **options):
    """(student, teacher) of other weights, and the objective."""
    student, teacher = make(initializer_range=0.3), make(initializer_range=0.3)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(4)) * 0.05)
    objective = DistillObjective(Distill(**options))
    objective.teach(teacher, student)
    return student, teacher, objective


def batch_of(rows=3, width=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, tiny.VOCAB, (rows, width), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    keep = (torch.rand(ids.shape, generator=generator) < 0.7) & mask.bool()
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(keep, ids, -100)}


def terms_of(student, teacher, batch, kl, ce, tau):
    """(rows, width - 1) in float64 from all logits; zero where untrained."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    z, t = student(**inputs).logits.double()[:, :-1], teacher(**inputs).logits.double()[:, :-1].detach()
    p, q = (F.softmax(each / tau, -1) for each in (t, z))
    divergence = tau**2 * (p * (p.log() - q.log())).sum(-1)
    labels = batch["labels"][:, 1:]
    plain = -F.log_softmax(z, -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return (kl * divergence + ce * plain) * (labels != -100), divergence, labels != -100


@pytest.mark.parametrize(("make", "kl", "ce", "tau"), [
    (tiny.llama, 1.0, 0.1, 1.0), pytest.param(tiny.gpt2, 0.7, 0.0, 2.0, marks=pytest.mark.slow),
    pytest.param(tiny.llama, 2.0, 1.0, 3.0, marks=pytest.mark.slow)])
def test_values_and_gradients(make, kl, ce, tau):
    student, teacher, objective = pair(make, kl=kl, ce=ce, temperature=tau, chunk_tokens=4)
    batch, scale = batch_of(), torch.tensor([0.5, 0.1, 0.3])
    expected, divergence, trained = terms_of(student, teacher, batch, kl, ce, tau)
    out = objective.loss(student, batch, scale)
    torch.testing.assert_close(out.row_loss.double(), expected.sum(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.loss.double(), (expected.sum(1) * scale).sum(), rtol=1e-4, atol=1e-5)
    assert torch.equal(out.row_tokens, trained.sum(1)) and objective.targets(batch) == int(trained.sum())
    torch.testing.assert_close(out.metrics["kl"].double(), divergence[trained].mean(), rtol=1e-4, atol=1e-6)
    names = [n for n, _ in student.named_parameters()]
    wanted = torch.autograd.grad((expected.sum(1) * scale).sum(), list(student.parameters()))
    found = torch.autograd.grad(out.loss, list(student.parameters()))
    for name, ours, theirs in zip(names, found, wanted):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5 * float(theirs.abs().max() + 1), msg=name)
    assert not any(p.requires_grad for p in teacher.parameters()) and not teacher.training
    plain = CausalLMObjective(CausalLM()).evaluate(student, batch)
    torch.testing.assert_close(objective.evaluate(student, batch), plain)


def test_a_chunk_of_logits_at_a_time_and_what_is_refused():
    student, _, objective = pair(lambda **more: tiny.llama(vocab_size=131, **more), chunk_tokens=4)
    largest, width = [], student.config.hidden_size

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest.extend(t.numel() for t in (out if isinstance(out, tuple) else (out,))
                           if isinstance(t, torch.Tensor) and t.dim() and t.shape[-1] == 131 and t.shape[0] != width)  # the head itself
            return out

    with Watch():
        objective.loss(student, batch_of(4, 30)).loss.backward()
    assert max(largest) == 4 * 131
    same = objective.loss(copy.deepcopy(objective.teacher).requires_grad_(), batch_of())
    assert abs(float(same.metrics["kl"])) < 1e-6
    with pytest.raises(IncompatibleError, match="vocabulary"):
        objective.teach(tiny.llama(), student)
    with pytest.raises(UsageError, match="no teacher"):
        DistillObjective().loss(student, batch_of())
    with pytest.raises(GraftworkError, match="causal_lm"):
        make_config("objective", "distill", kl=0)


@pytest.mark.slow
def test_int2_1_undoes_more_than_the_residual_s_best_factors():
    """On other tokens: KL of a 2-bit base, of the base with the best factors of what it lost, and after LREC at the same rank."""
    def dense():
        return tiny.llama(initializer_range=0.3, hidden_size=32, intermediate_size=48)

    codes = {"method": "int2", "group_size": 16}
    objective = DistillObjective(Distill(ce=0.0))
    held = [{"input_ids": tiny.tokens(8, 24, seed=50 + i), "labels": tiny.tokens(8, 24, seed=50 + i)} for i in range(2)]

    @torch.no_grad()
    def divergence(model):
        objective.teach(dense(), model)
        return sum(float(objective.loss(model.eval(), batch).metrics["kl"]) for batch in held) / len(held)

    model = apply_storage(dense(), make_config("storage", "int2", group_size=16))
    graft = attach(model, lookup("adapter", "lora").config(r=8, alpha=32, target_modules="all-linear"), seed=0)
    before = divergence(model)
    best = divergence(apply_storage(dense(), make_config("storage", "lowrank_plus", base=codes, r=8, init="lorc")))
    objective.teach(dense(), model)
    optimizer = torch.optim.AdamW(graft.parameters(), lr=5e-3)
    model.train()
    seen = []
    for step in range(120):
        ids = tiny.tokens(8, 24, seed=1000 + step)
        out = objective.loss(model, {"input_ids": ids, "labels": ids}, 1 / (8 * 23))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        seen.append(float(out.metrics["kl"]))
    assert sum(seen[-10:]) < 0.6 * sum(seen[:10])
    assert divergence(model) < 0.6 * before and divergence(model) < 0.8 * best


@pytest.mark.slow
def test_a_run_and_its_plan(tmp_path):
    from graftwork.planning.simulate import plan
    from graftwork.training.run import train_recipe

    folder = tiny.save(tiny.llama(initializer_range=0.3), tmp_path / "m")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"text": "the answer to question {i} is {i * 7 % 31}."}}\n' for i in range(24)))
    document = {"model": str(folder), "storage": {"method": "int2", "group_size": 16}, "adapter": {"method": "lora", "r": 4},
                "objective": "int2_1", "optimizer": {"method": "adamw", "lr": 0.01}, "output_dir": str(tmp_path / "run"),
                "data": {"train": str(rows), "eval": str(rows), "train_on": "all", "max_length": 24},
                "train": {"max_steps": 12, "batch_size": 4, "precision": "fp32", "logging_steps": 1}}
    train_recipe(load_recipe(document), quiet=True)
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [row["kl"] for row in log if "kl" in row]
    assert len(found) > 8 and sum(found[-3:]) < sum(found[:3])
    ours, plain = (plan(load_recipe({**document, "objective": name}), estimate_time=False) for name in ("distill", "causal_lm"))
    teacher = sum(p.numel() * 4 for p in set(tiny.llama().parameters()))
    assert ours.categories["weights"] - plain.categories["weights"] == pytest.approx(teacher, rel=0.01)
    assert any("teacher" in note for note in ours.notes)
    with pytest.raises(GraftworkError, match="its own teacher"):
        load_recipe({**document, "storage": "dense", "objective": {"method": "distill", "ce": 0}})


@pytest.mark.slow
def test_the_teacher_is_the_one_that_is_named(tmp_path):
    from graftwork.compression.quantize import quantize
    from graftwork.training.build import build_grafts, build_model, build_step

    own, other = tiny.save(tiny.llama(), tmp_path / "own"), tiny.save(tiny.llama(initializer_range=0.3), tmp_path / "other")
    quantize(own, tmp_path / "codes", storage={"method": "int2", "group_size": 16})
    document = {"model": str(own), "storage": "int4", "objective": "distill", "data": {"train": "absent.jsonl"},
                "train": {"precision": "fp32"}, "output_dir": str(tmp_path / "run")}

    def teacher(**more):
        recipe = load_recipe({**document, **more})
        model, _ = build_model(recipe)
        return build_step(recipe, model, build_grafts(recipe, model), 5).objective.teacher

    named = {"objective": {"method": "distill", "teacher": str(other)}}
    codes = {"model": str(tmp_path / "codes"), "storage": "dense"}
    for found, folder in ((teacher(), own), (teacher(**named), other), (teacher(**named, **codes), other)):
        wanted = tiny.llama(initializer_range=0.3) if folder == other else tiny.llama()
        torch.testing.assert_close(found.model.layers[0].mlp.up_proj.weight, wanted.model.layers[0].mlp.up_proj.weight, check_stride=False)
        assert not any(p.requires_grad for p in found.parameters())
    with pytest.raises(GraftworkError, match="the teacher is to be the dense model"):
        load_recipe({**document, **codes})
