"""What is seen of a model: choices, windows, bytes, labels, several grafts in one pass; against plain forwards in float64."""

import json
import math

import numpy as np
import pytest
import torch

import graftwork
import tiny
from graftwork.data import DataConfig
from graftwork.errors import DataError, UsageError
from graftwork.evaluation import compare, evaluate, read_tasks
from graftwork.evaluation.likelihood import likelihoods, scored_bytes, windows
from graftwork.serving.generate import generate


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def shaken(model, name, seed, method="lora", **options):
    """A graft that changes answers."""
    graft = graftwork.attach(model, method, name=name, **options)
    with torch.no_grad():
        for k, parameter in enumerate(graft.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * seed + k)) * 0.3)
    return graft


def logs(model, ids):
    """log p of each token but the first, in float64."""
    with torch.no_grad():
        table = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return [table[t - 1, token].item() for t, token in enumerate(ids)][1:]


@pytest.fixture(scope="module")
def base():
    return tiny.llama(), tiny.tokenizer()


QUESTIONS = [{"question": "the user says ", "choices": ["one", "another", "the end of it"], "answer": "B"},
             {"prompt": "in the ", "choices": {"text": ["end", "start"], "label": ["x", "y"]}, "answerKey": "y"},
             {"prompt": "a note on ", "choices": ["this", "that"], "answer": 1}]


def test_choices_against_plain_forwards(base, tmp_path):
    model, tokenizer = base
    path = write(tmp_path / "a.jsonl", QUESTIONS)
    out = evaluate(model, tokenizer, path, metrics=["multiple_choice", "multiple_choice_pmi", "accuracy"], batch_size=3)
    raw, normed, pmi = [], [], []
    for row, right in zip(QUESTIONS, (1, 1, 1)):
        prompt = tokenizer(row.get("prompt", row.get("question")))["input_ids"]
        texts = row["choices"]["text"] if isinstance(row["choices"], dict) else row["choices"]
        sums = np.array([sum(logs(model, prompt + tokenizer(t)["input_ids"])[len(prompt) - 1:]) for t in texts])
        alone = tokenizer("Answer:")["input_ids"]
        free = np.array([sum(logs(model, alone + tokenizer(" " + t)["input_ids"])[len(alone) - 1:]) for t in texts])
        raw.append(sums.argmax() == right)
        normed.append((sums / [len(t) for t in texts]).argmax() == right)
        pmi.append((sums - free).argmax() == right)
        assert np.allclose(out.rows[len(raw) - 1]["choice_nll"], -sums, rtol=1e-5)
    assert out.metrics["choice_accuracy"] == out.metrics["accuracy"] == np.mean(raw)
    assert out.metrics["choice_accuracy_norm"] == np.mean(normed) and out.metrics["choice_accuracy_pmi"] == np.mean(pmi)
    assert out.rows[1]["right"] == 1 and out.rows[0]["label"] == "another" and len(out.metrics["choice_accuracy_interval"]) == 2
    assert set(evaluate(model, tokenizer, path, metrics=None).metrics) >= {"n", "choice_accuracy"}  # what suits the rows


def test_space_between_prompt_and_choice(base, tmp_path):
    """Asked raw, "which?" goes on as " one"; with white space on one side, or as a chat, it stays as it is."""
    model, tokenizer = base
    rows = [{"prompt": p, "choices": [f"{lead}one", f"{lead}two"], "answer": 0}
            for p, lead in (("which?", ""), ("which? ", ""), ("which?", " "))]
    out = evaluate(model, tokenizer, write(tmp_path / "a.jsonl", rows), metrics=["multiple_choice"])
    prompt = tokenizer("which?")["input_ids"]
    wanted = [-sum(logs(model, prompt + tokenizer(f" {t}")["input_ids"])[len(prompt) - 1:]) for t in ("one", "two")]
    assert np.allclose(out.rows[0]["choice_nll"], wanted, rtol=1e-5) and np.allclose(out.rows[2]["choice_nll"], wanted, rtol=1e-5)
    assert not np.allclose(out.rows[1]["choice_nll"], wanted, rtol=1e-3)
    chat = evaluate(model, tokenizer, tmp_path / "a.jsonl", metrics=["multiple_choice"], config=DataConfig(train="-", chat=True), limit=1)
    same = [{"messages": [{"role": "user", "content": "which?"}], "choices": ["one", "two"], "answer": 0}]
    turn = evaluate(model, tokenizer, write(tmp_path / "b.jsonl", same), metrics=["multiple_choice"])
    assert np.allclose(chat.rows[0]["choice_nll"], turn.rows[0]["choice_nll"], rtol=1e-6)


