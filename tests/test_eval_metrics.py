"""Metric families and their intervals against scikit-learn, scipy, sacrebleu's public functions, enumeration and hand-made cases."""

import itertools

import numpy as np
import pytest
import scipy.stats

from graftwork.errors import DataError, UsageError
from graftwork.evaluation import bootstrap
from graftwork.evaluation.families.answers import token_f1
from graftwork.evaluation.families.base import Options, find, known
from graftwork.evaluation.families.code import pass_at_k
from graftwork.evaluation.families.correlation import number

GENERATOR = np.random.default_rng(5)


def judged(name, rows, **options):
    """(metric, statistics) of rows that all count."""
    judge = find([name], Options(**options))[0]
    judge.fit(rows)
    return judge, judge.statistics([row for row in rows if judge.usable(row)])


def value(name, rows, **options):
    judge, statistics = judged(name, rows, **options)
    return judge.value(statistics)


def copies(name, rows, counts, **options):
    """Values of a metric on one resample: by counts, and from rows that are really repeated."""
    judge, statistics = judged(name, rows, **options)
    repeated = [row for row, c in zip(rows, counts) for _ in range(int(c))]
    once = judge.resampled(statistics, np.asarray([counts, counts], float))
    return {k: v[1] for k, v in once.items()}, judge.value(judge.statistics(repeated))


def labelled(n=40, labels="abcd", wrong=0.4):
    rows = []
    for _ in range(n):
        true = str(GENERATOR.choice(list(labels)))
        guess = str(GENERATOR.choice([*labels, "junk"])) if GENERATOR.random() < wrong else true
        rows.append({"label": true, "label_predicted": None if guess == "junk" else guess})
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("labels", ["01", "abcd"])
def test_labels_against_scikit_learn(labels):
    """An unknown prediction is a class of its own for mcc and accuracy, and none for F1 (`labels=` of scikit-learn)."""
    from sklearn import metrics

    rows = labelled(labels=labels)
    true, guess = [r["label"] for r in rows], [r["label_predicted"] or "~" for r in rows]
    wanted = {"accuracy": metrics.accuracy_score(true, guess), "mcc": metrics.matthews_corrcoef(true, guess),
              **{f"{a}_f1": metrics.f1_score(true, guess, labels=list(labels), average=a) for a in ("macro", "micro")},
              "f1": metrics.f1_score(true, guess, labels=[labels[1]], average="macro")}
    for name, number_ in wanted.items():
        assert value(name, rows, positive=labels[1])[name] == pytest.approx(number_, abs=1e-12), name
    counts = GENERATOR.multinomial(len(rows), np.full(len(rows), 1 / len(rows)))
    for name in ("accuracy", "mcc", "micro_f1", "f1"):
        by_counts, repeated = copies(name, rows, counts, positive=labels[1])
        assert by_counts == pytest.approx(repeated), name


def test_labels_with_one_class_and_unknown_positive():
    one = [{"label": "a", "label_predicted": "a"}] * 3
    assert value("mcc", one)["mcc"] == 0.0 and value("macro_f1", one)["macro_f1"] == 1.0
    judge, _ = judged("mcc", one)
    assert "all rows have" in judge.notes(one)[0] and "by convention" in judge.notes(one)[0]
    with pytest.raises(UsageError, match="the label '1'"):
        value("f1", one)
    junk = [{"label": "a", "label_predicted": None}]
    assert value("accuracy", junk)["accuracy"] == 0 and "none of the labels" in judged("accuracy", junk)[0].notes(junk)[0]


def numbers(n=30):
    x = GENERATOR.integers(0, 8, n) / 2
    return [{"source": f"r:{i}", "references": [str(v)], "compared": str(round(v + g, 1))}
            for i, (v, g) in enumerate(zip(x, GENERATOR.normal(size=n)))]


