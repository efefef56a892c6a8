"""`graft claims`: bars and intervals against closed forms, cells, files, verdicts, the table and the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from claims_support import BASIC, made, tiny_config, verdict
from graftwork.claims.cells import Cells
from graftwork.claims.claim import Claim, Fields, claims, find, in_order, read, shares
from graftwork.claims.expressions import judge
from graftwork.claims.kinds import kind_of, kinds
from graftwork.claims.kinds.base import merged
from graftwork.claims.run import has_result, run_claim
from graftwork.claims.samples import Samples, compare
from graftwork.claims.table import _ends, evidence_line, page, results
from graftwork.claims.training import Cell
from graftwork.errors import UsageError
from graftwork.recipe import load_recipe
from graftwork.registry import AXES, methods


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_config(tmp_path_factory.mktemp("config"))


# -- the language of bars -----------------------------------------------------------------------------------------------------
def test_bars():
    figures = {"a": {"x": 3.0, "y": 2.0}, "b": {"x": 4 * 2**30}}
    met, evidence = judge("a.x - 1 <= a.y and (b.x > 5 GiB or b.x >= 4 * GiB)".replace("5 GiB", "5 * GiB"), figures)
    assert met and [e.met for e in evidence] == [True, False, True] and evidence[0].left == evidence[0].right == 2
    assert judge("max(a.x, a.y) == abs(-3)", figures)[0] and judge("1 < a.y < a.x", figures)[0] and not judge("1 < a.x < a.y", figures)[0]
    for wrong, hint in (("a.z < 1", "x, y"), ("c.x < 1", "a, b"), ("a.x", "compares nothing"), ("a.x <", "no comparison"),
                        ("__import__('os').name < 1", "no meaning"), ("a.x != 1", "knows")):
        with pytest.raises(UsageError, match=hint):
            judge(wrong, figures)


def test_intervals_and_ties():
    values = np.random.default_rng(0).normal(1.0, 0.3, (7, 1))
    low, high = Samples(values).interval()
    expected = stats.t.interval(0.95, 6, loc=values.mean(), scale=stats.sem(values[:, 0]))
    assert np.allclose((low, high), expected)
    rows = np.random.default_rng(1).normal(0, 1, (1, 400))
    low, high = Samples(rows).interval()  # of one seed: an ordinary bootstrap over rows, as scipy's
    other = stats.bootstrap((rows[0],), np.mean, method="percentile", n_resamples=2000, random_state=0).confidence_interval
    assert abs(low - other.low) < 0.02 and abs(high - other.high) < 0.02
    same, better = Samples([[1.0, 2, 3], [2, 3, 4]]), Samples([[0.8, 1.8, 2.7], [1.9, 2.8, 3.8]])
    assert not compare(same, "<", same)[0] and compare(same, "<=", same)[0] and compare(better, "<", same)[0]
    assert compare(better, "<", 0.99 * same)[0] and not compare(same, "<=", better)[0]
    assert not compare(Samples([[float("nan"), 1.0]]), "<=", Samples([[2.0, 3.0]]))[0]
    assert compare(Samples([[0.0], [0.0]]), "==", 0)[0] and not compare(Samples([[0.0], [0.0], [1.0]]), "==", 0)[0]  # identities are whole
    two = Samples([[1.0], [3.0]])
    assert two.to_json() == {"mean": 2.0, "interval": list(two.interval()), "by_seed": [1, 3], "rows": 1}


def test_cells_are_kept_until_what_they_are_made_from_changes(tmp_path):
    calls, cells = [], Cells(tmp_path)
    for of in (1, 1, 2):
        cells.get("a/b", of, lambda of=of: calls.append(of) or of)
    assert calls == [1, 2]
    again = Cells(tmp_path)  # what a cell took counts whenever it is asked for
    assert again.get("a/b", 2, lambda: 7) == 2 and again.seconds == json.loads((tmp_path / "a" / "b.json").read_text())["seconds"]
    (tmp_path / "a" / "b.json").write_text("{half")
    assert cells.get("a/b", 2, lambda: 7) == 7
    with pytest.raises(UsageError):
        cells.get("../b", 1, lambda: 1)


def test_a_kept_cell_that_lacks_something_is_made_again(tmp_path):
    cells = Cells(tmp_path)
    assert cells.get("a", 1, lambda: {"rows": None}) == {"rows": None} == cells.get("a", 1, dict, enough=lambda kept: True)
    assert cells.get("a", 1, lambda: {"rows": 2}, enough=lambda kept: kept["rows"]) == {"rows": 2} == cells.get("a", 1, dict)


def test_cells_are_known_by_what_they_are(tmp_path):
    """The same run however it is written down, and wherever its files are; another one where anything that counts is another."""
    def cell(adapter, *, folder="x", rate=1e-3, seed=0, steps=5, train=None, base="scratch", width=48):
        sections = {"adapter": adapter, **({"train": train} if train else {})}
        files = {"train": f"{folder}/data-1/train.jsonl", "validation": "v.jsonl"}
        return Cell("shakespeare", base, sections, rate, seed, files, steps, 4, 32, 0, "cosine", width, 1, None)

    lora = {"method": "lora", "r": 8, "target_modules": "all-linear"}
    own = cell(lora)
    backwards = dict(reversed(lora.items()))
    for same in (cell(backwards), cell(lora, folder="y"), cell({**lora, "dropout": 0.0}), cell(lora, train={"max_steps": 5})):
        assert same.place == own.place and same.of() == own.of()
    others = [cell({**lora, "r": 4}), cell({**lora, "method": "dora"}), cell(lora, rate=3e-3), cell(lora, seed=1), cell(lora, steps=6),
              cell(lora, base="tiny"), cell(lora, width=96), cell(lora, train={"grad_accumulation": 2})]
    assert len({own.place, *(c.place for c in others)}) == 1 + len(others)
    packaged = [cell(lora, base="smollm2-135m-instruct", width=w) for w in (48, 96)]  # whose width is its own
    assert packaged[0].place == packaged[1].place


def test_parts_for_several_processes():
    """Nothing is lost or run twice, runs in common stay together, and the parts take about as long."""
    found = list(claims().values())
    parts = shares(found, 2)
    assert sorted(c.name for part in parts for c in part) == sorted(c.name for c in found)
    assert all(part == in_order(part) for part in parts) and shares(reversed(found), 2) == parts
    sums = [sum(c.minutes for c in part) for part in parts]
    assert max(sums) <= 0.6 * sum(sums)
    keys = [{key for c in part for key in kind_of(c.kind)(c, False).runs_in_common()} for part in parts]
    assert not keys[0] & keys[1] and keys[0] and keys[1]
    assert [c.first for c in in_order(found)][:15] == sorted(c.first for c in found if c.first)[:15]
    assert shares(found[:1], 2)[1] == []


# -- files --------------------------------------------------------------------------------------------------------------------
def test_every_claim_is_whole():
    for claim in claims().values():
        kind_of(claim.kind)(claim, False)
        if claim.kind == "quality_scaled" and claim.arms:  # both sides try as many rates, and three at least
            tries = {len(arm.get("rates", [1, 2, 3])) for arm in claim.arms.values() if arm.get("rates") != [0.0]}
            assert len(tries) == 1 and min(tries) >= 3, claim.name
        assert claim.group != "rows" and claim.name.isidentifier() and len(claim.setting) > 10
    assert len(kinds()) == 8
    firsts = [c.first for c in claims().values() if c.first]
    assert set(firsts) <= set(range(1, 16))


def test_every_system_with_a_registered_method_has_a_claim():
    """By the papers that methods name; what names none (plain formats, SGD) claims nothing."""
    cited = " ".join(claim.source for claim in claims().values())
    missing = {info.paper: info.name for axis in AXES for info in methods(axis) if info.paper and info.paper not in cited}
    assert not missing


@pytest.mark.full
def test_every_arm_is_a_recipe():
    """Names, options and the rules of combination; where an arm's learning rate goes."""
    models = {"scratch": "config:gpt2", "tiny": "config:gpt2"}
    for claim in claims().values():
        for arm in claim.arms.values():
            sections = merged(claim.common, {k: v for k, v in arm.items() if k not in ("rates", "largest")})
            base = claim.check.get("base", "smollm2-135m-instruct")
            tasks = claim.check.get("tasks")
            document = {"model": models.get(base, base), "train": {"precision": "fp32"}, "data": {"train": "rows.jsonl", "format": "text"}}
            if tasks:
                cell = Cell(tasks[0], base, sections, 1e-3, 0, {"train": "rows.jsonl"}, 1, 1, 8, 0, "cosine", 48, 1, None)
                document = {**cell.recipe(Path("models"), "run", model=document["model"]), "output_dir": None}
            recipe = load_recipe(merged(document, {} if tasks else sections))
            assert not tasks or (recipe.optimizer or recipe.estimator).lr == 1e-3


