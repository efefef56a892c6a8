"""Regression heads: rows, objective, recipe, plan, training, scores, merging; against scipy, scikit-learn, Transformers, float64 sums."""

import json
import math

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch

import graftwork
import tiny
from graftwork.data import DataConfig, build, build_splits
from graftwork.errors import DataError, IncompatibleError, RecipeError, UsageError
from graftwork.evaluation import compare, evaluate, read_tasks
from graftwork.modeling.models import load_model
from graftwork.objectives.regression import RegressionObjective
from graftwork.recipe import load_recipe
from graftwork.training.evaluate import evaluate_loss
from test_evaluation import scores, verb
from training_support import WORDS, folder, recipe, run, words, write_rows

VALUES = {word: (i % 4) / 2 for i, word in enumerate(WORDS)}


def rated(path, n=32, seed=0, **more):
    """Texts of two words and the sum of their values."""
    texts = [words(seed * 1000 + i, 2) for i in range(n)]
    return write_rows(path, [{"text": text, "label": sum(VALUES[w] for w in text.split()), **more} for text in texts])


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("base")


# -- rows ----------------------------------------------------------------------------------------------------------------
def test_rows_of_every_spelling(tmp_path, tokenizer):
    lines = [{"sentence1": "the user", "sentence2": "in the", "label": 3.8}, {"text": "and", "label": 2}, {"text": "her", "label": "-1e-1"}]
    data = build(tokenizer, write_rows(tmp_path / "a.jsonl", lines), format="regression")
    assert [row["labels"] for row in data] == [3.8, 2.0, -0.1] and data.real and data.label_names is None
    assert data[0]["input_ids"] == tokenizer("the user", "in the")["input_ids"]
    batch = data.collator()([data[i] for i in range(3)])
    assert batch["labels"].dtype == torch.float32 and batch["labels"].tolist() == pytest.approx([3.8, 2.0, -0.1])
    table = tmp_path / "a.csv"
    table.write_text("text,label\nthe user,3.80\nin,4\n")
    assert [row["labels"] for row in build(tokenizer, table, format="regression")] == [3.8, 4.0]
    other = build(tokenizer, write_rows(tmp_path / "b.jsonl", [{**lines[0], "label": 3.9}, *lines[1:]]), format="regression")
    assert other.digest != data.digest  # a difference behind the point is one


@pytest.mark.parametrize("label, words_of_error, remedy", [
    (None, "is empty", "skip_bad"), ("", "is empty", "fill it"), (True, "must be a number", "3.8"), ([1.0], "must be a number", "3.8"),
    ("good", "'good', which is no number", "objective: classification"), ("3,8", "no number", "not a comma"),
    ("1_000", "no number", "3.8"), (math.nan, "nan, and what is learned must be a finite number", "skip_bad"),
    ("inf", "finite", "skip_bad"), (1e39, "finite number below", "mend"), (10**400, "finite", "mend"), ("nan", "finite", "mend")])
def test_bad_labels_name_file_line_and_remedy(tmp_path, tokenizer, label, words_of_error, remedy):
    file = write_rows(tmp_path / "a.jsonl", [{"text": "the", "label": 0.5}, {"text": "in", "label": label}])
    with pytest.raises(DataError, match="a.jsonl:2: ") as error:
        build(tokenizer, file, format="regression")
    assert words_of_error in error.value.message and remedy in error.value.remedy
    skipped = build(tokenizer, file, format="regression", skip_bad=True)
    assert len(skipped) == 1 and skipped.statistics.skipped == 1


def test_missing_label_and_column(tmp_path, tokenizer):
    file = write_rows(tmp_path / "a.jsonl", [{"text": "the", "lable": 0.5}])
    with pytest.raises(DataError, match="field 'label' of format 'regression' is missing.*did you mean 'lable'"):
        build(tokenizer, file, format="regression")
    assert build(tokenizer, file, format="regression", columns={"label": "lable"})[0]["labels"] == 0.5