def test_correlations_against_scipy():
    """Ties on both sides; a resample equals scipy on the rows that it repeats."""
    rows = numbers()
    counts = GENERATOR.multinomial(30, np.full(30, 1 / 30))
    x, y = [float(r["compared"]) for r in rows], [float(r["references"][0]) for r in rows]
    for name, judge in (("pearson", scipy.stats.pearsonr), ("spearman", scipy.stats.spearmanr)):
        assert value(name, rows)[name] == pytest.approx(judge(x, y)[0], abs=1e-12)
        by_counts, _ = copies(name, rows, counts)
        assert by_counts[name] == pytest.approx(judge(np.repeat(x, counts), np.repeat(y, counts))[0], abs=1e-12)
    far = [{**r, "compared": str(float(r["compared"]) + 1e6)} for r in rows]  # no loss of digits far from zero
    assert value("pearson", far)["pearson"] == pytest.approx(value("pearson", rows)["pearson"], abs=1e-6)


def test_correlation_of_what_is_no_number():
    rows = [*numbers(6), {"source": "r:7", "references": ["3"], "compared": "about 3"}]
    judge = find(["pearson"])[0]
    assert [judge.usable(r) for r in rows] == [True] * 6 + [False] and judge.also(rows) == {"not_numbers": 1}
    assert "1 of 7 answers are no number" in judge.notes(rows)[0]
    flat = [{"source": "", "references": [str(i)], "compared": "2.5"} for i in range(4)]
    assert np.isnan(value("pearson", flat)["pearson"]) and np.isnan(value("spearman", flat)["spearman"])
    with pytest.raises(DataError, match="x:1: the reference 'good'"):
        judge.fit([{"source": "x:1", "references": ["good"], "compared": "1"}])
    assert number(" 2 ") == 2 and number("nan") is None and number(None) is None and number("1e999") is None


TEXTS = [("the cat sat on the mat", ["the cat sat on a mat", "a cat was on the mat"]), ("hello there , world", ["hello world"]),
         ("", ["something to say here"]), ("one two three four five six", ["one two three four five six", "x"]),
         ("completely different words", ["nothing shared with it at all"])]


def written():
    return [{"compared": p, "compared_references": r} for p, r in TEXTS]


@pytest.mark.slow
def test_bleu_and_chrf_are_sacrebleu_s_corpus_scores():
    import sacrebleu

    rows = written()
    counts = [2, 0, 1, 1, 1]
    for name, judge in (("bleu", sacrebleu.BLEU()), ("chrf", sacrebleu.CHRF())):
        for chosen in (range(5), np.repeat(range(5), counts)):
            columns = [[(TEXTS[i][1] + [None])[k] for i in chosen] for k in range(2)]
            wanted = judge.corpus_score([TEXTS[i][0] for i in chosen], columns).score
            got = value(name, [rows[i] for i in chosen])[name]
            assert got == pytest.approx(wanted, abs=1e-9)
        assert copies(name, rows, counts)[0][name] == pytest.approx(wanted, abs=1e-9)
    assert value("bleu", [{"compared": "a b c d", "compared_references": ["a b c d"]}])["bleu"] == pytest.approx(100)
    assert value("bleu", [{"compared": "", "compared_references": ["a b c d"]}])["bleu"] == 0


@pytest.mark.slow
def test_rouge_by_hand():
    """'the cat sat on the mat' and 'the cat sat on a mat': 5 of 6 words, 3 of 5 pairs, a subsequence of 5; the best reference counts."""
    rows = written()[:1]
    found = value("rouge", rows)
    assert found == pytest.approx({"rouge1": 5 / 6, "rouge2": 3 / 5, "rougeL": 5 / 6})
    assert value("rouge", [{"compared": None, "compared_references": ["a"]}])["rouge1"] == 0
    alien = [{"compared": "日本", "compared_references": ["日本"]}]
    judge, _ = judged("rouge", alien)
    assert "count as empty" in judge.notes(alien)[0]


def test_token_f1_by_hand():
    """{cat, sat} and {cat, sat, down}: 2 * 2 / (2 + 3)."""
    assert token_f1("The cat sat.", "a cat SAT down!") == pytest.approx(4 / 5)
    assert token_f1("the", "an") == 1 and token_f1("", "word") == 0 and token_f1("x x y", "x z") == pytest.approx(2 / 5)
    rows = [{"compared": "cat", "compared_references": ["dog", "cat"]}, {"compared": None, "compared_references": ["dog"]}]
    assert value("token_f1", rows) == {"token_f1": 0.5}


