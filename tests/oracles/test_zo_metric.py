"""A metric as the objective: its values against full logits and Python counting, MeZO's scalar by hand, and accuracy that rises."""

from collections import Counter

import pytest
import torch

import graftwork
import tiny
from graftwork.data.collate import Collator
from graftwork.errors import IncompatibleError
from graftwork.estimators.mezo import add_noise
from graftwork.evaluation.metrics import macro_f1
from graftwork.objectives.metric import MetricObjective, overlap
from graftwork.registry import lookup, make_config, methods
from graftwork.training.step import TrainStep

slow = pytest.mark.slow
BY_VALUE = [info.name for info in methods("estimator") if not info.traits["differentiates"]]


def objective(metric="accuracy", **options):
    return MetricObjective(make_config("objective", "metric", metric=metric, **options))


def batch_of(rows=4, length=9, seed=3):
    ids = tiny.tokens(rows, length, seed).tolist()
    labels = [[-100] * (length - 2 - i % 3) + row[length - 2 - i % 3:] for i, row in enumerate(ids)]
    return Collator(0).collate([{"input_ids": row, "labels": each} for row, each in zip(ids, labels)])


def by_hand(model, batch, metric):
    """The mean of m, from the logits of all positions and counting in Python."""
    with torch.no_grad():
        guess = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
    scores, hits = [], []
    for row, labels in enumerate(batch["labels"].tolist()):
        at = [t for t in range(1, len(labels)) if labels[t] != -100]
        wanted, said = [labels[t] for t in at], [int(guess[row, t - 1]) for t in at]
        hits += [a == b for a, b in zip(wanted, said)]
        common = sum((Counter(wanted) & Counter(said)).values())
        scores.append({"exact_match": float(wanted == said), "f1": common / len(at), "accuracy": 0}[metric])
    return sum(hits) / len(hits) if metric == "accuracy" else sum(scores) / len(scores)


def taught(model, batch):
    """The model's own head, so that some of its answers are right: labels are what it says now, every other one."""
    with torch.no_grad():
        guess = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
    ids, labels = batch["input_ids"], batch["labels"].clone()
    for row in range(len(ids)):
        for t in range(1, ids.shape[1]):
            if labels[row, t] != -100 and (row == 0 or (row + t) % 2):
                labels[row, t] = guess[row, t - 1]
    return {k: v for k, v in {**batch, "labels": labels}.items() if k in ("input_ids", "attention_mask", "labels")}


@pytest.mark.parametrize("metric", ["accuracy", "exact_match", "f1"])
def test_values_of_a_causal_model_are_those_of_counting(metric):
    model = tiny.llama()
    batch = taught(model, batch_of())
    each = objective(metric, chunk_tokens=3)
    expected = by_hand(model, batch, metric)
    terms = each.targets(batch)
    with torch.no_grad():
        out = each.loss(model, batch, 1 / terms)
        rows = each.loss(model, batch, torch.full((4,), 1 / terms))
    assert 0 < expected < 1 and float(out.loss) == pytest.approx(1 - expected) == pytest.approx(float(rows.loss))
    assert out.row_tokens.tolist() == each.targets_by_row(batch) and float(out.row_loss.sum()) == pytest.approx(terms * (1 - expected))
    plain = each.evaluate(model, batch)
    if metric != "f1":
        assert float(plain["correct"] / plain["tokens"]) == pytest.approx(expected)


def test_the_overlap_of_bags_is_that_of_counters():
    generator = torch.Generator().manual_seed(2)
    row = torch.randint(0, 5, (200,), generator=generator).sort().values
    said, wanted = (torch.randint(0, 6, (200,), generator=generator) for _ in range(2))
    hit = overlap(said, wanted, row)
    for r in range(5):
        mine = row == r
        assert int(hit[mine].sum()) == sum((Counter(said[mine].tolist()) & Counter(wanted[mine].tolist())).values())
    assert (torch.isin(said[hit], wanted)).all()


