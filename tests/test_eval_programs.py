"""pass@k from written programs: how they are put together, and HumanEval's own solutions through the sandbox."""

import gzip
import json
import os
from pathlib import Path

import pytest

import tiny
from graftwork.errors import UsageError
from graftwork.evaluation import Code, Options, evaluate, read_tasks
from graftwork.evaluation.observers import programs
from graftwork.serving.generate import Completion

DATA = os.environ.get("GRAFTWORK_DATA")
ROWS = [{"prompt": "def double(x):\n", "entry_point": "double", "test": "def check(f):\n    assert f(4) == 8\n"},
        {"prompt": "Write a function that is called one.", "test_list": ["assert one() == 1", "assert one(2) == 3"]}]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def says(monkeypatch, texts):
    """The model writes these, sample by sample of each row."""
    asked = []

    def written(view, prompts, grafts, limit, stage, **options):
        asked.append((prompts, limit, options))
        return [Completion(text, 1, "stop") for text in texts]

    monkeypatch.setattr(programs, "write", written)
    return asked


def test_programs_are_put_together(tmp_path):
    first, second = read_tasks(write(tmp_path / "a.jsonl", ROWS))
    assert programs.program(first, "    return 2 * x\n\nprint(double(3))") == "def double(x):\n    return 2 * x\n"
    whole = "import math\ndef double(x):\n    return 2 * x\n"
    assert programs.program(first, f"Here it is:\n```python\n{whole}```\nDone.") == whole
    assert programs.program(first, f"```\n{whole}") == whole  # cut off before the fence ends
    assert programs.program(second, "def one(x=0): return 1 + x") == "def one(x=0): return 1 + x"
    assert first.tests.source.endswith("\ncheck(double)\n") and second.tests.source == "assert one() == 1\nassert one(2) == 3"


@pytest.mark.slow
def test_pass_at_k_counts_programs_that_pass(tmp_path, monkeypatch):
    texts = ["    return x + x", "    return x", "    return x + 4", "def one(x=0): return 1 + x",
             "def one(): return 1", "raise SystemExit"]
    asked = says(monkeypatch, texts)
    code = Code(allowed=True, samples=3, temperature=0.5, seconds=120.0)
    out = evaluate(tiny.llama(), tiny.tokenizer(), write(tmp_path / "a.jsonl", ROWS), metrics=None, code=code, options=Options(k=(1, 2)))
    assert [row["passed"] for row in out.rows] == [[True, False, True], [True, False, False]]
    assert out.metrics["pass@1"] == pytest.approx(1 / 2) and out.metrics["pass@2"] == pytest.approx((1 + 2 / 3) / 2)
    assert out.metrics["samples"] == 3 and "limits" in out.metrics["sandbox"] and out.rows[1]["reasons"][2] == "SystemExit: "
    prompts, limit, options = asked[0]
    assert options["numbers"] == [0, 2, 4, 1, 3, 5] and options["temperature"] == 0.5 and limit == programs.LONGEST
    assert prompts[0] == prompts[1] == tiny.tokenizer()(ROWS[0]["prompt"])["input_ids"]


def test_samples_do_not_depend_on_batches(tmp_path, monkeypatch):
    """Two samples of a row differ, and each is what it is in any batch."""
    monkeypatch.setattr(programs, "run_programs", lambda sources, **options: [programs_outcome() for _ in sources])
    model, tokenizer, rows = tiny.llama(), tiny.tokenizer(), write(tmp_path / "a.jsonl", ROWS)
    found = [evaluate(model, tokenizer, rows, metrics=["pass_at_k"], code=Code(allowed=True, samples=2, temperature=1.0), batch_size=size,
                      max_new_tokens=6, journal=journal) for size, journal in ((4, None), (1, tmp_path / "j"))]
    assert [row["programs"] for row in found[0].rows] == [row["programs"] for row in found[1].rows]
    assert all(row["programs"][0] != row["programs"][1] for row in found[0].rows)


def programs_outcome():
    from graftwork.evaluation.sandbox.runner import Outcome

    return Outcome(True)


def test_refused_before_a_word_is_written(tmp_path, monkeypatch):
    asked = says(monkeypatch, [])
    with pytest.raises(UsageError, match="off by default"):
        evaluate(tiny.llama(), tiny.tokenizer(), write(tmp_path / "a.jsonl", ROWS), metrics=["pass_at_k"])
    with pytest.raises(UsageError, match="has no tests"):
        evaluate(tiny.llama(), tiny.tokenizer(), write(tmp_path / "b.jsonl", [{"prompt": "p", "completion": "c"}]),
                 metrics=["pass_at_k"], code=Code(allowed=True))
    assert not asked


@pytest.mark.slow
@pytest.mark.skipif(not DATA or not Path(DATA, "code").is_dir(), reason="GRAFTWORK_DATA has no code")
def test_humaneval_and_mbpp_solve_themselves(tmp_path, monkeypatch):
    """The published solutions pass, and an empty body does not."""
    for name in ("humaneval", "mbpp"):
        with gzip.open(Path(DATA, "code", name, "test.jsonl.gz"), "rt") as file:
            rows = [json.loads(next(file)) for _ in range(4)]
        texts = [text for row in rows for text in (row["canonical_solution"], "    return None\n")]
        says(monkeypatch, texts)
        out = evaluate(tiny.llama(), tiny.tokenizer(), write(tmp_path / f"{name}.jsonl", rows), metrics=["pass_at_k"],
                       code=Code(allowed=True, samples=2, temperature=1.0, seconds=120.0, workers=2))
        assert [row["passed"] for row in out.rows] == [[True, False]] * 4, [row["reasons"] for row in out.rows]
        assert out.metrics["pass@1"] == 0.5