def test_choices_of_a_conversation(base, tmp_path):
    """The choice is scored as the assistant's turn, without the tokens that end it."""
    model, tokenizer = base
    row = {"messages": [{"role": "user", "content": "which"}], "choices": ["one", "two"], "answer": "two"}
    out = evaluate(model, tokenizer, write(tmp_path / "a.jsonl", [row]), metrics=["multiple_choice"])
    prompt = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, tokenize=False)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    wanted = [-sum(logs(model, ids + tokenizer(t)["input_ids"])[len(ids) - 1:]) for t in ("one", "two")]
    assert np.allclose(out.rows[0]["choice_nll"], wanted, rtol=1e-5)
    assert out.metrics["choice_accuracy_interval"] is None and "two rows" in " ".join(out.notes)  # n = 1


@pytest.mark.parametrize("row, words", [
    ({"prompt": "p", "choices": ["a", "b"], "answer": 2}, "none of the 2 choices"),
    ({"prompt": "p", "choices": ["a", "b"], "answer": "aa"}, "did you mean 'a'"),
    ({"prompt": "p", "choices": ["a"], "answer": 0}, "at least two"), ({"prompt": "p", "choices": ["a", "b"]}, "has no answer"),
    ({"choices": ["a", "b"], "answer": 0}, "no 'prompt'"), ({"prompt": "p", "test": "def check(f): pass"}, "entry_point"),
    ({"prompt": "p", "test": "assert f()", "entry_point": "f()"}, "no name of a function"), ({"prompt": "p", "test": ""}, "Python source"),
])
def test_bad_rows_with_choices_or_tests(tmp_path, row, words):
    with pytest.raises(DataError, match=words) as caught:
        read_tasks(write(tmp_path / "a.jsonl", [row]))
    assert "a.jsonl:1" in str(caught.value)


def test_metrics_that_do_not_suit_the_rows(base, tmp_path):
    plain, tests = {"prompt": "p", "completion": "a"}, {"prompt": "p", "test": "assert True"}
    with pytest.raises(UsageError, match="has no choices"):
        evaluate(*base, write(tmp_path / "a.jsonl", [plain]), metrics=["multiple_choice"])
    with pytest.raises(UsageError, match="off by default"):
        evaluate(*base, write(tmp_path / "b.jsonl", [tests]), metrics=None)
    with pytest.raises(DataError, match="no solution"):
        evaluate(*base, tmp_path / "b.jsonl", metrics=["loss"])
    with pytest.raises(DataError, match="different kinds"):
        evaluate(*base, write(tmp_path / "c.jsonl", [plain, tests]))
    with pytest.raises(DataError, match="no answer that could be a label"):
        evaluate(*base, write(tmp_path / "d.jsonl", [{"text": "only text"}]), metrics=["mcc"])
    with pytest.raises(UsageError, match="no choices"):
        evaluate(tiny.bert_classifier(2), base[1], write(tmp_path / "e.jsonl", [{"text": "x", "label": 0}, {"text": "y", "label": 1}]),
                 metrics=["multiple_choice"])


# -- likelihood ----------------------------------------------------------------------------------------------------------------------
TEXT = "the user reads a note on the end of the list and then another one, as is usual in these notes"


def test_perplexity_in_windows_against_direct_sums(base, tmp_path):
    """Each token once, from the tokens of its window before it; without a stride the row is cut."""
    model, tokenizer = base
    path, ids = write(tmp_path / "a.jsonl", [{"text": TEXT}, {"text": TEXT[:20]}]), tokenizer(TEXT)["input_ids"] + [2]
    window, stride = 12, 5
    terms = list(logs(model, ids[:window]))
    for stop in range(window + stride, len(ids) + stride, stride):
        stop, start = min(stop, len(ids)), stop - window
        terms += logs(model, ids[start:stop])[window - stride - 1:]
    assert len(terms) == len(ids) - 1
    short = logs(model, tokenizer(TEXT[:20])["input_ids"] + [2])[:]
    found = evaluate(model, tokenizer, path, metrics=["loss", "bits_per_byte"], stride=stride, window=window).metrics
    assert found["loss"] == pytest.approx(-np.mean(terms + _windowed(model, tokenizer(TEXT[:20])["input_ids"] + [2], window, stride)),
                                          rel=1e-5)
    size = sum(len(tokenizer.decode(tokenizer(t)["input_ids"][1:])) for t in (TEXT, TEXT[:20]))
    assert found["bytes"] == size and len(found["bits_per_byte_interval"]) == 2
    nll = found["loss"] * (len(terms) + len(short))
    assert found["bits_per_byte"] == pytest.approx(nll / math.log(2) / size, rel=1e-6)
    assert found["byte_perplexity"] == pytest.approx(2 ** found["bits_per_byte"])
    whole = evaluate(model, tokenizer, path, metrics=["loss"], stride=1, window=200).metrics["loss"]
    assert whole == pytest.approx(-np.mean(logs(model, ids) + short), rel=1e-5)
    with pytest.raises(UsageError, match="below --window"):
        evaluate(model, tokenizer, path, metrics=["loss"], stride=12, window=12)
    with pytest.raises(UsageError, match="how much they move"):
        evaluate(model, tokenizer, path, metrics=["loss"], window=12)