def test_auto_tells_real_numbers_from_classes(tmp_path, tokenizer):
    assert build(tokenizer, rated(tmp_path / "a.jsonl", 4)).real
    assert build(tokenizer, write_rows(tmp_path / "b.jsonl", [{"text": "the", "label": 3}])).label_names is not None
    mixed = write_rows(tmp_path / "c.jsonl", [{"text": "the", "label": 3}, {"text": "in", "label": 3.8}])
    with pytest.raises(DataError, match="c.jsonl:2: 'label' is 3.8, and a class is a whole number") as error:
        build(tokenizer, mixed)
    assert "objective: regression" in error.value.remedy and len(build(tokenizer, mixed, format="regression")) == 2
    with pytest.raises(DataError, match="is a class, that of .* is a real number"):
        build(tokenizer, [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")])
    with pytest.raises(DataError, match="is a real number, that of .* is a class"):
        build(tokenizer, [str(tmp_path / "b.jsonl"), str(tmp_path / "a.jsonl")])
    with pytest.raises(DataError, match="regression rows are mixed"):
        build(tokenizer, [str(tmp_path / "a.jsonl"), str(write_rows(tmp_path / "d.jsonl", [{"text": "x"}]))])
    with pytest.raises(UsageError, match="regression rows"):
        build(tokenizer, tmp_path / "a.jsonl", packing=True)


def test_splits_and_what_is_said_of_the_labels(tmp_path, tokenizer):
    train, held = build_splits(DataConfig(train=str(rated(tmp_path / "a.jsonl", 20)), eval_fraction=0.25), tokenizer)
    assert train.real and held.real and len(held) >= 4 and len(train) + len(held) == 20 and not train.statistics.notes
    large = write_rows(tmp_path / "b.jsonl", [{"text": words(i, 3), "label": 1000.5 * i} for i in range(4)])
    assert "from 0 to 3001.5" in build_splits(DataConfig(train=str(large)), tokenizer)[0].statistics.notes[0]
    flat = write_rows(tmp_path / "c.jsonl", [{"text": words(i, 3), "label": 0.5} for i in range(4)])
    assert "all 4 labels are 0.5" in build_splits(DataConfig(train=str(flat)), tokenizer)[0].statistics.notes[0]


# -- model and objective ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_loss_is_that_of_transformers(base, tokenizer, kind):
    """Mean squared error as the model's own forward has it under problem_type regression, and by hand in float64."""
    model, _ = load_model(folder(base, kind), task="regression")
    assert model.config.num_labels == 1 and model.config.problem_type == "regression" and model.graft_new_weights
    texts, labels = [words(i, 2 + i % 4) for i in range(6)], torch.tensor([0.1, -2.0, 1.5, 3.25, 0.0, 7.0])
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    batch, objective = {**inputs, "labels": labels}, RegressionObjective()
    out = objective.loss(model, batch, 1 / objective.targets(batch))
    own = model(**inputs, labels=labels)
    torch.testing.assert_close(out.loss, own.loss)
    by_hand = (own.logits[:, 0].double() - labels.double()).square()
    assert out.loss.item() == pytest.approx(by_hand.mean().item(), rel=1e-6)
    torch.testing.assert_close(out.row_loss.double(), by_hand, rtol=1e-5, atol=1e-6)
    head = [p for n, p in model.named_parameters() if n in model.graft_new_weights]
    whole = torch.autograd.grad(out.loss, head)
    parts = [{k: v[part] for k, v in batch.items()} for part in (slice(0, 2), slice(2, 6))]
    added = [sum(g) for g in zip(*(torch.autograd.grad(objective.loss(model, part, 1 / 6).loss, head) for part in parts))]
    for a, b in zip(whole, added):
        torch.testing.assert_close(a, b)


def test_means_over_batches_against_scipy(base, tmp_path, tokenizer):
    model, _ = load_model(folder(base, "bert"), task="regression")
    data = build(tokenizer, rated(tmp_path / "a.jsonl", 13))
    found = evaluate_loss(model, RegressionObjective(), data, batch_size=4)
    with torch.no_grad():
        gave = [model(input_ids=torch.tensor([row["input_ids"]])).logits.item() for row in data]
    wanted = [row["labels"] for row in data]
    assert found["loss"] == pytest.approx(sklearn.metrics.mean_squared_error(wanted, gave), rel=1e-5)
    assert found["rmse"] == pytest.approx(math.sqrt(found["loss"])) and found["n"] == 13
    assert found["pearson"] == pytest.approx(scipy.stats.pearsonr(gave, wanted).statistic, rel=1e-4)
    flat = write_rows(tmp_path / "b.jsonl", [{"text": words(i, 3), "label": 0.1} for i in range(5)])
    assert "pearson" not in evaluate_loss(model, RegressionObjective(), build(tokenizer, flat))


def test_heads_and_labels_of_another_kind(base, tokenizer):
    inputs = tokenizer(["the", "in her"], padding=True, return_tensors="pt")
    with pytest.raises(IncompatibleError, match="one output, this one has 3"):
        RegressionObjective().loss(tiny.bert_classifier(3), {**inputs, "labels": torch.tensor([0.1, 0.2])})
    with pytest.raises(IncompatibleError, match="tokens of the rows"):
        RegressionObjective().loss(tiny.bert_classifier(1), {**inputs, "labels": inputs["input_ids"]})
    with pytest.raises(UsageError, match="one label per row"):
        RegressionObjective().loss(tiny.bert_classifier(1), {**inputs, "labels": torch.tensor([0.1])})
    with pytest.raises(UsageError, match="one output, not 3"):
        load_model(folder(base, "bert"), task="regression", num_labels=3, fake=True)


# -- recipe and plan -------------------------------------------------------------------------------------------------------
def test_recipe_reads_real_numbers_and_refuses_what_has_none(base, tmp_path):
    model, file = folder(base, "bert"), tmp_path / "a.csv"
    made = load_recipe(recipe(model, file, tmp_path / "o", objective="regression"))
    assert made.data.format == "regression" and load_recipe(made.document()).data.format == "regression"
    cases = [({"objective": "regression", "data": {"format": "completion"}}, "format completion have none", "data.format: regression"),
             ({"objective": "classification", "data": {"format": "regression"}}, "classification learns none", "objective: regression"),
             ({"data": {"format": "regression"}}, "causal_lm learns none", "objective: regression"),
             ({"objective": "regression", "data": {"packing": True}}, "scores whole rows", "packing: false"),
             ({"objective": {"method": "metric", "metric": "f1"}, "estimator": "mezo", "optimizer": None, "data": {"format": "regression"}},
              "F1 is over classes", "accuracy")]
    for sections, why, fix in cases:
        document = recipe(model, file, tmp_path / "o", **sections)
        if "optimizer" in sections:
            del document["optimizer"]
        with pytest.raises(RecipeError) as error:
            load_recipe(document)
        assert why in str(error.value) and fix in str(error.value), str(error.value)
    with pytest.raises(RecipeError, match="is no field of format 'regression'"):
        load_recipe(recipe(model, file, tmp_path / "o", objective="regression", data={"columns": {"prompt": "q"}}))


def test_real_labels_want_the_objective(base, tmp_path):
    for objective, words_of_error in (("classification", "learns classes"), ("causal_lm", "predicts tokens")):
        with pytest.raises(DataError, match=words_of_error) as error:
            run(recipe(folder(base, "llama"), rated(tmp_path / "a.jsonl", 4), tmp_path / objective, objective=objective))
        assert "objective: regression" in error.value.remedy


@pytest.mark.slow
def test_plan_counts_the_new_head_as_trained(base, tmp_path):
    document = recipe(folder(base, "llama"), rated(tmp_path / "a.jsonl", 8), tmp_path / "o", objective="regression")
    trained = sum(p.numel() for p in run(document).grafts[0].parameters())
    for each in (document, {**document, "data": {"train": str(tmp_path / "none.jsonl"), "max_length": 64}}):  # of rows, and of a shape
        assert graftwork.plan(each, estimate_time=False).trained == trained


# -- training, saving, scoring ------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("kind, full", [("bert", False), ("llama", False), ("llama", True)])
def test_a_head_learns_and_is_found_again(base, tmp_path, capsys, kind, full):
    data, held = rated(tmp_path / "d.jsonl", 128), rated(tmp_path / "h.jsonl", 24, seed=7)
    document = recipe(folder(base, kind), data, tmp_path / "o", objective="regression", data={"eval": str(held)},
                      optimizer={"method": "adamw", "lr": 3e-3 if full else 1e-2}, train={"max_steps": 60, "batch_size": 32},
                      adapter=None if full else {"method": "lora", "r": 8})
    result = run(document)
    spread = np.var([json.loads(line)["label"] for line in held.read_text().splitlines()])
    assert result.metrics["eval_pearson"] > 0.9 and result.metrics["eval_loss"] < 0.2 * spread and "eval_perplexity" not in result.metrics
    if full:
        config = json.loads((tmp_path / "o" / "model" / "config.json").read_text())
        assert config["problem_type"] == "regression" and config["architectures"] == ["LlamaForSequenceClassification"]
    else:
        head = {"llama": "score", "bert": "classifier"}[kind]
        card = json.loads((tmp_path / "o" / "graft" / "graft.json").read_text())
        assert any(key.startswith(f"modules_to_save.{head}") for key in card["tensors"]) and card["provenance"]["labels"] is None
    found = scores(capsys, tmp_path / "o", "--output", tmp_path / "rows.jsonl", "--metrics", "mae")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    gave, wanted = ([row[key] for row in rows] for key in ("prediction", "label"))
    assert wanted == [json.loads(line)["label"] for line in held.read_text().splitlines()]
    assert found["loss"] == found["mse"] == pytest.approx(sklearn.metrics.mean_squared_error(wanted, gave), rel=1e-9)
    assert found["loss"] == pytest.approx(result.metrics["eval_loss"], rel=1e-4) and found["rmse"] == pytest.approx(found["mse"] ** 0.5)
    assert found["mae"] == pytest.approx(sklearn.metrics.mean_absolute_error(wanted, gave), rel=1e-9) and found["n"] == 24
    assert found["pearson"] == pytest.approx(scipy.stats.pearsonr(gave, wanted).statistic, rel=1e-9)
    assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(gave, wanted).statistic, rel=1e-9)
    assert all(found[f"{key}_interval"][0] <= found[key] <= found[f"{key}_interval"][1] for key in ("mse", "mae", "pearson", "spearman"))
    assert "exact_match" not in found and "accuracy" not in found
    assert "the worst row" in verb(capsys, tmp_path / "o").out
    if not full:
        assert scores(capsys, tmp_path / "o", "--base")["mse"] > found["mse"]
        graftwork_cli("merge", tmp_path / "o", "-o", tmp_path / "merged", "--quiet")
        capsys.readouterr()
        merged = scores(capsys, tmp_path / "merged", "--data", held)  # a folder says that it has a regression head
        assert merged["mse"] == pytest.approx(found["mse"], rel=1e-3)


def graftwork_cli(*arguments):
    from graftwork.cli.main import main

    main([*map(str, arguments)])


# -- scores without a run --------------------------------------------------------------------------------------------------
def one_output(**more):
    return tiny.bert_classifier(1, problem_type="regression", **more)


def test_scores_against_outputs_in_float64(tmp_path, tokenizer):
    """Batches and rounded labels change nothing: 3.8 is not the number that single precision makes of it."""
    model = one_output(dtype=torch.float64)
    rows = [{"text": words(i, 1 + i % 6), "label": 3.8 + 0.1 * (i % 5)} for i in range(11)]
    out = evaluate(model, tokenizer, write_rows(tmp_path / "a.jsonl", rows), batch_size=4, resamples=200)
    with torch.no_grad():
        gave = [model(**tokenizer(row["text"], return_tensors="pt")).logits.item() for row in rows]
    wanted = [row["label"] for row in rows]
    assert [row["prediction"] for row in out.rows] == pytest.approx(gave, rel=1e-12) and [row["label"] for row in out.rows] == wanted
    assert out.metrics["mse"] == pytest.approx(sklearn.metrics.mean_squared_error(wanted, gave), rel=1e-12)
    assert out.metrics["spearman"] == pytest.approx(scipy.stats.spearmanr(gave, wanted).statistic, rel=1e-12)
    errors = np.square(np.subtract(gave, wanted))
    counts = np.random.default_rng(0).multinomial(11, np.full(11, 1 / 11), size=200)
    assert out.metrics["mse_interval"] == pytest.approx(np.quantile(counts @ errors / 11, [0.025, 0.975]), rel=1e-9)


def test_constant_and_diverged_predictions(tmp_path, tokenizer):
    model, file = one_output(), rated(tmp_path / "a.jsonl", 6)
    with torch.no_grad():
        model.classifier.weight.zero_()
    out = evaluate(model, tokenizer, file)
    assert out.metrics["pearson"] is None and out.metrics["spearman"] is None and out.metrics["mse"] > 0
    with torch.no_grad():
        model.classifier.bias.fill_(math.nan)
    out = evaluate(model, tokenizer, file)
    assert out.metrics["loss"] is None and "mse" not in out.metrics and any("no row counts" in note for note in out.notes)


@pytest.mark.parametrize("metrics, build, label, words_of_error", [
    (["accuracy"], one_output, 0.5, "'accuracy' does not suit the rows, whose labels are real numbers"),
    (["bleu"], one_output, 0.5, "'bleu' does not suit"), (["exact_match"], one_output, 0.5, "mae"),
    (None, tiny.bert_classifier, 0.5, "is a real number, and the head has 3 classes"), (None, tiny.llama, 0.5, "objective: regression"),
    (None, one_output, 1, "format=regression"), (None, one_output, None, '"label": 3.8')])
def test_rows_and_heads_of_another_kind(tmp_path, tokenizer, metrics, build, label, words_of_error):
    rows = [{"text": "the", "label": label}] if label is not None else [{"prompt": "x", "completion": "y"}]
    with pytest.raises((IncompatibleError, UsageError)) as error:
        evaluate(build(), tokenizer, write_rows(tmp_path / "a.jsonl", rows), metrics=metrics)
    assert words_of_error in str(error.value)


def test_whole_numbers_are_read_as_real_ones_on_request(tmp_path, tokenizer):
    file = write_rows(tmp_path / "a.jsonl", [{"text": words(i, 3), "label": i} for i in range(4)])
    out = evaluate(one_output(), tokenizer, file, config=DataConfig(train="-", format="regression"))
    assert [row["label"] for row in out.rows] == [0.0, 1.0, 2.0, 3.0] and "pearson" in out.metrics
    both = write_rows(tmp_path / "b.jsonl", [{"text": "the", "label": 0.5}])
    with pytest.raises(DataError, match="classes and labels that are real numbers are mixed"):
        evaluate(one_output(), tokenizer, [str(file), str(both)])


def test_heads_of_several_grafts_in_one_batch(tmp_path, tokenizer):
    model, tasks, grafts = one_output(), read_tasks(rated(tmp_path / "a.jsonl", 7)), []
    for k, name in enumerate("ab"):
        grafts.append(graftwork.attach(model, "lora", name=name, r=2, modules_to_save=["classifier"]))
        with torch.no_grad():
            for parameter in grafts[-1].parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(k)) * 0.3)
    both = compare(model, tokenizer, tasks, {name: [name] * 7 for name in "ab"}, batch_size=4, metrics=None)
    for name in "ab":
        alone = evaluate(model, tokenizer, tasks, adapters=name, batch_size=1)
        assert both.targets[name].metrics["mse"] == pytest.approx(alone.metrics["mse"], rel=1e-5)
    gap = next(d for d in both.differences if d["metric"] == "pearson")
    assert gap["difference"] == pytest.approx(both.targets["a"].metrics["pearson"] - both.targets["b"].metrics["pearson"])


