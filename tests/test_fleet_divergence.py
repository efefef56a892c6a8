"""A member of a fleet that diverges stops alone: it keeps its last finite values, is put aside, and the others go on."""

import json

import pytest
import torch

import graftwork.training.run as running
from adapter_support import close
from graftwork.errors import TrainingError
from training_support import completions, folder, interrupted, log_of, recipe, run, tensors_of

pytestmark = pytest.mark.slow

PLAIN = {"schedule": "constant", "warmup": 0}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp("fleet")
    (root / "files").mkdir()
    for seed, name in enumerate("abc"):
        completions(root / "files" / f"{name}.jsonl", n=12 + 8 * (name == "b"), seed=seed)
    return root


def fleet(base, out, **train):
    return recipe(folder(base), base / "files" / "*.jsonl", out, train={**PLAIN, **train})


def poison_loss(graft, at):
    """NaN in a factor of one site from step `at` on."""
    adapter = next(iter(graft.adapters.values()))
    real = adapter.factors

    def factors(base=None):
        B, A = real(base)
        return (B * float("nan"), A) if graft.holder.current.step >= at else (B, A)

    adapter.factors = factors


def poison_gradient(graft, at):
    """An infinite gradient at step `at`, with a finite loss."""
    for parameter in graft.parameters():
        parameter.register_hook(lambda grad: grad * float("inf") if graft.holder.current.step == at else grad)


@pytest.fixture
def poisoned(monkeypatch):
    """poisoned(how, at, names): the run's grafts of these names diverge at step `at`."""
    real = running.build_step

    def use(how, at, names="b"):
        def build(recipe, model, grafts, total):
            for graft in grafts:
                if graft.name in names:
                    how(graft, at)
            return real(recipe, model, grafts, total)
        monkeypatch.setattr(running, "build_step", build)

    return use


@pytest.fixture(scope="module")
def healthy(base):
    """Files of the fleet without trouble, after 3 and after 6 steps."""
    for steps in (3, 6):
        run(fleet(base, base / f"healthy{steps}", max_steps=steps))
    return {steps: {name: tensors_of(base / f"healthy{steps}" / "graft" / name) for name in "abc"} for steps in (3, 6)}


@pytest.mark.parametrize("how, what", [(poison_loss, "its loss became nan at step 4"),
                                       (poison_gradient, "its gradient is not finite at step 4")])
def test_one_member_stops_and_the_others_go_on(base, tmp_path, poisoned, healthy, how, what):
    poisoned(how, 3)
    with pytest.warns(UserWarning, match=f"'b' of the fleet has diverged and stops: {what}, rows .*b.jsonl:.*; the others go on"):
        done = run(fleet(base, tmp_path / "out", max_steps=6))
    assert done.steps == 6 and set(done.failed) == {"b"} and what in done.failed["b"]
    assert sorted(p.name for p in (tmp_path / "out" / "graft").iterdir()) == ["a", "c"]
    for name in "ac":  # the batches are padded to other widths without b
        mine = tensors_of(tmp_path / "out" / "graft" / name)
        for key, tensor in healthy[6][name].items():
            close(mine[key], tensor, 1e-4)
    kept = tensors_of(tmp_path / "out" / "diverged" / "b")
    assert all(torch.equal(kept[key], tensor) for key, tensor in healthy[3]["b"].items())
    card = json.loads((tmp_path / "out" / "diverged" / "b" / "graft.json").read_text())
    assert what in json.dumps(card["provenance"]["diverged"])
    assert "diverged" not in json.loads((tmp_path / "out" / "graft" / "c" / "graft.json").read_text())["provenance"]
    assert json.loads((tmp_path / "out" / "run.json").read_text())["failed"] == done.failed
    rows = log_of(tmp_path / "out")
    assert [sorted(k for k in row if k.startswith("loss/")) for row in rows] == [["loss/a", "loss/b", "loss/c"]] * 3 + \
        [["loss/a", "loss/c"]] * 3
    assert all(row["loss"] == pytest.approx(sum(v for k, v in row.items() if k.startswith("loss/")) / (3 if i < 3 else 2))
               for i, row in enumerate(rows))


@pytest.mark.filterwarnings("ignore:'b' of the fleet")
def test_a_resumed_run_leaves_it_stopped(base, tmp_path, poisoned):
    poisoned(poison_loss, 1)
    whole = run(fleet(base, tmp_path / "whole"))
    document = fleet(base, tmp_path / "parts", save_steps=2)
    resumed = interrupted(document)
    assert resumed.failed == whole.failed and set(whole.failed) == {"b"}
    for name in "ac":
        one, other = (tensors_of(tmp_path / part / "graft" / name) for part in ("whole", "parts"))
        assert all(torch.equal(one[k], other[k]) for k in one)
    assert not (tmp_path / "parts" / "graft" / "b").exists()


@pytest.mark.filterwarnings("ignore:.* of the fleet has diverged")
def test_the_run_fails_when_none_is_left(base, tmp_path, poisoned):
    poisoned(poison_gradient, 1, "abc")
    with pytest.raises(TrainingError, match="'a': its gradient is not finite at step 2[\\s\\S]*'c': its gradient"):
        run(fleet(base, tmp_path / "out"))


@pytest.mark.filterwarnings("ignore:'b' of the fleet")
def test_the_run_ends_early_when_only_it_had_steps_left(base, tmp_path, poisoned):
    """b has more rows than the others, so after their last step it is alone."""
    poisoned(poison_loss, 4)
    done = run(fleet(base, tmp_path / "out", max_steps=0, epochs=1))
    assert done.steps < 6 and set(done.failed) == {"b"}
    assert sorted(p.name for p in (tmp_path / "out" / "graft").iterdir()) == ["a", "c"]


@pytest.mark.filterwarnings("ignore:'b' of the fleet")
def test_it_is_not_evaluated_any_more(base, tmp_path, poisoned):
    poisoned(poison_loss, 2)
    document = fleet(base, tmp_path / "out", eval_steps=2)
    document["data"]["eval_fraction"] = 0.3
    done = run(document)
    assert set(done.failed) == {"b"} and sorted(done.metrics) == ["eval_loss", "eval_loss/a", "eval_loss/c"]


def test_a_member_whose_eval_loss_is_not_finite_stops(base, tmp_path, monkeypatch):
    import graftwork.training.evaluate as evaluating

    real = evaluating.evaluate_loss
    monkeypatch.setattr(evaluating, "evaluate_loss", lambda *args, route=None, **options: {
        **real(*args, route=route, **options), **({"loss": float("inf")} if route == "b" else {})})
    document = fleet(base, tmp_path / "out", eval_steps=2)
    document["data"]["eval_fraction"] = 0.3
    with pytest.warns(UserWarning, match="'b' of the fleet has diverged and stops: its eval loss became inf"):
        done = run(document)
    assert set(done.failed) == {"b"} and not any("loss/b" in row for row in log_of(tmp_path / "out")[3:])


@pytest.mark.filterwarnings("ignore:'b' of the fleet")
def test_a_fused_optimizer_loses_it(base, tmp_path, poisoned):
    """It moves parameters inside the backward pass: nothing of the member is kept, and the others are as they should be."""
    poisoned(poison_loss, 2)
    document = fleet(base, tmp_path / "out", max_grad_norm=0.0, save_steps=2)
    document["optimizer"] = {"method": "adamw", "lr": 1e-2, "fused": True}
    done = run(document)
    assert set(done.failed) == {"b"} and not (tmp_path / "out" / "diverged").exists()
    assert all(t.isfinite().all() for name in "ac" for t in tensors_of(tmp_path / "out" / "graft" / name).values())