def _windowed(model, ids, window, stride):
    terms = list(logs(model, ids[:window]))
    while len(terms) < len(ids) - 1:
        stop = min(len(terms) + 1 + stride, len(ids))
        start = len(terms) + 1 + stride - window
        terms += logs(model, ids[start:stop])[len(terms) - start:]
    return terms


def test_windows_score_each_token_once():
    for length in (3, 12, 13, 30):
        for window, stride in ((12, 5), (12, 11), (4, 1)):
            row = {"input_ids": list(range(length)), "labels": [-100, *range(1, length)]}
            parts = windows(row, window, stride)
            scored = [label for part in parts for label in part["labels"] if label != -100]
            assert scored == list(range(1, length)) and max(len(p["input_ids"]) for p in parts) <= window
            assert all(p["labels"][0] == -100 for p in parts)


def test_bytes_of_scored_tokens(base):
    tokenizer = base[1]
    ids = tokenizer("hi there end")["input_ids"]
    start = len(tokenizer("hi")["input_ids"])
    row = {"input_ids": [*ids, 2], "labels": [-100] * start + ids[start:] + [2]}
    assert scored_bytes(tokenizer, row) == len(" there end")


# -- several grafts in one pass --------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_several_grafts_equal_one_by_one(base, tmp_path):
    """Grafts of different methods and ranks, and the bare base, in the same batches: as each alone."""
    model, tokenizer = base
    grafts = [shaken(model, "a", 1, r=2), shaken(model, "b", 2, r=4), shaken(model, "c", 3, "ia3"), shaken(model, "d", 4, "vera", r=4),
              shaken(model, "e", 5, "prompt")]
    try:
        rows = [{"prompt": p, "completion": c} for p, c in (("hello ", "one"), ("the user ", "and more"), ("in ", "the end"), ("a ", "b"))]
        metrics = ["loss", "exact_match", "token_f1", "bits_per_byte"]
        tasks = read_tasks(write(tmp_path / "a.jsonl", rows))
        targets = {name: [name] * 4 for name in "abcde"} | {"base": [None] * 4}
        seen = []
        hook = model.register_forward_pre_hook(lambda module, *_: seen.append(module.graft_state.current.rows))
        together = compare(model, tokenizer, tasks, targets, metrics=metrics, max_new_tokens=5, batch_size=12)
        hook.remove()
        assert any(rows and len(set(rows)) == 6 for rows in seen)  # one forward does answer for all of them
        for name, routes in targets.items():
            alone = evaluate(model, tokenizer, tasks, metrics=metrics, adapters=routes, max_new_tokens=5, batch_size=1)
            assert [r["prediction"] for r in together.targets[name].rows] == [r["prediction"] for r in alone.rows]
            for key in ("loss", "exact_match", "token_f1", "bits_per_byte"):
                assert together.targets[name].metrics[key] == pytest.approx(alone.metrics[key], rel=1e-5), (name, key)
        assert len({round(t.metrics["loss"], 6) for t in together.targets.values()}) == 6
        gap = next(d for d in together.differences if d["b"] == "c" and d["metric"] == "loss")
        assert gap["difference"] == pytest.approx(together.targets["a"].metrics["loss"] - together.targets["c"].metrics["loss"])
        assert gap["n"] == 4 and gap["interval"][0] <= gap["difference"] <= gap["interval"][1] and 0 <= gap["above"] <= 1
        with pytest.raises(UsageError, match="told apart"):
            compare(model, tokenizer, tasks, {"a": ["a"] * 4, "now": None})
    finally:
        for graft in grafts:
            graft.detach()