def test_written_numbers_have_errors_too(tmp_path):
    """mse and mae are of numbers in answers as well; what is no number is counted."""
    from graftwork.evaluation.families.base import find

    rows = [{"source": str(i), "references": [wanted], "compared": gave} for i, (wanted, gave) in
            enumerate([("1", "1.5"), ("2.0", "four"), ("-3", "-1"), ("4", " 4 ")])]
    squared, absolute = find(["mse", "mae"])
    used = [row for row in rows if squared.usable(row)]
    assert squared.value(squared.statistics(used)) == pytest.approx({"mse": 4.25 / 3, "rmse": (4.25 / 3) ** 0.5})
    assert absolute.value(absolute.statistics(used)) == pytest.approx({"mae": 2.5 / 3}) and squared.also(rows) == {"not_numbers": 1}


# -- verbs ---------------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_verbs_around_a_run(base, tmp_path, capsys):
    from graftwork.cli.main import main

    data = rated(tmp_path / "d.jsonl", 24)
    graftwork_cli("init", "--data", data, "--model", folder(base, "bert"), "-o", tmp_path / "r.yaml")
    made = load_recipe(tmp_path / "r.yaml")
    assert made.objective.method == "regression" and made.data.format == "regression" and made.data.eval_fraction > 0
    capsys.readouterr()
    graftwork_cli("validate", tmp_path / "r.yaml", f"output_dir={tmp_path / 'o'}")
    assert "label: " in (text := capsys.readouterr().out) and "classes:" not in text and text.rstrip().endswith("ok")
    run(recipe(folder(base, "llama"), data, tmp_path / "o", objective="regression", train={"max_steps": 2}))
    (tmp_path / "ask.jsonl").write_text('{"prompt": "the", "adapter": "a"}\n')
    capsys.readouterr()
    with pytest.raises(SystemExit) as leave:
        main(["generate", "--model", str(folder(base, "llama")), "--adapter", f"a={tmp_path / 'o'}",
              "--input", str(tmp_path / "ask.jsonl")])
    said = capsys.readouterr().err
    assert leave.value.code == 1 and "gives a number" in said and "graft eval" in said and "Traceback" not in said
