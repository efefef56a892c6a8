"""Scores: against hand-made answers, logits and scipy; the verb on runs, artifacts, fleets, classifiers and bare models."""

import json
import math

import numpy as np
import pytest
import scipy.stats
import torch

import graftwork
import tiny
from graftwork.data import DataConfig
from graftwork.errors import DataError, IncompatibleError, UsageError
from graftwork.evaluation import bootstrap_interval, evaluate, extract, macro_f1, matches, read_tasks
from graftwork.evaluation.metrics import pattern
from graftwork.serving.generate import generate


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# -- metrics -----------------------------------------------------------------------------------------------------------------
def test_matches_and_extraction():
    assert matches(" yes \n", ["no", "yes"]) and not matches("yes.", ["yes"]) and not matches("Yes", ["yes"])
    gsm = pattern(r"####\s*(\S+)")
    assert extract("1 #### 2\nthen #### 42", gsm) == "42" and extract("none", gsm) is None
    assert matches("so #### 42", ["other words\n#### 42"], gsm) and matches("so #### 42", ["42"], gsm)
    assert not matches("42", ["#### 42"], gsm) and not matches("#### 4", ["#### 42"], gsm)
    assert extract("a1b22", pattern(r"\d+")) == "22"
    with pytest.raises(UsageError, match="no regular expression"):
        pattern("(")


def test_bootstrap_interval_equals_the_binomial_quantiles():
    """Resampling 0/1 rows makes the mean Binomial(n, p) / n: its quantiles are known."""
    values = [1] * 60 + [0] * 140
    low, high = bootstrap_interval(values, resamples=20000)
    wanted = scipy.stats.binom(200, 0.3).ppf([0.025, 0.975]) / 200
    assert np.allclose([low, high], wanted, atol=0.011)
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval([1, 1]) == [1.0, 1.0]


def test_macro_f1_by_hand():
    """Class 0: precision 1/2, recall 1/1; class 1: 1/1, 1/2; class 2: 1, 1."""
    assert macro_f1([0, 0, 1, 2], [0, 1, 1, 2]) == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert macro_f1([0, 0], [1, 1]) == 0


# -- rows ----------------------------------------------------------------------------------------------------------------------
def test_rows_with_several_answers(tmp_path):
    rows = [{"prompt": "p", "completion": "a"}, {"prompt": "p", "completion": "a", "refs": ["b", "a"]},
            {"prompt": "p", "completion": ["a", "b"]}, {"prompt": "p", "refs": ["c", "d"]},
            {"prompt": "p", "completion": "long #### 4", "answers": ["4"]}]
    tasks = read_tasks(write(tmp_path / "a.jsonl", rows))
    assert [t.answers for t in tasks] == [("a",), ("a", "b"), ("a", "b"), ("c", "d"), ("long #### 4", "4")]
    assert [t.example.completion for t in tasks] == ["a", "a", "a", "c", "long #### 4"]
    tasks = read_tasks(write(tmp_path / "b.jsonl", [{"instruction": "i", "outputs": ["x", "y"]}]))
    assert tasks[0].answers == ("x", "y") and tasks[0].example.messages[-1]["content"] == "x"
    mapped = DataConfig(train="-", columns={"prompt": "mr", "completion": "ref"})  # training rows have ref, test rows refs
    tasks = read_tasks(write(tmp_path / "c.jsonl", [{"mr": "name[X]", "refs": ["X.", "It is X."]}]), mapped)
    assert tasks[0].answers == ("X.", "It is X.") and tasks[0].example.prompt == "name[X]"
    chat = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "one"}, {"role": "user", "content": "v"},
            {"role": "assistant", "content": "two"}]
    assert read_tasks(write(tmp_path / "d.jsonl", [{"messages": chat}]))[0].answers == ("two",)


def test_bad_rows_name_their_line(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "p", "completion": "a"}, {"prompt": "p"}])
    with pytest.raises(DataError, match=r"a\.jsonl:2: .*completion"):
        read_tasks(path)
    assert len(read_tasks(path, DataConfig(train="-", skip_bad=True))) == 1
    with pytest.raises(DataError, match="adapter"):
        read_tasks(write(tmp_path / "b.jsonl", [{"prompt": "p", "completion": "a", "adapter": 3}]))