def test_pass_at_k_by_enumeration():
    """The share of all subsets of k programs that hold one which passes."""
    for n, c, k in itertools.product(range(1, 7), range(7), range(1, 7)):
        if c <= n and k <= n:
            sets = [any(i < c for i in chosen) for chosen in itertools.combinations(range(n), k)]
            assert pass_at_k(n, c, k) == pytest.approx(np.mean(sets), abs=1e-12)
    with pytest.raises(UsageError, match="pass@3 cannot"):
        pass_at_k(2, 1, 3)
    rows = [{"programs": [""] * 3, "passed": [True, False, False]}, {"programs": [""] * 3, "passed": [False] * 3}]
    assert value("pass_at_k", rows, k=(1, 3)) == pytest.approx({"pass@1": 1 / 6, "pass@3": 0.5})


# -- intervals ---------------------------------------------------------------------------------------------------------------------
def test_interval_of_a_ratio_against_resampled_rows():
    """Loss per token: rows of different length. The same quantiles from rows that are drawn one by one."""
    rows = [{"nll": float(t * GENERATOR.gamma(2)), "terms": int(t), "terms_right": 0} for t in GENERATOR.integers(1, 30, 60)]
    judge, statistics = judged("loss", rows)
    drawn = bootstrap.resampled(judge, statistics, 4000, 0)
    pick = GENERATOR.integers(0, 60, (4000, 60))
    nll, terms = statistics[:, 0], statistics[:, 1]
    wanted = np.quantile(nll[pick].sum(1) / terms[pick].sum(1), [0.025, 0.975])
    assert np.allclose(bootstrap.interval(drawn["loss"], 60), wanted, rtol=0.02)
    assert np.array_equal(drawn["perplexity"], np.exp(drawn["loss"]))
    assert np.array_equal(bootstrap.resampled(judge, statistics, 50, 3)["loss"], bootstrap.resampled(judge, statistics, 50, 3)["loss"])
    assert not np.array_equal(bootstrap.resampled(judge, statistics, 50, 3)["loss"], bootstrap.resampled(judge, statistics, 50, 4)["loss"])


def test_chunks_of_resamples_are_whole(monkeypatch):
    monkeypatch.setattr(bootstrap, "_CHUNK", 25)
    chunks = list(bootstrap.counts_of(10, 7, 0))
    assert [c.shape for c in chunks] == [(2, 10)] * 3 + [(1, 10)] and all((c.sum(1) == 10).all() for c in chunks)


def test_interval_without_rows_or_with_undefined_values():
    assert bootstrap.interval(np.ones(100), 1) is None and bootstrap.interval(np.full(100, np.nan), 5) is None
    assert bootstrap.interval(np.r_[np.full(40, np.nan), np.ones(60)], 5) == [1.0, 1.0]


def test_paired_difference_sees_what_single_intervals_hide():
    """b is a + 0.1 on every row, rows vary by 10: the paired interval is 0.1 exactly, the single ones overlap."""
    level = GENERATOR.normal(size=50) * 10
    rows = {name: [{"nll": float(v + extra), "terms": 1, "terms_right": 0} for v in level] for name, extra in (("a", 0.0), ("b", 0.1))}
    drawn = {}
    for name in rows:
        judge, statistics = judged("loss", rows[name])
        drawn[name] = bootstrap.resampled(judge, statistics, 500, 0)["loss"]
    found = bootstrap.difference(drawn["b"], drawn["a"], 50)
    assert np.allclose(found["interval"], [0.1, 0.1]) and found["above"] == 1.0
    assert bootstrap.difference(drawn["a"], drawn["a"], 50)["above"] == 0.5


@pytest.mark.slow
def test_coverage_of_the_interval():
    """Of 200 samples of 40 rows the 95 % interval holds the true mean about 95 times in 100."""
    generator, hits = np.random.default_rng(0), 0
    for k in range(200):
        rows = [{"correct": bool(v)} for v in generator.random(40) < 0.3]
        judge, statistics = judged("exact_match", rows)
        low, high = bootstrap.interval(bootstrap.resampled(judge, statistics, 300, k)["exact_match"], 40)
        hits += low <= 0.3 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_names_of_metrics():
    with pytest.raises(UsageError, match="did you mean 'rouge'"):
        find(["rogue"])
    with pytest.raises(UsageError, match="no metric"):
        find([])
    assert len(find(["loss", "loss"])) == 1 and all(cls.summary and cls.needs for cls in known().values())
