"""The trainer and its runs, on tiny models: every option of the train section has an effect that is seen here."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

import graftwork
import tiny
from graftwork.errors import DataError, GraftworkError, TrainingError, UsageError
from graftwork.evaluation.targets import find_target
from graftwork.files import FileLock
from graftwork.modeling.state import state_of
from graftwork.recipe import load_recipe
from graftwork.registry import make_config
from graftwork.training import checkpoint as ckpt
from graftwork.training.batches import FleetBatches, StepBatches, heaviest_step
from graftwork.training.build import build_grafts, build_model, build_step, trained_parameters
from graftwork.training.callbacks import Interrupt
from graftwork.training.schedule import GroupSchedule, factor
from graftwork.training.trainer import GraftTrainer
from training_support import assert_identical, completions, folder, labelled, log_of, recipe, run, tensors_of, words, write_rows


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def llama(base):
    return folder(base, "llama")


@pytest.fixture
def rows(tmp_path):
    return completions(tmp_path / "rows.jsonl")


def parts_of(document, steps=6):
    """(recipe, model, grafts, step, batches) as a run builds them."""
    from graftwork.data import build_splits

    made = load_recipe(document)
    model, tokenizer = build_model(made)
    data, _ = build_splits(made.data, tokenizer, seed=made.train.seed)
    grafts = build_grafts(made, model)
    batches = StepBatches(data, data.collator(), made.train.batch_size, made.train.grad_accumulation, steps, made.train.seed)
    return made, model, grafts, build_step(made, model, grafts, steps), batches


# -- one step ---------------------------------------------------------------------------------------------------------
def gradients(document):
    _, _, _, step, batches = parts_of(document)
    step.max_grad_norm = 0
    result = step.compute(batches[0], 0)
    counts = [b["n_targets"] for b in batches[0]]
    return {n: p.grad.clone() for n, p in step.parameters}, float(result.loss), counts


def test_accumulation_equals_one_large_batch(llama, rows, tmp_path):
    document = recipe(llama, rows, tmp_path / "o", adapter={"method": "lora", "r": 4, "use_rslora": True})
    small, loss_small, counts = gradients({**document, "train": {**document["train"], "batch_size": 2, "grad_accumulation": 4}})
    large, loss_large, _ = gradients({**document, "train": {**document["train"], "batch_size": 8}})
    assert len(counts) == 4 and len(set(counts)) > 1  # unequal token counts, or a mean of means would pass
    assert loss_small == pytest.approx(loss_large, rel=1e-6)
    assert any(float(g.abs().max()) > 1e-3 for g in large.values())
    for name in large:
        torch.testing.assert_close(small[name], large[name], rtol=1e-4, atol=1e-6)


def test_loss_is_the_mean_over_trained_tokens(llama, rows, tmp_path):
    """Against the logits of the plain model and cross-entropy, in float64."""
    _, model, _, step, batches = parts_of(recipe(llama, rows, tmp_path / "o", train={"grad_accumulation": 2}))
    expected, count = 0.0, 0
    for batch in batches[0]:
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].double()
        labels = batch["labels"][:, 1:]
        terms = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
        expected += float(terms)
        count += int((labels != -100).sum())
    assert float(step.compute(batches[0], 0).loss) == pytest.approx(expected / count, rel=1e-5)


def test_clipping_scales_to_the_global_norm(llama, rows, tmp_path):
    _, _, _, step, batches = parts_of(recipe(llama, rows, tmp_path / "o"))
    step.max_grad_norm = 0
    assert "grad_norm" not in step.compute(batches[0], 0).metrics
    free = {n: p.grad.clone() for n, p in step.parameters}
    norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in free.values()))
    for _, p in step.parameters:
        p.grad = None
    step.max_grad_norm = norm / 4
    assert float(step.compute(batches[0], 0).metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)
    for name, p in step.parameters:
        torch.testing.assert_close(p.grad, free[name] / 4, rtol=1e-4, atol=1e-8)


def test_bf16_keeps_what_is_learned_in_fp32(llama, rows, tmp_path):
    _, model, grafts, step, batches = parts_of(recipe(llama, rows, tmp_path / "o", train={"precision": "bf16"}))
    own = {id(p) for p in grafts[0].parameters()}
    assert {p.dtype for p in model.parameters() if id(p) not in own} == {torch.bfloat16}
    seen = []
    handle = model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda m, x, y: seen.append((x[0].dtype, y.dtype)))
    step.compute(batches[0], 0)
    handle.remove()
    step.optimizer.step()
    assert seen == [(torch.bfloat16, torch.bfloat16)]
    assert {p.dtype for _, p in step.parameters} == {p.grad.dtype for _, p in step.parameters} == {torch.float32}
    assert {t.dtype for state in step.optimizer.state.values() for t in state.values()} == {torch.float32}
    assert len(step.optimizer.state) == len(step.parameters)


def test_full_tuning_in_bf16_keeps_state_in_fp32(llama, rows, tmp_path):
    _, model, grafts, step, batches = parts_of(recipe(llama, rows, tmp_path / "o", adapter=None, train={"precision": "bf16"}))
    step.run(batches[0], 0)
    assert not grafts and {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {t.dtype for state in step.optimizer.state.values() for t in state.values()} == {torch.float32}


def test_gradient_checkpointing_computes_the_same_and_saves_less(llama, rows, tmp_path):
    results = []
    for on in (False, True):
        document = recipe(llama, rows, tmp_path / "o", adapter={"method": "lora", "r": 4, "dropout": 0.3},
                          train={"gradient_checkpointing": on})
        _, model, _, step, batches = parts_of(document)
        model.train()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            loss = float(step.compute(batches[0], 0).loss)
        results.append((loss, sum(saved), {n: p.grad for n, p in step.parameters}))
    (loss, kept, grads), (loss2, kept2, grads2) = results
    assert loss == pytest.approx(loss2, rel=1e-6) and kept2 < kept / 2
    for name in grads:
        torch.testing.assert_close(grads[name], grads2[name], rtol=1e-4, atol=1e-7)


# -- schedules ---------------------------------------------------------------------------------------------------------
def test_schedule_factors_in_closed_form():
    assert [factor(s, 10, 0.0, "constant") for s in range(10)] == [1.0] * 10
    assert [factor(s, 10, 4, "constant") for s in range(5)] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert [factor(s, 10, 0.4, "linear") for s in range(4)] == [factor(s, 10, 4, "linear") for s in range(4)]
    for s in range(4, 10):
        assert factor(s, 10, 4, "linear") == pytest.approx(1 - (s - 4) / 6)
        assert factor(s, 10, 4, "cosine") == pytest.approx((1 + math.cos(math.pi * (s - 4) / 6)) / 2)
    assert factor(3, 100, 0.03, "cosine") == 1.0 and factor(2, 100, 0.03, "cosine") == pytest.approx(0.75)
    assert factor(12, 10, 0, "cosine") == factor(12, 10, 0, "linear") == 0.0


def test_rates_follow_group_and_step_also_of_groups_added_later():
    a, b = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = graftwork.optimizer("adamw", [{"params": [a], "lr_scale": 3.0, "name": "a"}], lr=0.1)
    schedule = GroupSchedule(optimizer, lambda group, step: factor(step, 4 if group.get("name") == "a" else 8, 0, "linear"))
    assert schedule.get_last_lr() == pytest.approx([0.3])
    schedule.step()
    optimizer.add_param_group({"params": [b], "name": "b"})
    schedule.step()
    assert schedule.get_last_lr() == pytest.approx([0.3 * 0.5, 0.1 * 0.75])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_the_log_has_the_rates_of_the_schedule(llama, rows, tmp_path, kind):
    run(recipe(llama, rows, tmp_path / "o", train={"schedule": kind, "warmup": 2, "max_steps": 5}))
    assert [r["lr"] for r in log_of(tmp_path / "o")] == pytest.approx([1e-2 * factor(s, 5, 2, kind) for s in range(5)])


# -- batches ------------------------------------------------------------------------------------------------------------
class Rows:
    def __init__(self, lengths):
        self._lengths = lengths

    def __len__(self):
        return len(self._lengths)

    def __getitem__(self, i):
        return {"input_ids": [1] * self._lengths[i], "labels": [-100] + [1] * (self._lengths[i] - 1), "adapter": "stranger"}

    def lengths(self):
        return self._lengths


def test_batches_cover_each_epoch_once_and_do_not_depend_on_what_was_read_before():
    batches = StepBatches(Rows([3] * 11), list, 2, 2, 9, seed=3)
    epoch = [i for s in range(3) for i in batches.indices(s)]
    assert sorted(epoch) == list(range(11))
    assert [len(m) for m in batches.micro(2)] == [2, 1]
    later = [batches.indices(s) for s in (7, 2, 8)]
    assert later == [StepBatches(Rows([3] * 11), list, 2, 2, 9, seed=3).indices(s) for s in (7, 2, 8)]
    assert [i for s in range(3, 6) for i in batches.indices(s)] != epoch
    assert all("adapter" not in row for micro in batches.micro(0) for row in micro)
    with pytest.raises(IndexError):
        batches[9]


def test_a_fleets_member_takes_the_rows_it_would_take_alone():
    one, two = StepBatches(Rows([3] * 5), list, 2, 2, 4, 0), StepBatches(Rows([3] * 9), list, 2, 2, 7, 0)
    fleet = FleetBatches({"one": one, "two": two}, list)
    assert len(fleet) == 7
    for step in range(7):
        for name, member in (("one", one), ("two", two)):
            got = [[row["index"] for row in micro if row["adapter"] == name] for micro in fleet[step]]
            alone = [[row["index"] for row in micro] for micro in member.micro(step)] if step < member.total_steps else []
            assert [g for g in got if g] == alone


def test_the_heaviest_step_has_the_largest_padded_micro_batch():
    lengths = [4] * 12
    batches = StepBatches(Rows(lengths), list, 2, 2, 3, 0)
    lengths[batches.indices(2)[1]] = 40
    assert heaviest_step(batches) == 2
    # within steps that a selection names, after the first of them where there is a second
    lengths[batches.indices(1)[0]] = 30
    assert heaviest_step(batches, range(0, 2)) == 1 and heaviest_step(batches, range(1, 3)) == 2
    assert heaviest_step(batches, range(1, 1 << 62)) == 2 and heaviest_step(batches, range(2, 3)) == 2
    assert heaviest_step(batches, range(7, 9)) == 2


def test_the_peak_of_gradual_unfreezing_is_measured_when_all_trains(llama, rows, tmp_path):
    document = recipe(llama, rows, tmp_path / "run", adapter=None, selection=[{"method": "freeze", "interval": 2}], train={"max_steps": 10})
    run(document, measure=True)
    measured = json.loads((tmp_path / "run" / "run.json").read_text())["measured"]
    assert 6 <= measured["step"] <= 10  # two layers and the input side: all trains from the fifth step, with state from the sixth


# -- log, evaluation, checkpoints ----------------------------------------------------------------------------------------
@pytest.mark.slow
def test_log_lines_and_logging_steps(llama, rows, tmp_path):
    run(recipe(llama, rows, tmp_path / "a", train={"eval_steps": 3}, data={"eval_fraction": 0.25}))
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    train = [r for r in lines if "loss" in r]
    assert [r["step"] for r in train] == [1, 2, 3, 4, 5, 6]
    kept = {"step", "loss", "lr", "grad_norm", "tokens", "seconds", "steps", "tokens_per_second"}
    assert all(kept == set(r) - {"process_bytes", "device_bytes"} for r in train)
    assert [r["step"] for r in lines if "eval_loss" in r] == [3, 6]
    assert {"eval_loss", "eval_perplexity", "eval_accuracy", "eval_row_accuracy", "eval_n"} < set(lines[3])
    run(recipe(llama, rows, tmp_path / "b", train={"logging_steps": 4}, data={"eval_fraction": 0.25}))
    windows = log_of(tmp_path / "b")
    assert [r["step"] for r in windows] == [4, 6, 6]  # what is left at the end is written too, then the final evaluation
    assert windows[0]["loss"] == pytest.approx(sum(r["loss"] for r in train[:4]) / 4)
    assert windows[2]["eval_loss"] == pytest.approx(lines[-1]["eval_loss"])


def test_evaluation_agrees_with_the_plain_model(llama, rows, tmp_path):
    result = run(recipe(llama, rows, tmp_path / "o", data={"eval": str(rows)}))
    loss = count = 0.0
    data = load_data(rows, result.tokenizer)
    for i in range(len(data)):
        ids, labels = torch.tensor([data[i]["input_ids"]]), torch.tensor(data[i]["labels"][1:])
        with torch.no_grad():
            logp = result.model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        keep = labels != -100
        loss -= float(logp[keep].gather(1, ids[0, 1:][keep][:, None]).sum())
        count += int(keep.sum())
    assert result.metrics["eval_loss"] == pytest.approx(loss / count, rel=1e-5)
    assert result.metrics["eval_n"] == 12


def load_data(path, tokenizer):
    from graftwork.data import build_splits
    from graftwork.data.config import DataConfig

    return build_splits(DataConfig(train=str(path), max_length=64), tokenizer)[0]


def overfitting(llama, tmp_path, **train):
    """The eval rows contradict the training rows, so that the eval loss rises after a while."""
    seen = write_rows(tmp_path / "train.jsonl", [{"prompt": words(0, 3), "completion": " the the the"}])
    other = write_rows(tmp_path / "eval.jsonl", [{"prompt": words(0, 3), "completion": " user it as"}])
    document = recipe(llama, seen, tmp_path / "o", data={"eval": str(other)}, optimizer={"method": "adamw", "lr": 3e-2},
                      train={"max_steps": 16, "batch_size": 1, "schedule": "constant", "warmup": 0, "eval_steps": 2, **train})
    return run(document), log_of(tmp_path / "o")


def test_early_stopping_and_restore_best(llama, tmp_path):
    result, log = overfitting(llama, tmp_path, early_stopping=2, restore_best=True)
    evals = [(r["step"], r["eval_loss"]) for r in log if "eval_loss" in r]
    best_step, best = min(evals, key=lambda e: e[1])
    assert result.steps == evals[-1][0] == best_step + 4 < 16  # two evaluations without a lower loss
    assert result.metrics["eval_loss"] == pytest.approx(best, rel=1e-6)
    model, _ = graftwork.load(llama, dtype="fp32")
    graftwork.attach_saved(model, tmp_path / "o" / "graft")
    assert_identical({n: p for n, p in result.grafts[0].named_parameters()},
                     dict(ckpt_tensors(tmp_path / "o" / "checkpoints" / "best")))


def ckpt_tensors(path):
    return {k: v for k, v in ckpt.read(path, "learned").items() if not k.startswith("buffer:")}


@pytest.mark.slow
def test_without_them_the_run_ends_with_its_last_weights(llama, tmp_path):
    result, log = overfitting(llama, tmp_path)
    evals = [r["eval_loss"] for r in log if "eval_loss" in r]
    assert result.steps == 16 and len(evals) == 8
    assert result.metrics["eval_loss"] == pytest.approx(evals[-1]) and evals[-1] > min(evals)


def test_a_run_that_early_stopping_ended_does_not_train_on_after_a_kill(llama, tmp_path, monkeypatch):
    result, log = overfitting(llama, tmp_path, early_stopping=2, save_steps=2)
    out, document = tmp_path / "o", load_recipe(tmp_path / "o" / "config.yaml")
    before = tensors_of(out / "graft")
    monkeypatch.setattr(GraftTrainer, "training_step", None)
    again = run(document, resume=True)
    assert again.steps == result.steps and again.loss == result.loss and log_of(out) == log
    assert_identical(tensors_of(out / "graft"), before)


@pytest.mark.slow
def test_save_total_limit_and_what_a_checkpoint_holds(llama, rows, tmp_path):
    run(recipe(llama, rows, tmp_path / "o", train={"save_steps": 2, "save_total_limit": 2, "max_steps": 7}))
    kept = ckpt.complete(tmp_path / "o")
    assert [p.name for p in kept] == ["step-00000006", "step-00000007"]
    assert {p.name for p in kept[0].iterdir()} == {"learned.safetensors", "optimizer.safetensors", "parts.safetensors",
                                                    "rng.safetensors", "progress.json", "trainer_state.json"}
    run(recipe(llama, rows, tmp_path / "all", train={"save_steps": 2, "save_total_limit": None, "max_steps": 7}))
    assert len(ckpt.complete(tmp_path / "all")) == 4


def test_a_damaged_checkpoint_names_itself(llama, rows, tmp_path):
    document = recipe(llama, rows, tmp_path / "o", train={"save_steps": 3})
    run(document)
    newest = ckpt.complete(tmp_path / "o")[-1]
    (newest / "learned.safetensors").write_bytes(b"short")
    with pytest.raises(GraftworkError, match="step-00000006.*cannot be read") as error:
        run(document, resume=True)
    assert "resume from the one before" in str(error.value)


def test_random_state_round_trips():
    import random

    import numpy as np

    tensors, values = ckpt.rng_state()
    values = json.loads(json.dumps(values))
    draws = [torch.rand(3).tolist(), np.random.rand(3).tolist(), np.random.normal(), random.random(), random.gauss(0, 1)]
    ckpt.set_rng_state(tensors, values)
    assert draws == [torch.rand(3).tolist(), np.random.rand(3).tolist(), np.random.normal(), random.random(), random.gauss(0, 1)]


def test_state_splits_into_tensors_and_json():
    state = {"a": torch.arange(3), "b": [1, {"c": torch.ones(2)}], "d": None}
    tensors = {}
    plain = json.loads(json.dumps(ckpt.split(state, "x", tensors)))
    back = ckpt.join(plain, tensors)
    assert torch.equal(back["a"], state["a"]) and torch.equal(back["b"][1]["c"], torch.ones(2)) and back["d"] is None


@pytest.mark.slow
def test_tensorboard_gets_the_numbers_of_the_log(llama, rows, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(recipe(llama, rows, tmp_path / "o", train={"report_to": ["jsonl", "tensorboard"]}))
    events = EventAccumulator(str(tmp_path / "o" / "tensorboard")).Reload()
    losses = [(e.step, e.value) for e in events.Scalars("loss")]
    assert losses == [(r["step"], pytest.approx(r["loss"])) for r in log_of(tmp_path / "o")]
    assert "lr" in events.Tags()["scalars"]
    run(recipe(llama, rows, tmp_path / "p"))
    assert not (tmp_path / "p" / "tensorboard").exists()


@pytest.mark.slow
def test_the_peak_is_measured_and_reported(llama, rows, tmp_path):
    result = run(recipe(llama, rows, tmp_path / "o"), measure=True)
    weights = sum(t.nbytes for t in tensors_of(llama).values())
    report = json.loads((tmp_path / "o" / "run.json").read_text())
    assert result.peak_bytes == report["peak_bytes"] == report["measured"]["peak_bytes"] > weights
    assert set(result.to_json()) >= {"steps", "loss", "peak_bytes", "seconds", "graft"}


# -- what is trained -----------------------------------------------------------------------------------------------------
def test_full_tuning_writes_a_model_that_load_reads(llama, rows, tmp_path):
    document = recipe(llama, rows, tmp_path / "o", adapter=None, optimizer={"method": "adamw", "lr": 1e-3})
    result = run(document)
    model, tokenizer = graftwork.load(tmp_path / "o" / "model", dtype="fp32")
    ids = tiny.tokens()
    with torch.no_grad():
        after, trained = model(input_ids=ids).logits, result.model(input_ids=ids).logits
        before = graftwork.load(llama, dtype="fp32")[0](input_ids=ids).logits
    assert torch.equal(after, trained) and not torch.allclose(after, before, atol=1e-3)
    assert tokenizer is not None and result.graft.endswith("model")


@pytest.mark.slow
def test_an_adapter_is_continued_from_a_folder(llama, rows, tmp_path):
    first = run(recipe(llama, rows, tmp_path / "a", train={"max_steps": 8}))
    saved = tensors_of(tmp_path / "a" / "graft")
    document = recipe(llama, rows, tmp_path / "b", adapter={"from": first.graft}, train={"max_steps": 8})
    second = run(document)
    assert log_of(tmp_path / "b")[0]["loss"] < log_of(tmp_path / "a")[0]["loss"]
    after = tensors_of(tmp_path / "b" / "graft")
    assert after.keys() == saved.keys() and any(not torch.equal(after[k], saved[k]) for k in saved)
    assert second.grafts[0].config.r == 4
    assert load_recipe(tmp_path / "b" / "config.yaml").adapter_from == first.graft


@pytest.mark.slow
def test_galore_and_apollo_train_full_weights(llama, rows, tmp_path):
    for method in ("galore", "apollo"):
        result = run(recipe(llama, rows, tmp_path / method, adapter=None,
                            optimizer={"method": method, "lr": 1e-3, "rank": 4, "update_proj_gap": 3}))
        assert result.loss < log_of(tmp_path / method)[0]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("method, options", [("lion", {"rounding": "kahan"}), ("muon", {"adjust_lr_fn": "match_rms_adamw"}),
                                             ("adamw8bit", {"min_8bit_size": 64}), ("lomo", {"lr": 0.05})])
def test_optimizers_that_do_not_project_train_full_weights(llama, rows, tmp_path, method, options):
    result = run(recipe(llama, rows, tmp_path / method, adapter=None, optimizer={"method": method, "lr": 1e-3, **options},
                        train={"max_grad_norm": 0, "max_steps": 6}))
    assert result.loss < log_of(tmp_path / method)[0]["loss"]


@pytest.mark.slow
def test_a_fused_optimizer_does_what_the_unfused_one_does(llama, rows, tmp_path):
    logs = []
    for fused in (False, True):
        out = tmp_path / str(fused)
        run(recipe(llama, rows, out, adapter=None, optimizer={"method": "adamw", "lr": 1e-3, "fused": fused},
                   train={"max_grad_norm": 0, "max_steps": 4}))
        logs.append([r["loss"] for r in log_of(out)])
    assert logs[0] == pytest.approx(logs[1], rel=1e-6)


@pytest.mark.slow
def test_mezo_and_lisa_run_from_a_recipe(llama, rows, tmp_path):
    run(recipe(llama, rows, tmp_path / "m", optimizer=None, estimator={"method": "mezo", "lr": 1e-4, "eps": 1e-2}))
    assert all(math.isfinite(r["projected_gradient"]) for r in log_of(tmp_path / "m"))
    document = recipe(llama, rows, tmp_path / "l", adapter=None, optimizer={"method": "adamw", "lr": 1e-3},
                      selection={"method": "lisa", "layers": 1, "interval": 2, "always_on": False})
    result = run(document)
    assert (tmp_path / "l" / "model" / "model.safetensors").exists() and result.steps == 6


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert_classifier", "llama"])
def test_classification_learns(base, tmp_path, kind):
    data = labelled(tmp_path / "rows.jsonl")
    document = recipe(folder(base, kind), data, tmp_path / "o", objective="classification",
                      optimizer={"method": "adamw", "lr": 2e-2},
                      data={"eval": str(data)}, train={"max_steps": 25, "batch_size": 12, "schedule": "constant"})
    result = run(document)
    assert result.metrics["eval_row_accuracy"] == 1.0 and result.metrics["eval_n"] == 12
    card = json.loads((tmp_path / "o" / "graft" / "graft.json").read_text())
    assert card["provenance"]["labels"] == ["maybe", "no", "yes"]
    if kind == "llama":  # the head is new, so it is trained and saved with the graft
        assert any(k.startswith("modules_to_save.score") for k in card["tensors"])
        model, _ = graftwork.load(folder(base, kind), dtype="fp32", task="classification", num_labels=3)
        graftwork.attach_saved(model, tmp_path / "o" / "graft")
        inputs = result.tokenizer("the and in", return_tensors="pt")
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs).logits, result.model(**inputs).logits)


def test_a_fully_trained_classifier_knows_its_labels(base, tmp_path):
    """Any program that opens the saved folder reads the names from its config."""
    run(recipe(folder(base, "bert_classifier"), labelled(tmp_path / "rows.jsonl"), tmp_path / "o", adapter=None,
               objective="classification", train={"max_steps": 1}))
    config = json.loads((tmp_path / "o" / "model" / "config.json").read_text())
    assert config["id2label"] == {"0": "maybe", "1": "no", "2": "yes"} and config["label2id"]["yes"] == 2


@pytest.mark.slow
def test_classification_by_writing_the_label(llama, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", [{"prompt": words(i, 5), "completion": [" the", " user"][i % 2]} for i in range(8)])
    result = run(recipe(llama, data, tmp_path / "o", objective="classification", data={"eval": str(data)},
                        train={"max_steps": 30, "batch_size": 8}, optimizer={"method": "adamw", "lr": 2e-2}))
    assert result.metrics["eval_row_accuracy"] == 1.0 and hasattr(result.model, "lm_head")
    assert find_target(tmp_path / "o").task == "causal_lm"  # which `graft eval` loads: its labels are words


# -- what goes wrong -----------------------------------------------------------------------------------------------------
def test_classification_rows_need_a_classification_objective(llama, tmp_path):
    with pytest.raises(DataError, match="classification rows") as error:
        run(recipe(llama, labelled(tmp_path / "d.jsonl"), tmp_path / "o"))
    assert "objective: classification" in error.value.remedy


def poison(monkeypatch, at, value=float("nan")):
    """The loss of the step `at` (from 0) is NaN."""
    from graftwork.objectives.causal_lm import CausalLMObjective

    plain = CausalLMObjective.loss

    def loss(self, model, batch, row_scale=1.0):
        out = plain(self, model, batch, row_scale)
        if state_of(model).current.step != at:
            return out
        row_loss = out.row_loss.clone()
        row_loss[0] = value
        return type(out)(out.loss * value, row_loss, out.row_tokens, out.metrics)

    monkeypatch.setattr(CausalLMObjective, "loss", loss)


def test_a_nan_loss_stops_with_step_rows_and_last_good_checkpoint(llama, rows, tmp_path, monkeypatch):
    document = recipe(llama, rows, tmp_path / "o", train={"save_steps": 2})
    clean = run({**document, "output_dir": str(tmp_path / "clean")})
    with monkeypatch.context() as patch:
        poison(patch, at=4)
        with pytest.raises(TrainingError) as error:
            run(document)
    assert "loss became nan at step 5" in error.value.message and f"{rows}:" in error.value.message
    assert error.value.message.count(".jsonl") == 1  # the one row that is to blame
    assert str(tmp_path / "o" / "checkpoints" / "step-00000004") in error.value.remedy
    assert not (tmp_path / "o" / "graft").exists()
    run(document, resume=True)  # once the cause is gone, nothing was lost
    assert_identical(tensors_of(tmp_path / "o" / "graft"), tensors_of(tmp_path / "clean" / "graft"))
    assert clean.steps == 6


def test_a_gradient_that_is_not_finite_stops_before_the_weights_are_touched(llama, rows, tmp_path):
    document = recipe(llama, rows, tmp_path / "o", train={"save_steps": 1, "max_steps": 3})
    made, model, grafts, step, batches = parts_of(document)
    trainer = GraftTrainer(step, batches, tmp_path, factor=lambda g, s: 1.0, save_steps=0, save_total_limit=None)
    before = [p.clone() for p in grafts[0].parameters()]
    grafts[0].parameters()[0].register_hook(lambda g: g * float("inf"))
    with pytest.raises(TrainingError, match="grad_norm became (nan|inf) at step 1"):
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, grafts[0].parameters()))


def test_weights_that_are_not_finite_are_never_saved(llama, rows, tmp_path):
    made, model, grafts, step, batches = parts_of(recipe(llama, rows, tmp_path / "o"))
    trainer = GraftTrainer(step, batches, tmp_path, factor=lambda g, s: 1.0, save_steps=1, save_total_limit=None)

    class Spoils(__import__("transformers").TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                grafts[0].parameters()[1].data.fill_(float("inf"))

    trainer.add_callback(Spoils())
    with pytest.raises(TrainingError, match="no longer finite at step 2") as error:
        trainer.train()
    assert "step-00000001" in error.value.remedy and [p.name for p in ckpt.complete(tmp_path)] == ["step-00000001"]


def test_a_filled_folder_is_refused_and_overwrite_starts_anew(llama, rows, tmp_path):
    document = recipe(llama, rows, tmp_path / "o", train={"save_steps": 2, "max_steps": 4})
    run(document)
    with pytest.raises(UsageError, match="not empty") as error:
        run(document)
    assert "--resume" in error.value.remedy and "--overwrite" in error.value.remedy
    with pytest.raises(UsageError, match="--resume continues"):
        run(document, resume=True, overwrite=True)
    first = log_of(tmp_path / "o")
    again = run({**document, "train": {**document["train"], "max_steps": 2}}, overwrite=True)
    assert again.steps == 2 and len(log_of(tmp_path / "o")) == 2 < len(first)
    assert [p.name for p in ckpt.complete(tmp_path / "o")] == ["step-00000002"]


def test_resume_with_another_recipe_lists_the_differences(llama, rows, tmp_path):
    document = recipe(llama, rows, tmp_path / "o", train={"save_steps": 2, "max_steps": 4})
    run(document)
    changed = {**document, "optimizer": {"method": "adamw", "lr": 5e-3}, "train": {**document["train"], "batch_size": 3}}
    with pytest.raises(UsageError) as error:
        run(changed, resume=True)
    assert "optimizer.lr: 0.01 -> 0.005" in error.value.message and "train.batch_size: 4 -> 3" in error.value.message
    run(document, resume=True)  # the same one is fine


def test_the_lock_keeps_a_second_run_out(llama, rows, tmp_path):
    document = recipe(llama, rows, tmp_path / "o")
    with FileLock(tmp_path / "o" / ".lock"):
        with pytest.raises(GraftworkError, match="in use by process"):
            run(document)
    run(document)
    assert not (tmp_path / "o" / ".lock").exists()


def test_an_unwritable_output_is_one_clear_error(llama, rows, tmp_path):
    (tmp_path / "file").write_text("x")
    for place in ("file", "file/below"):
        with pytest.raises(GraftworkError, match="file") as error:
            run(recipe(llama, rows, tmp_path / place))
        assert error.value.remedy


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(llama, rows, tmp_path, monkeypatch):
    import errno

    document = recipe(llama, rows, tmp_path / "o", train={"save_steps": 2})
    plain, calls = ckpt.rng_state, []

    def fails_at_the_second_save():
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain()

    with monkeypatch.context() as patch:
        patch.setattr(ckpt, "rng_state", fails_at_the_second_save)
        with pytest.raises(GraftworkError, match="no space left while writing") as error:
            run(document)
    assert error.value.remedy and [p.name for p in ckpt.complete(tmp_path / "o")] == ["step-00000002"]
    assert not [p for p in (tmp_path / "o" / "checkpoints").iterdir() if p.name != "step-00000002"]
    assert run(document, resume=True).steps == 6


def test_an_interrupt_checkpoints_and_resumes_identically(llama, rows, tmp_path, monkeypatch):
    document = recipe(llama, rows, tmp_path / "o", train={"save_steps": 0})
    run({**document, "output_dir": str(tmp_path / "whole")})
    plain = GraftTrainer.training_step

    def step(self, *args, **kwargs):
        if self.state.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(self, *args, **kwargs)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(GraftTrainer, "training_step", step)
        with pytest.raises(GraftworkError, match="stopped at step 4 of 6") as error:
            run(document)
    assert error.value.exit_code == 130 and signal.getsignal(signal.SIGINT) is before
    assert [p.name for p in ckpt.complete(tmp_path / "o")] == ["step-00000004"]
    run(document, resume=True)
    assert log_of(tmp_path / "o") == log_of(tmp_path / "whole")
    assert_identical(tensors_of(tmp_path / "o" / "graft"), tensors_of(tmp_path / "whole" / "graft"))


def test_a_second_interrupt_stops_at_once():
    with Interrupt() as interrupt, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.asked
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)


@pytest.mark.slow
def test_ctrl_c_on_the_command_line_exits_130(llama, rows, tmp_path):
    import yaml

    out = tmp_path / "o"
    document = recipe(llama, rows, out, train={"max_steps": 20000})
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(document))
    child = subprocess.Popen([sys.executable, "-m", "graftwork.cli.main", "train", str(tmp_path / "r.yaml")],
                             stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    threading.Timer(240, child.kill).start()
    while not (out / "metrics.jsonl").exists() and child.poll() is None:
        time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    _, stderr = child.communicate()
    assert child.returncode == 130, stderr
    assert "--resume" in stderr and "Traceback" not in stderr and len(ckpt.complete(out)) == 1


# -- fleets ----------------------------------------------------------------------------------------------------------------
@pytest.fixture
def fleet(llama, tmp_path):
    for k, (name, n) in enumerate([("ada", 12), ("bob", 7), ("cy", 10)]):
        completions(tmp_path / f"{name}.jsonl", n, seed=k + 1)
    (tmp_path / "dan.jsonl").write_text('{"prompt": "the", "completion": " it"}\nnot json\n')
    train = {"max_steps": -1, "epochs": 3, "batch_size": 2, "grad_accumulation": 2, "max_grad_norm": 0.5}
    return lambda pattern, out, **more: recipe(llama, tmp_path / pattern, tmp_path / out, train=train, **more)


@pytest.mark.slow
def test_a_fleet_equals_training_each_alone(fleet, tmp_path):
    adapter = {"method": "lora", "r": 4, "loraplus_lr_ratio": 4.0}
    optimizer = {"method": "adamw", "lr": 1e-2, "weight_decay": 0.1}
    together = run(fleet("*.jsonl", "fleet", adapter=adapter, optimizer=optimizer))
    assert set(together.failed) == {"dan"} and "dan.jsonl:2" in together.failed["dan"]
    last = {}
    for row in log_of(tmp_path / "fleet"):
        last.update({k: row["step"] for k in row if k.startswith("loss/")})
    assert last["loss/bob"] < last["loss/ada"]  # one ends earlier
    for name in ("ada", "bob", "cy"):
        run(fleet(f"{name}.jsonl", name, adapter=adapter, optimizer=optimizer))
        mixed = tensors_of(tmp_path / "fleet" / "graft" / name)
        alone = tensors_of(tmp_path / name / "graft")
        assert mixed.keys() == alone.keys()
        for key in alone:
            torch.testing.assert_close(mixed[key], alone[key], rtol=1e-3, atol=1e-5)
        logged = [r[f"loss/{name}"] for r in log_of(tmp_path / "fleet") if f"loss/{name}" in r]
        assert logged == pytest.approx([r["loss"] for r in log_of(tmp_path / name)], rel=1e-4)
        card = json.loads((tmp_path / "fleet" / "graft" / name / "graft.json").read_text())
        assert card["provenance"]["steps"] == last[f"loss/{name}"]


@pytest.mark.slow
def test_a_fleet_scores_each_member_and_leaves_out_names_that_cannot_be(fleet, tmp_path):
    completions(tmp_path / "größe.jsonl", 6)
    result = run(fleet("*.jsonl", "out", data={"eval_fraction": 0.3}))
    assert set(result.failed) == {"dan", "größe"}
    own = [result.metrics[f"eval_loss/{name}"] for name in ("ada", "bob", "cy")]
    assert result.metrics["eval_loss"] == pytest.approx(sum(own) / 3)
    assert {p.name for p in (tmp_path / "out" / "graft").iterdir()} == {"ada", "bob", "cy"}


def test_a_fleet_without_a_usable_file_says_why(fleet):
    with pytest.raises(DataError, match="no file of .* is usable") as error:
        run(fleet("dan*.jsonl", "out"))
    assert "dan.jsonl:2" in error.value.remedy


def test_a_fleet_whose_files_disagree_on_labels_leaves_them_out(base, tmp_path):
    labelled(tmp_path / "a.jsonl")
    write_rows(tmp_path / "b.jsonl", [{"text": words(i, 4), "label": ["up", "down"][i % 2]} for i in range(6)])
    result = run(recipe(folder(base, "llama"), tmp_path / "*.jsonl", tmp_path / "o", objective="classification",
                        train={"max_steps": 2}))
    assert "labels" in result.failed["b"] and (tmp_path / "o" / "graft" / "a" / "graft.json").exists()


def test_trained_parameters_have_stable_names(llama, rows, tmp_path):
    model, _ = graftwork.load(llama, dtype="fp32")
    grafts = [graftwork.attach(model, make_config("adapter", "lora", r=2), name=n) for n in ("a", "b")]
    names = [n for n, _ in trained_parameters(model, grafts)]
    assert len(set(names)) == len(names) and {n.split("/")[0] for n in names} == {"a", "b"}
    assert [n for n, _ in trained_parameters(model, grafts[:1])] == [n[2:] for n in names if n.startswith("a/")]
