"""`graft eval` with several grafts, metrics of all families, programs, resuming: what it prints, writes and refuses."""

import json

import pytest
import torch

import graftwork
import tiny
from test_evaluation import scores, verb, write

ROWS = [{"prompt": f"say {w} ", "completion": f"{w} {n}", "refs": [w]} for n, w in enumerate(("one", "two", "the", "end"))]


@pytest.fixture(scope="module")
def grafts(tmp_path_factory):
    """A tiny base and three saved grafts with names of their own, one in a run's shape."""
    root = tmp_path_factory.mktemp("grafts")
    model = tiny.llama()
    tiny.save(model, root / "model")
    for k, (name, method) in enumerate((("anna", "lora"), ("ben", "ia3"), ("run/graft", "lora"))):
        graft = graftwork.attach(model, method, name="one")
        with torch.no_grad():
            for parameter in graft.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(k)) * 0.3)
        graft.save(root / name)
        graft.detach()
    write(root / "rows.jsonl", ROWS)
    write(root / "choices.jsonl", [{"prompt": "pick ", "choices": ["this", "that one"], "answer": k % 2} for k in range(3)])
    write(root / "code.jsonl", [{"prompt": "def f():\n", "entry_point": "f", "test": "assert f() == 1"}])
    return root


@pytest.mark.slow
def test_several_grafts_at_once(grafts, capsys, tmp_path):
    out = verb(capsys, grafts / "model", "--graft", grafts / "anna", "--graft", f"b2={grafts / 'ben'}", "--graft", grafts / "run", "--base",
               "--data", grafts / "rows.jsonl", "--metrics", "loss,exact_match,token_f1,bleu,chrf,rouge,mcc", "--json",
               "--output", tmp_path / "rows.jsonl", "--dtype", "fp32")
    found = json.loads(out.out)
    assert list(found["targets"]) == ["anna", "b2", "run", "base"] and found["metrics"] == found["targets"]["anna"]
    wanted = {"loss", "exact_match", "n", "token_f1", "bleu", "chrf", "rougeL", "mcc", "loss_interval", "bleu_interval"}
    assert wanted <= set(found["metrics"])
    assert {(d["a"], d["b"]) for d in found["differences"]} == {("anna", other) for other in ("b2", "run", "base")}
    alone = scores(capsys, grafts / "ben", "--model", grafts / "model", "--data", grafts / "rows.jsonl", "--dtype", "fp32")
    assert found["targets"]["b2"]["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    bare = scores(capsys, grafts / "model", "--data", grafts / "rows.jsonl", "--dtype", "fp32")
    assert found["targets"]["base"]["loss"] == pytest.approx(bare["loss"], rel=1e-5)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["target"] for row in rows] == [name for name in found["targets"] for _ in ROWS]
    assert not (tmp_path / "rows.jsonl.journal").exists()
    text = verb(capsys, "--model", grafts / "model", "--graft", grafts / "anna", "--graft", grafts / "ben", "--data",
                grafts / "choices.jsonl").out
    assert "anna - ben" in text and "choice_accuracy_norm" in text and "over 3 rows" in text


@pytest.mark.slow
def test_resume(grafts, capsys, tmp_path):
    output, asked = tmp_path / "out.jsonl", (grafts / "model", "--data", grafts / "rows.jsonl", "--metrics", "exact_match")
    whole = scores(capsys, *asked, "--output", output)
    journal = tmp_path / "out.jsonl.journal"
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    from graftwork.evaluation.observers import answers as observer

    real, left = observer.generate, []

    def kept(*arguments, **options):
        left.append(len(arguments[2]))
        found = real(*arguments, **options)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(observer, "generate", kept)
        patch.setattr("graftwork.files.atomic_write_text", lambda path, text: (_ for _ in ()).throw(KeyboardInterrupt))
        verb(capsys, *asked, "--output", output, code=130)  # interrupted before anything is written out
        assert journal.is_file() and left == [4]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(observer, "generate", kept)
        again = verb(capsys, *asked, "--output", output, "--resume", "--json")
    assert left == [4] and "4 of 4 answers were written before" in again.err and not journal.exists()
    assert json.loads(again.out)["metrics"]["exact_match"] == whole["exact_match"]
    assert [json.loads(line)["prediction"] for line in output.read_text().splitlines()] == [row["prediction"] for row in rows]


@pytest.mark.slow
def test_programs_by_the_verb(grafts, capsys):
    out = verb(capsys, grafts / "model", "--data", grafts / "code.jsonl", code=2)
    assert "off by default" in out.err and "--allow-code-execution" in out.err and out.out == ""
    found = scores(capsys, grafts / "model", "--data", grafts / "code.jsonl", "--allow-code-execution", "--k", "1,2", "--samples", "2",
                   "--max-new-tokens", "8", "--code-seconds", "120")
    assert found["pass@1"] == found["pass@2"] == 0.0 and found["samples"] == 2 and found["pass@1_interval"] is None


@pytest.mark.parametrize("arguments, code, words", [
    (("{r}/model", "--graft", "{r}/anna", "--graft", "{r}/anna"), 2, "two grafts are called 'anna'"),
    (("{r}/model", "--graft", "{r}/ana"), 2, "did you mean"), (("{r}/model", "--graft", "a/b={r}/anna"), 2, "no name for a graft"),
    (("{r}/model", "--graft", "base={r}/anna"), 2, "no name for a graft"), (("{r}/model", "--resume"), 2, "--output FILE"),
    (("{r}/model", "--output", "-"), 2, "no file"), (("{r}/model", "--metrics", "bleus"), 2, "did you mean 'bleu'"),
    (("{r}/model", "--k", "0"), 2, "whole numbers"), (("{r}/model", "--k", "5", "--samples", "2"), 2, "pass@5 from 2"),
    (("{r}/model", "--samples", "2", "--temperature", "0"), 2, "times the same program"),
    (("{r}/model", "--graft", "{r}/anna", "--adapter", "x"), 2, "use one of them"),
    (("{r}/model", "--metrics", "f1"), 2, "--positive"), (("{r}/model", "--metrics", "pearson"), 1, "is no finite number"),
])
@pytest.mark.slow
def test_what_the_verb_refuses(grafts, capsys, arguments, code, words):
    out = verb(capsys, *[a.format(r=grafts) for a in arguments], "--data", grafts / "rows.jsonl", "--max-new-tokens", 1, code=code)
    assert words in out.err and "Traceback" not in out.err and out.out == ""