@slow
@pytest.mark.parametrize("metric", ["accuracy", "exact_match", "f1"])
def test_values_of_a_score_head(metric):
    model, ids = tiny.bert_classifier(4), tiny.tokens(9, 6, 1)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 2, 2, 1, 0, 0, 2, 1])}
    with torch.no_grad():
        guess = model(input_ids=ids).logits.argmax(-1)
        out = objective(metric).loss(model, batch, 1 / 9)
    expected = macro_f1(guess.tolist(), batch["labels"].tolist()) if metric == "f1" else float((guess == batch["labels"]).float().mean())
    assert float(out.loss) == pytest.approx(1 - expected) and float(out.row_loss.mean()) == pytest.approx(1 - expected)
    real = {**batch, "labels": batch["labels"].float()}
    one = tiny.bert_classifier(1)
    with torch.no_grad():
        if metric == "f1":
            with pytest.raises(IncompatibleError, match="no classes"):
                objective(metric).loss(one, real, 1.0)
        else:
            near = (one(input_ids=ids).logits[:, 0] - real["labels"]).abs() < 0.5
            assert float(objective(metric).loss(one, real, 1 / 9).loss) == pytest.approx(1 - float(near.float().mean()))


@slow
@pytest.mark.parametrize("metric", ["accuracy", "exact_match", "f1"])
def test_mezo_s_scalar_is_the_difference_of_the_metric_by_hand(metric):
    eps, model = 0.02, tiny.llama()
    batch = taught(model, batch_of())
    named = list(model.named_parameters())
    step = TrainStep(model, objective(metric), lookup("estimator", "mezo").cls(make_config("estimator", "mezo", eps=eps)), named, seed=4)
    found = step.run([batch], 0, lr=0.0)
    values = []
    for sign in (1, -1):
        other = tiny.llama()
        for name, p in other.named_parameters():
            add_noise((4, 0, 0), name, p.data, sign * eps)
        values.append(by_hand(other, batch, metric))
    assert values[0] != values[1]
    assert float(found.metrics["projected_gradient"]) == pytest.approx(-(values[0] - values[1]) / (2 * eps), rel=1e-4)
    assert float(found.loss) == pytest.approx(1 - sum(values) / 2, rel=1e-5)


def test_derivatives_of_a_metric_are_refused_and_a_broken_model_is_seen():
    model, batch = tiny.llama(), batch_of()
    with pytest.raises(IncompatibleError, match="no derivative"):
        objective().loss(model, batch, 1.0)
    with torch.no_grad(), torch.autograd.forward_ad.dual_level(), pytest.raises(IncompatibleError, match="no derivative"):
        objective().loss(model, batch, 1.0)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
        for metric in ("accuracy", "exact_match", "f1"):
            assert objective(metric).loss(model, batch, 1.0).loss.isnan()


@slow
@pytest.mark.parametrize("name", BY_VALUE)
def test_every_estimator_of_values_takes_a_metric(name):
    model = tiny.llama()
    graft = graftwork.attach(model, "lora", r=1, target_modules=["q_proj"])
    fields = lookup("estimator", name).config.model_fields
    config = make_config("estimator", name, **{k: v for k, v in {"lr": 1e-3, "eps": 1.0, "max_coordinates": 3}.items() if k in fields})
    step = TrainStep(model, objective(), lookup("estimator", name).cls(config), list(graft.named_parameters()), [graft],
                     optimizer=graftwork.optimizer("sgd", graft.parameters()) if lookup("estimator", name).traits["gradients"] else None)
    losses = [float(step.run([batch_of(seed=k)], k).loss) for k in range(2)]
    assert all(0 <= x <= 1 for x in losses)


@slow
def test_accuracy_rises_on_the_metric_alone():
    model, ids = tiny.bert_classifier(2), tiny.tokens(64, 5, 1)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": (ids[:, 1] % 2 == 0).long()}
    config = make_config("estimator", "mezo", lr=1e-2, eps=3e-2, n_samples=2)
    step = TrainStep(model, objective(), lookup("estimator", "mezo").cls(config), list(model.named_parameters()), seed=4)
    seen = []
    for k in range(40):
        step.run([batch], k)
        with torch.no_grad():
            seen.append(float((model(input_ids=ids).logits.argmax(-1) == batch["labels"]).float().mean()))
    assert max(seen[20:]) > seen[0] + 0.1 and sum(seen[-10:]) / 10 > seen[0] + 0.05, seen


@slow
def test_a_recipe_of_a_metric_plans_and_runs(tmp_path):
    from training_support import completions, folder, labelled, recipe, run

    estimator = {"method": "mezo", "lr": 1e-3, "eps": 1e-1}
    for kind, file in [("llama", completions(tmp_path / "d.jsonl")), ("bert_classifier", labelled(tmp_path / "l.jsonl"))]:
        document = recipe(folder(tmp_path, kind), file, tmp_path / f"{kind}_out", estimator=estimator, optimizer=None,
                          objective={"method": "metric", "metric": "f1"}, train={"max_steps": 2})
        assert not graftwork.plan(document, estimate_time=False).notes
        assert 0 <= run(document).loss <= 1