@pytest.mark.slow
def test_classifiers_with_heads_of_their_own(tmp_path):
    """Two grafts, each with its trained head, in one batch."""
    model, tokenizer = tiny.bert_classifier(3), tiny.tokenizer()
    rows = [{"text": f"row {i} of the test", "label": i % 3} for i in range(7)]
    tasks = read_tasks(write(tmp_path / "a.jsonl", rows))
    grafts = [shaken(model, name, k, r=2, modules_to_save=["classifier"]) for k, name in enumerate("ab")]
    try:
        assert all(graft.saved_modules for graft in grafts)
        both = compare(model, tokenizer, tasks, {name: [name] * 7 for name in "ab"}, metrics=["loss", "mcc"], batch_size=4)
        for name in "ab":
            alone = evaluate(model, tokenizer, tasks, metrics=["loss", "mcc"], adapters=name, batch_size=1)
            for key in ("loss", "mcc", "accuracy", "macro_f1"):
                assert both.targets[name].metrics[key] == pytest.approx(alone.metrics[key], rel=1e-5), (name, key)
        assert both.targets["a"].metrics["loss"] != both.targets["b"].metrics["loss"]
    finally:
        for graft in grafts:
            graft.detach()


# -- labels that are written -----------------------------------------------------------------------------------------------------------
def test_labels_of_written_answers(base, tmp_path):
    """An accepted answer stands for the row's label, another label is a wrong one, anything else no label."""
    model, tokenizer = base
    prompts = ["hello ", "the user ", "in the ", "a note on "]
    said = [c.text.strip() for c in generate(model, tokenizer, prompts, max_new_tokens=4)]
    assert len(set(said)) > 1 and all(said), said
    wanted = [said[0], said[0] if said[1] != said[0] else said[2], "nothing of it", "x"]
    rows = [{"prompt": p, "completion": w} for p, w in zip(prompts, wanted)]
    rows[3]["refs"] = [said[3]]
    out = evaluate(model, tokenizer, write(tmp_path / "a.jsonl", rows), metrics=["accuracy", "mcc"], max_new_tokens=4)
    assert [r["label_predicted"] for r in out.rows][0] == said[0] and out.rows[3]["label_predicted"] == "x"
    assert out.metrics["accuracy"] == np.mean([r["label"] == r["label_predicted"] for r in out.rows]) >= 0.5
    with pytest.raises(DataError, match="none of --labels"):
        evaluate(model, tokenizer, tmp_path / "a.jsonl", metrics=["accuracy"], labels=["x", said[0]], max_new_tokens=4)


# -- what is kept of an interrupted evaluation -------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_journal_is_taken_up_and_never_mistaken(base, tmp_path, monkeypatch):
    from graftwork.evaluation.observers import answers as observer

    model, tokenizer = base
    rows = [{"prompt": f"row {i} of ", "completion": "x"} for i in range(20)]
    path, journal = write(tmp_path / "a.jsonl", rows), tmp_path / "out.journal"
    asked = {"metrics": ["exact_match"], "max_new_tokens": 3, "batch_size": 1, "journal": journal, "identity": "one"}
    counted, real = [], observer.generate

    def interrupted(model, tokenizer, prompts, **options):
        counted.append(len(prompts))
        if len(counted) == 3:
            raise KeyboardInterrupt
        return real(model, tokenizer, prompts, **options)

    monkeypatch.setattr(observer, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, tokenizer, path, **asked)
    assert counted == [8, 8, 4] and len(journal.read_text().splitlines()) == 16
    with open(journal, "a") as file:
        file.write('{"key": "torn')
    found = evaluate(model, tokenizer, path, **asked)
    assert counted[3:] == [4] and "16 of 20 answers were written before" in found.notes
    monkeypatch.setattr(observer, "generate", real)
    fresh = evaluate(model, tokenizer, path, **{**asked, "journal": None})
    assert [r["prediction"] for r in found.rows] == [r["prediction"] for r in fresh.rows]
    for change in ({"identity": "two"}, {"max_new_tokens": 2}, {"stop": ["q"]}):
        assert not any("written before" in note for note in evaluate(model, tokenizer, path, **{**asked, **change}).notes), change
    assert evaluate(model, tokenizer, path, config=DataConfig(train="-", skip_bad=True), **asked).notes == [
        "20 of 20 answers were written before"]


def test_every_metric_is_in_the_guide():
    from pathlib import Path

    from graftwork.evaluation.families.base import known

    guide = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text(encoding="utf-8")
    table = [line for line in guide.splitlines() if line.startswith("| `")]
    assert not [name for name in known() if not any(f"`{name}`" in line.split("|")[1] for line in table)]


def test_empty_list_of_rows_has_no_likelihoods(base):
    assert likelihoods(*base, [], None, batch_size=4) == []