def test_files_of_ones_own_and_their_errors(tmp_path, config):
    text = json.dumps({**BASIC, "kind": "parameter_count", "baseline": "a", "arms": {"a": {"model": config}}, "holds": "a.trained > 1"})
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert find(str(path)).name == "mine"
    for old, new, hint in (('"holds": "a.t', '"holds": "b.t', "speaks of b"), ('"minutes": 1', '"minuts": 1', "minuts"),
                           ("parameter_count", "parameters", "no kind"), ('"baseline": "a"', '"baseline": "b"', "is no arm")):
        path.write_text(text.replace(old, new))
        with pytest.raises(UsageError, match=hint):
            read(path)
    with pytest.raises(UsageError, match="galore_state"):
        find("galore_stat")


# -- verdicts and the table ----------------------------------------------------------------------------------------------------
def test_verdicts_and_the_table(tmp_path):
    def numbers(value):
        return lambda seed, quick: {"own": {"error": value}}

    for name, more, value, expected in (
            ("a", {}, 0.5, "holds"), ("b", {"holds_here": "own.error <= 2"}, 1.5, "holds at this scale"),
            ("c", {}, 1.5, "does not hold here"), ("d", {"headline": "no phone"}, 0.5, "not checkable here (no phone)")):
        claim = Claim(name, "tests", made("exactness", "own.error <= 1", {}, **more).fields, numbers(value))
        assert verdict(claim, tmp_path) == expected
    missed = Claim("f", "tests", made("exactness", "own.error <= 1", {}, refuted="own.error > 2").fields, numbers(1.5))
    assert verdict(missed, tmp_path) == "does not hold here"
    absent = Claim("e", "tests", Fields(**BASIC, kind="absent", headline="no cluster"))
    assert verdict(absent, tmp_path) == "not checkable here (no cluster)"
    text = page(results(tmp_path), "graft claims table")
    assert "2 x `not checkable here`" in text and "portable part: holds" in text and "`own.error <= 1` met: 0.5 against 1" in text
    assert text.count("missed, not refuted (larger)") == 1
    with pytest.raises(UsageError, match="no results"):
        results(tmp_path / "nothing")