# -- scores of a model ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def copycat():
    """A tiny Llama and completion rows of which it answers the first three as wanted."""
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    prompts = ["hello ", "the user ", "a note on ", "in the "]
    written = [c.text for c in generate(model, tokenizer, prompts, max_new_tokens=6)]
    return model, tokenizer, [{"prompt": p, "completion": w} for p, w in zip(prompts, written)]


def test_exact_match_counts_accepted_answers(copycat, tmp_path):
    """The model writes on to max_new_tokens, so its own six tokens are the answer."""
    model, tokenizer, rows = copycat
    rows = [dict(row) for row in rows]
    rows[1].update(completion="something else", refs=[rows[1]["completion"] + "\n"])
    rows[3]["completion"] = "wrong"
    out = evaluate(model, tokenizer, write(tmp_path / "a.jsonl", rows), max_new_tokens=6, batch_size=3)
    assert [r["correct"] for r in out.rows] == [True, True, True, False]
    assert out.metrics["exact_match"] == 0.75 and out.metrics["n"] == 4
    low, high = out.metrics["exact_match_interval"]
    assert low < 0.75 < high <= 1
    assert out.rows[3]["references"] == ["wrong"] and out.rows[3]["source"].endswith("a.jsonl:4")
    first = evaluate(model, tokenizer, tmp_path / "a.jsonl", max_new_tokens=6, limit=3, metrics=["exact_match"])
    assert first.metrics["exact_match"] == 1 and "loss" not in first.metrics
    assert "exact_match" not in evaluate(model, tokenizer, tmp_path / "a.jsonl", metrics=["loss"]).metrics
    shown = []
    evaluate(model, tokenizer, tmp_path / "a.jsonl", max_new_tokens=2, progress=lambda *a: shown.append(a))
    assert ("loss", 4, 4) in shown and ("answers", 4, 4) in shown


def test_loss_against_logits_row_by_row(copycat, tmp_path):
    """Mean over all answer tokens (end token included), from plain logits without padding."""
    model, tokenizer, rows = copycat
    out = evaluate(model, tokenizer, write(tmp_path / "a.jsonl", rows), metrics=["loss"], batch_size=3)
    terms = []
    for row in rows:
        prompt, answer = tokenizer(row["prompt"])["input_ids"], tokenizer(row["completion"])["input_ids"]
        answer.append(tokenizer.eos_token_id)
        with torch.no_grad():
            logs = model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
        terms += [-logs[len(prompt) - 1 + k, token].item() for k, token in enumerate(answer)]
    assert out.metrics["loss"] == pytest.approx(np.mean(terms), rel=1e-5)
    assert out.metrics["perplexity"] == pytest.approx(math.exp(np.mean(terms)), rel=1e-5)


def test_prompt_of_a_conversation_is_what_training_saw(tmp_path):
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "one"}, {"role": "user", "content": "on"}]
    answer = generate(model, tokenizer, [chat], max_new_tokens=5)[0].text
    row = {"messages": [*chat, {"role": "assistant", "content": answer}]}
    out = evaluate(model, tokenizer, write(tmp_path / "a.jsonl", [row]), max_new_tokens=5)
    assert out.metrics["exact_match"] == 1
    other = evaluate(model, tokenizer, tmp_path / "a.jsonl", config=DataConfig(train="-", system="be brief"), max_new_tokens=5)
    assert other.metrics["loss"] != out.metrics["loss"] and other.rows[0]["prediction"] != answer


def test_answers_get_the_room_they_need(copycat, tmp_path):
    model, tokenizer, rows = copycat
    path = write(tmp_path / "a.jsonl", [{**rows[0], "refs": ["x" * 30]}])
    assert evaluate(model, tokenizer, path).metrics["max_new_tokens"] == len(tokenizer("x" * 30)["input_ids"]) + 8
    assert evaluate(model, tokenizer, path, extract="x+").metrics["max_new_tokens"] == 256


