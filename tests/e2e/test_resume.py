"""A run that is killed at any moment and resumed ends with the bytes of a run that was not."""

import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
import yaml
from transformers import TrainerCallback

import graftwork.files
from graftwork.training import checkpoint as ckpt
from graftwork.training import run as run_module
from graftwork.training import trainer as trainer_module
from graftwork.training.callbacks import AfterStep
from graftwork.training.trainer import GraftTrainer
from training_support import assert_identical, completions, folder, log_of, recipe, run, tensors_of

STEPS, SAVE = 20, 7


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, and what the process held in memory is thrown away."""


#: scenario -> (sections of the recipe, where kills are worth most)
SCENARIOS = {
    "lora": (dict(adapter={"method": "lora", "r": 4, "dropout": 0.2}), [9, 13]),
    "lisa": (dict(adapter=None, optimizer={"method": "adamw", "lr": 1e-3},
                  selection={"method": "lisa", "layers": 1, "interval": 5}), [8, 17]),  # intervals end at 5, 10, 15
    "galore": (dict(adapter=None, optimizer={"method": "galore", "lr": 1e-3, "rank": 4, "update_proj_gap": 4,
                                             "svd": "randomized", "moments": "rotate"}), [10, 18]),
    "mezo": (dict(optimizer=None, estimator={"method": "mezo", "lr": 1e-4, "eps": 1e-2, "n_samples": 2}), [11]),
}


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    base = tmp_path_factory.mktemp("resume")
    # the model's own dropout draws from the global generator, whose state is part of a checkpoint
    return folder(base, "llama", attention_dropout=0.1), completions(base / "rows.jsonl", 22)


def document(material, out, name, **train):
    model, rows = material
    return recipe(model, rows, out, data={"eval_fraction": 0.15}, **SCENARIOS[name][0],
                  train={"max_steps": STEPS, "batch_size": 3, "grad_accumulation": 2, "save_steps": SAVE, "eval_steps": 6,
                         "logging_steps": 2, "restore_best": False, **train})


@pytest.fixture(scope="module")
def whole(material, tmp_path_factory):
    """Folder of the uninterrupted run of a scenario."""
    made = {}

    def of(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "whole"
            run(document(material, made[name], name))
        return made[name]

    return of


def kill_at(monkeypatch, step, moment):
    """Raise Killed in optimizer step `step` (from 1): before it, right after the optimizer moved, or after the log line."""
    target, method = {"before": (GraftTrainer, "training_step"), "moved": (AfterStep, "on_step_end"),
                      "logged": (GraftTrainer, "_write_window")}[moment]
    plain = getattr(target, method)

    def killing(self, *args, **kwargs):
        state = args[1] if target is AfterStep else self.state
        if state.global_step == (step - 1 if moment == "before" else step):
            raise Killed
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(target, method, killing)


def same(out, reference):
    artifact = "graft" if (reference / "graft").exists() else "model"
    assert_identical(tensors_of(out / artifact), tensors_of(reference / artifact))
    last, last_whole = ckpt.complete(out)[-1], ckpt.complete(reference)[-1]
    assert last.name == last_whole.name == f"step-{STEPS:08d}"
    assert_identical(tensors_of(last), tensors_of(last_whole))  # learned tensors, optimizer, estimator, random state
    assert log_of(out) == log_of(reference)


def count_steps(monkeypatch):
    done, plain = [], GraftTrainer.training_step

    def counted(self, *args, **kwargs):
        done.append(self.state.global_step + 1)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(GraftTrainer, "training_step", counted)
    return done


@pytest.mark.parametrize("name", ["lora", *(pytest.param(n, marks=pytest.mark.slow) for n in SCENARIOS if n != "lora")])
def test_kills_between_steps(name, material, whole, tmp_path, monkeypatch):
    out, generator = tmp_path / "o", random.Random(name)
    # rising, so that every kill happens; one at a chosen place, others anywhere
    kills = sorted({*SCENARIOS[name][1], generator.randrange(2, STEPS + 1)})
    reached = 0
    for number, step in enumerate(kills):
        with monkeypatch.context() as patch:
            done = count_steps(patch)
            kill_at(patch, step, "before" if number % 2 else "moved")
            with pytest.raises(Killed):
                run(document(material, out, name), resume=number > 0)
        assert not done or done[0] == reached // SAVE * SAVE + 1  # at most save_steps steps are done again
        reached = step
    with monkeypatch.context() as patch:
        done = count_steps(patch)
        run(document(material, out, name), resume=True)
    assert done[0] == (reached - 1) // SAVE * SAVE + 1 and reached - done[0] <= SAVE
    same(out, whole(name))


LATER = [pytest.param(where, marks=pytest.mark.slow) for where in ("half-written", "rotating", "log")]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["written", *LATER])
def test_kills_inside_a_save(where, material, whole, tmp_path, monkeypatch):
    out = tmp_path / "o"
    plain_replace, plain_rotate = graftwork.files._replace_folder, ckpt.rotate

    class Dies:
        def __init__(self, after):
            self.left = after

        def __call__(self):
            self.left -= 1
            if self.left < 0:
                raise Killed

    with monkeypatch.context() as patch:
        dies = Dies(1)  # the second checkpoint, at step 14
        if where == "half-written":
            def state():
                dies()
                return ckpt_rng()

            ckpt_rng = ckpt.rng_state
            patch.setattr(ckpt, "rng_state", state)
        elif where == "written":  # all files are there, the folder has its temporary name; nothing cleans it up
            def replace(new, path):
                if "step-" in path.name:
                    dies()
                plain_replace(new, path)

            patch.setattr(graftwork.files, "_replace_folder", replace)
            patch.setattr(graftwork.files, "remove_path", lambda path: None)
        elif where == "rotating":
            def rotate(*args):
                dies()
                plain_rotate(*args)

            patch.setattr(ckpt, "rotate", rotate)
        else:  # a log line was cut in the middle
            def record(self, row, plain=GraftTrainer.record):
                if row["step"] == 16:
                    with open(self.folder / "metrics.jsonl", "ab") as log:
                        log.write(b'{"step": 16, "lo')
                    raise Killed
                plain(self, row)

            patch.setattr(GraftTrainer, "record", record)
        with pytest.raises(Killed):
            run(document(material, out, "lora"))
    found = ckpt.complete(out)
    assert found[-1].name == ("step-00000007" if where in ("half-written", "written") else "step-00000014")
    leftovers = [p for p in (out / "checkpoints").iterdir() if p.name.startswith(".")]
    assert bool(leftovers) == (where == "written")
    run(document(material, out, "lora"), resume=True)
    same(out, whole("lora"))


@pytest.mark.slow
def test_a_kill_before_the_first_checkpoint_starts_anew(material, whole, tmp_path, monkeypatch):
    out = tmp_path / "o"
    with monkeypatch.context() as patch:
        kill_at(patch, 5, "moved")
        with pytest.raises(Killed):
            run(document(material, out, "lora"))
    assert not ckpt.complete(out) and log_of(out)
    run(document(material, out, "lora"), resume=True)
    same(out, whole("lora"))


@pytest.mark.slow
def test_a_kill_while_the_artifact_is_written(material, whole, tmp_path, monkeypatch):
    out = tmp_path / "o"
    with monkeypatch.context() as patch:
        patch.setattr(run_module._Run, "_save", lambda *args: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            run(document(material, out, "lora"))
    assert not (out / "graft").exists()
    with monkeypatch.context() as patch:
        done = count_steps(patch)
        run(document(material, out, "lora"), resume=True)
    assert not done  # everything was trained already
    same(out, whole("lora"))


@pytest.mark.slow
def test_the_best_weights_survive_a_kill(material, tmp_path, monkeypatch):
    extra = {"restore_best": True, "eval_steps": 3, "early_stopping": 4}
    run(document(material, tmp_path / "whole", "lora", **extra))
    with monkeypatch.context() as patch:
        kill_at(patch, 13, "moved")
        with pytest.raises(Killed):
            run(document(material, tmp_path / "o", "lora", **extra))
    run(document(material, tmp_path / "o", "lora", **extra), resume=True)
    for part in ("graft", "checkpoints/best"):
        assert_identical(tensors_of(tmp_path / "o" / part), tensors_of(tmp_path / "whole" / part))
    assert log_of(tmp_path / "o") == log_of(tmp_path / "whole")


@pytest.mark.slow
def test_a_fleet_resumes_identically(material, tmp_path, monkeypatch):
    model, _ = material
    for k, name in enumerate(("ada", "bob")):
        completions(tmp_path / f"{name}.jsonl", 8 - 3 * k, seed=k)
    made = [recipe(model, tmp_path / "*.jsonl", tmp_path / out,
                   train={"max_steps": -1, "epochs": 4, "batch_size": 2, "save_steps": 5}) for out in ("whole", "o")]
    run(made[0])
    with monkeypatch.context() as patch:
        kill_at(patch, 14, "moved")  # bob ended at step 12
        with pytest.raises(Killed):
            run(made[1])
    run(made[1], resume=True)
    assert_identical(tensors_of(tmp_path / "o" / "graft"), tensors_of(tmp_path / "whole" / "graft"))
    assert log_of(tmp_path / "o") == log_of(tmp_path / "whole")


@pytest.mark.slow
def test_a_comparison_that_could_fail(material, whole, tmp_path):
    """The optimizer's state matters: a resume without it does not end with the same bytes."""
    out = tmp_path / "o"

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 8:
                raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "AfterStep", lambda step: Stop())
        with pytest.raises(Killed):
            run(document(material, out, "lora"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "load_optimizer_state", lambda *args: None)
        run(document(material, out, "lora"), resume=True)
    with pytest.raises(AssertionError):
        same(out, whole("lora"))


# -- with real kills ---------------------------------------------------------------------------------------------------
def start(path, *flags):
    return subprocess.Popen([sys.executable, "-m", "graftwork.cli.main", "train", str(path), "--quiet", *flags],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def killed_when(child, condition, patience=240.0):
    """SIGKILL the child as soon as condition() holds; False when it ended before."""
    guard = threading.Timer(patience, child.kill)
    guard.start()
    try:
        while child.poll() is None:
            if condition():
                child.send_signal(signal.SIGKILL)
                child.communicate()
                return child.returncode == -signal.SIGKILL
            time.sleep(0.0005)
        return False
    finally:
        guard.cancel()


@pytest.mark.slow
@pytest.mark.parametrize("name, moment", [("lora", "inside a save"), ("lisa", "anywhere")])
def test_sigkill_then_resume(name, moment, material, tmp_path):
    out, generator = tmp_path / "o", random.Random(7)
    made = document(material, out, name)
    made["train"]["logging_steps"] = 1
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(made))
    saving, at = out / "checkpoints", generator.randrange(9, 14)

    def inside_a_save():
        return saving.exists() and any(p.name.startswith(".step-") and p.name.endswith(".tmp") for p in saving.iterdir())

    def anywhere():
        log = out / "metrics.jsonl"
        return log.exists() and log.read_bytes().count(b'"lr"') >= at

    child = start(path)
    assert killed_when(child, inside_a_save if moment == "inside a save" else anywhere), child.communicate()
    assert not (out / ("graft" if name == "lora" else "model")).exists()
    child = start(path, "--resume")
    _, stderr = child.communicate(timeout=400)
    assert child.returncode == 0, stderr
    torch.set_num_threads(1)  # as the children do: sums are split by thread
    reference = tmp_path / "whole"
    run({**made, "output_dir": str(reference)})
    same(out, reference)