def test_what_only_an_interval_meets_is_told():
    each = {"text": "own.loss <= base.loss", "left": 1.1, "right": 1.0, "interval": [-0.2, 0.4], "met": True}
    assert "` met by its interval, not by its mean: 1.1 against 1" in evidence_line(each)
    assert "` met by its interval" in evidence_line(each | {"text": "own.rate >= base.rate", "left": 0.9})
    for other in ({"left": 0.9}, {"interval": None}, {"left": None}):
        assert "` met: " in evidence_line(each | other)
    assert "` not met: " in evidence_line(each | {"met": False})


def test_a_result_belongs_to_the_arms_it_was_made_of(tmp_path):
    claim = made("exactness", "own.error <= 1", {}, check={"seeds": 1}, measure=lambda *_: {"own": {"error": 0.5}})
    run_claim(claim, tmp_path)
    for change, kept in (({}, True), ({"minutes": 2}, True), ({"arms": {"base": {}}, "baseline": "base"}, False),
                         ({"holds": "own.error < 1"}, False), ({"check": {"seeds": 2}}, False)):
        assert has_result(Claim("made", "tests", claim.fields.model_copy(update=change), claim.measure), tmp_path) is kept
    made_by_older = {k: v for k, v in json.loads((tmp_path / "made.json").read_text()).items() if k != "of"}
    (tmp_path / "made.json").write_text(json.dumps(made_by_older))
    assert has_result(claim, tmp_path)