def test_adapters_per_row(copycat, tmp_path):
    """Mixed rows: each row's loss and answer under its own graft; the bare base among them."""
    model, tokenizer, rows = copycat
    path = write(tmp_path / "a.jsonl", rows)
    bare = evaluate(model, tokenizer, path, max_new_tokens=6)
    grafts = [graftwork.attach(model, "lora", r=2, name=name) for name in ("a", "b")]
    try:
        with torch.no_grad():
            for k, graft in enumerate(grafts):
                for parameter in graft.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(k)) * 0.3)
        alone = {name: evaluate(model, tokenizer, path, adapters=name, max_new_tokens=6) for name in ("a", "b")}
        base = evaluate(model, tokenizer, path, adapters=[None] * 4, max_new_tokens=6)
        assert base.metrics["loss"] == pytest.approx(bare.metrics["loss"], rel=1e-6) and base.metrics["exact_match"] == 1
        names = ["a", None, "b", "a"]
        mixed = evaluate(model, tokenizer, path, adapters=names, max_new_tokens=6)
        sources = {None: base, **alone}
        assert [r["prediction"] for r in mixed.rows] == [sources[n].rows[i]["prediction"] for i, n in enumerate(names)]
        assert len({e.metrics["loss"] for e in (bare, *alone.values(), mixed)}) == 4
        single = [evaluate(model, tokenizer, read_tasks(path)[i:i + 1], adapters=[n], metrics=["loss"]).metrics["loss"]
                  for i, n in enumerate(names)]
        counts = [len(tokenizer(r["completion"])["input_ids"]) + 1 for r in rows]
        assert mixed.metrics["loss"] == pytest.approx(np.average(single, weights=counts), rel=1e-5)
    finally:
        for graft in grafts:
            graft.detach()


def test_plain_text_has_a_loss_only(tmp_path):
    out = evaluate(tiny.llama(), tiny.tokenizer(), write(tmp_path / "a.jsonl", [{"text": "hello there"}, {"text": "more"}]))
    assert out.metrics["loss"] > 0 and "exact_match" not in out.metrics and "only the loss" in " ".join(out.notes)


def test_classifier_scores_against_its_logits(tmp_path):
    model, tokenizer = tiny.bert_classifier(3), tiny.tokenizer()
    rows = [{"text": f"row {i} of the test", "label": i % 3} for i in range(10)]
    out = evaluate(model, tokenizer, write(tmp_path / "a.jsonl", rows), batch_size=4)
    with torch.no_grad():
        logits = torch.cat([model(**tokenizer(r["text"], return_tensors="pt")).logits for r in rows]).double()
    wanted = torch.tensor([r["label"] for r in rows])
    assert out.metrics["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, wanted).item(), rel=1e-5)
    assert out.metrics["accuracy"] == out.metrics["exact_match"] == (logits.argmax(-1) == wanted).double().mean().item()
    assert [r["prediction"] for r in out.rows] == [str(k) for k in logits.argmax(-1).tolist()]
    assert out.metrics["n"] == 10 and out.metrics["labels"] == ["0", "1", "2"] and len(out.metrics["accuracy_interval"]) == 2
    named = write(tmp_path / "b.jsonl", [{"text": r["text"], "label": "xyz"[r["label"]]} for r in rows])
    turned = evaluate(model, tokenizer, named, labels=["z", "y", "x"])
    right = (logits.argmax(-1) == 2 - wanted).double().mean().item()
    assert turned.metrics["accuracy"] == right


@pytest.mark.parametrize("build, rows, words", [
    (tiny.llama, [{"text": "x", "label": 0}], "no score head"),
    (tiny.bert_classifier, [{"prompt": "x", "completion": "y"}], "classifies"),
])
def test_rows_of_another_kind(tmp_path, build, rows, words):
    with pytest.raises(IncompatibleError, match=words):
        evaluate(build(), tiny.tokenizer(), write(tmp_path / "a.jsonl", rows))


def test_unknown_metric_and_labels(copycat, tmp_path):
    with pytest.raises(UsageError, match="did you mean 'loss'"):
        evaluate(*copycat[:2], write(tmp_path / "a.jsonl", copycat[2]), metrics=["los"])
    with pytest.raises(UsageError, match="3 classes, the rows have 2 labels"):
        rows = [{"text": "x", "label": "a"}, {"text": "y", "label": "b"}]
        evaluate(tiny.bert_classifier(3), tiny.tokenizer(), write(tmp_path / "b.jsonl", rows))


# -- the verb --------------------------------------------------------------------------------------------------------------------
def verb(capsys, *arguments, code=None):
    """What the verb printed; code: the exit it is expected to leave by."""
    from graftwork.cli.main import main

    if code is None:
        main(["eval", *map(str, arguments)])
    else:
        with pytest.raises(SystemExit) as leave:
            main(["eval", *map(str, arguments)])
        assert leave.value.code == code
    return capsys.readouterr()


def scores(capsys, *arguments):
    return json.loads(verb(capsys, *arguments, "--json", "--quiet").out)["metrics"]


ANSWERS = [{"prompt": f"say {w} ", "completion": w} for w in ("one", "two", "the", "end")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Real runs on a tiny base: a graft on NF4 that learned its four rows, a fleet, a classifier, full tuning."""
    from graftwork.training import train_recipe

    root = tmp_path_factory.mktemp("runs")
    tiny.save(tiny.llama(), root / "model")
    tiny.save(tiny.bert_classifier(2), root / "bert")
    write(root / "rows.jsonl", ANSWERS)
    (root / "customers").mkdir()
    for name, row in zip(("anna", "ben"), ANSWERS):
        write(root / "customers" / f"{name}.jsonl", [row])
    labels = {"good": "pos", "bad": "neg", "fine": "pos", "ill": "neg"}
    write(root / "labels.jsonl", [{"text": text, "label": label} for text, label in labels.items()])

    def train(name, **recipe):
        settings = {"max_steps": 3, "batch_size": 4, "precision": "fp32", "save_steps": 0, "schedule": "constant",
                    **recipe.pop("train", {})}
        train_recipe({"model": str(root / "model"), "data": {"train": str(root / "rows.jsonl")}, "train": settings,
                      "output_dir": str(root / name), "optimizer": {"method": "adamw", "lr": 0.02}, **recipe},
                     quiet=True, measure=False)

    train("one", storage="nf4", adapter={"method": "lora", "r": 8}, train={"max_steps": 25})
    train("fleet", adapter={"method": "lora", "r": 2}, data={"train": str(root / "customers" / "*.jsonl")},
          train={"batch_size": 1})
    train("full", adapter=None)
    train("class", model=str(root / "bert"), adapter={"method": "lora", "r": 2}, objective="classification",
          data={"train": str(root / "labels.jsonl")})
    return root


@pytest.mark.slow
def test_verb_scores_a_run_and_its_artifact(runs, capsys):
    rows = runs / "rows.jsonl"
    found = scores(capsys, runs / "one", "--data", rows)
    assert found["exact_match"] == 1.0 and found["n"] == 4 and found["loss"] < 0.5
    artifact = scores(capsys, runs / "one" / "graft", "--data", rows)
    base = scores(capsys, runs / "one", "--base", "--data", rows)
    assert artifact["loss"] == pytest.approx(found["loss"], rel=1e-6) and base["loss"] > 2
    bare = scores(capsys, "--model", runs / "model", "--storage", "nf4", "--dtype", "fp32", "--data", rows)
    assert bare["loss"] == pytest.approx(base["loss"], rel=1e-6)
    dense = scores(capsys, runs / "one", "--storage", "dense", "--data", rows, "--metrics", "loss")
    assert dense["loss"] != found["loss"] and "exact_match" not in dense
    twice = json.loads(verb(capsys, runs / "one", "--graft", f"two={runs / 'one'}", "--base", "--data", rows, "--json", "--quiet").out)
    assert list(twice["targets"]) == ["one", "two", "base"] and twice["metrics"]["loss"] == pytest.approx(found["loss"], rel=1e-6)
    assert twice["targets"]["base"]["loss"] == pytest.approx(base["loss"], rel=1e-6)
    assert all(d["difference"] == 0 and d["interval"] == [0, 0] for d in twice["differences"] if d["b"] == "two")
    assert "fleet" in verb(capsys, runs / "fleet", "--graft", runs / "one", "--data", rows, code=2).err
    full = scores(capsys, runs / "full", "--data", rows)
    assert full["loss"] == pytest.approx(scores(capsys, runs / "full" / "model", "--data", rows)["loss"], rel=1e-5)


@pytest.mark.slow
def test_verb_prints_and_writes(runs, capsys, tmp_path):
    out = verb(capsys, runs / "one", "--data", runs / "rows.jsonl", "--max-new-tokens", 1, "--output", tmp_path / "p.jsonl")
    assert "exact_match" in out.out and "a wrong row" in out.out and "answers: 4 of 4 rows" in out.err
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and {"prediction", "references", "correct", "source"} <= set(rows[0])
    extracted = scores(capsys, runs / "one", "--data", runs / "rows.jsonl", "--extract", r"^(\w)", "--max-new-tokens", 1)
    assert extracted["exact_match"] == 1.0
    cut = scores(capsys, runs / "one", "max_length=8", "--data", runs / "rows.jsonl", "--metrics", "loss")
    assert cut["loss"] != scores(capsys, runs / "one", "--data", runs / "rows.jsonl", "--metrics", "loss")["loss"]


@pytest.mark.slow
def test_verb_scores_a_fleet(runs, capsys, tmp_path):
    everything = json.loads(verb(capsys, runs / "fleet", "--data", runs / "customers" / "*.jsonl", "--json", "--quiet").out)
    assert set(everything["adapters"]) == {"anna", "ben"} and everything["metrics"]["n"] == 2
    own = {name: scores(capsys, runs / "fleet", "--adapter", name, "--data", runs / "customers" / f"{name}.jsonl")
           for name in ("anna", "ben")}
    named = write(tmp_path / "mixed.jsonl", [{**ANSWERS[0], "adapter": "anna"}, {**ANSWERS[1], "adapter": "ben"}])
    mixed = scores(capsys, runs / "fleet", "--data", named)
    assert mixed["loss"] == pytest.approx(everything["metrics"]["loss"], rel=1e-6)
    assert min(s["loss"] for s in own.values()) <= mixed["loss"] <= max(s["loss"] for s in own.values())
    assert "name the files after the adapters" in verb(capsys, runs / "fleet", "--data", runs / "rows.jsonl", code=1).err


@pytest.mark.slow
def test_verb_scores_a_classifier(runs, capsys):
    found = scores(capsys, runs / "class", "--data", runs / "labels.jsonl")
    assert found["labels"] == ["neg", "pos"] and found["n"] == 4 and 0 <= found["accuracy"] <= 1 and "macro_f1" in found


@pytest.mark.parametrize("arguments, code, words", [
    ((), 2, "nothing to evaluate"), (("{runs}/onee", "--data", "{runs}/rows.jsonl"), 2, "did you mean"),
    (("{runs}/one",), 2, "--data FILE"), (("{runs}/one", "--data", "{runs}/row.jsonl"), 1, "no data file"),
    (("{runs}/one", "max_lenght=3", "--data", "{runs}/rows.jsonl"), 2, "did you mean 'max_length'"),
    (("{runs}/fleet", "--adapter", "annа", "--data", "{runs}/rows.jsonl"), 2, "did you mean 'anna'"),
    (("{runs}/customers", "--data", "{runs}/rows.jsonl"), 2, "neither a run"),
    (("{runs}/one", "--data", "{runs}/rows.jsonl", "--extract", "("), 2, "no regular expression"),
])
@pytest.mark.slow
def test_verb_errors(runs, capsys, arguments, code, words):
    out = verb(capsys, *[a.format(runs=runs) for a in arguments], code=code)
    assert words in out.err and "Traceback" not in out.err and out.out == ""