def test_rates_at_an_end_of_those_tried_are_told(monkeypatch):
    arms = {name: {"adapter": {"method": "lora"}, "rates": rates} for name, rates in (
        ("low", [1e-3, 3e-3, 1e-2]), ("middle", [1e-3, 3e-3, 1e-2]), ("high", [3e-4, 1e-3]), ("still", [0.0]))}
    claim = made("quality_scaled", "low.loss < high.loss", arms, baseline="low", check={"tasks": ["e2e"]})
    monkeypatch.setattr("graftwork.claims.table.claims", lambda: {"made": claim})
    found = {"low": 1e-3, "middle": 3e-3, "high": 1e-3, "still": 0.0}
    result = {"claim": "made", "quick": False, "kind": "quality_scaled", "figures": {arm: {"rate": rate} for arm, rate in found.items()}}
    assert _ends(result) == "; best at an end of the rates tried: low, high"
    assert _ends({**result, "claim": "another"}) == _ends({**result, "quick": True}) == ""


@pytest.mark.slow
def test_the_command(tmp_path, config, capsys, monkeypatch):
    from graftwork.cli import main as cli

    def graft(*words, code=0):
        try:
            cli.main(["claims", *map(str, words)])
        except SystemExit as error:
            assert error.code == code
        else:
            assert code == 0
        return capsys.readouterr()

    listed = json.loads(graft("list", "--json", "--kind", "parameter_count").out)
    assert len(listed) == sum(c.kind == "parameter_count" for c in claims().values())
    assert "rank 1024" in graft("show", "galore_state").out and "fake tensors" in graft("show", "galore_state").out
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps({**BASIC, "kind": "parameter_count", "baseline": "a", "holds": "a.trained == 256", "arms": {
        "a": {"model": config, "adapter": {"method": "lora", "r": 1, "target_modules": ["q_proj"]}}}}))
    ran = graft("run", path, "-o", tmp_path / "out")
    assert "mine: holds" in ran.out and "1/1 mine" in ran.err and "0 min left" in ran.err
    assert not graft("run", path, "-o", tmp_path / "out", "--missing").out  # it has a result, until its bar is another
    path.write_text(path.read_text().replace("== 256", ">= 256"))
    assert "mine: holds" in graft("run", path, "-o", tmp_path / "out", "--missing", "--share", "1/2").out
    assert not graft("run", path, "-o", tmp_path / "out", "--share", "2/2").out
    assert "| `mine` |" in graft("table", "-o", tmp_path / "out").out
    monkeypatch.delenv("GRAFTWORK_DATA", raising=False)
    both = graft("run", "nola_e2e", path, "-o", tmp_path / "out", "--quick", "--json", code=1)  # one cannot run, the other does
    assert "nola_e2e was not checked: " in both.err and [m["claim"] for m in json.loads(both.out)] == ["mine"]
    for words, hint in ((["lits"], "list"), (["run"], "which claims"), (["run", "galore_stat"], "galore_state"), (["show"], "show what"),
                        (["list", "--kind", "memory"], "memory_small"), (["run", "--all", "--quick", "--full"], "exclude"),
                        (["run", "--all", "--share", "3/2"], "no part")):
        assert hint in graft(*words, code=2).err
