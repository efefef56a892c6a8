"""Reports: what is on the page is what lies in the run folder, and nothing that a user wrote becomes markup."""

import json
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch

import graftwork
import tiny
from graftwork.cli.main import main
from graftwork.errors import UsageError
from graftwork.report import course, drawings, write_report
from graftwork.report.page import write_page
from graftwork.report.recipes import differences, flatten
from graftwork.report.runs import read_runs
from graftwork.report.scores import read_scores
from graftwork.report.sites import final_grid, over_steps
from graftwork.report.spectra import chosen_sites, graft_spectra, singular_values
from graftwork.report.tables import table
from report_support import SITES, Page, made_run, metrics


# -- reading -------------------------------------------------------------------------------------------------------------
def test_curves_are_the_lines_of_the_log(tmp_path):
    made_run(tmp_path / "a", steps=200)
    with open(tmp_path / "a" / "metrics.jsonl", "a") as log:
        log.write('{"step": 201, "loss": NaN, "seconds": 3, "steps": 2, "sites": {"rank": 3, "other": {"x": "y"}}}\n[1]\n')
        log.write('{"step": 202, "lo')  # another process would be at it
    found, rows = read_runs([tmp_path / "a"])[0], metrics(200)
    for key in ("loss", "eval_loss", "lr", "tokens_per_second", "process_bytes"):
        assert found.series(key)[:len([r for r in rows if key in r])] == [(r["step"], r[key]) for r in rows if key in r]
    assert len(found.rows) == len(rows) + 1 and course.step_seconds(found)[-1] == (201, 1.5)
    assert found.maps()["rank"][10] == metrics(10)[9 + 1]["sites"]["rank"]
    figure = course.loss([found]).figures[0]
    shown = {row["step"]: row for row in figure.rows}
    assert len(shown) <= 61 and 201 in shown
    for row in rows:
        if row["step"] in shown and "loss" in row:
            assert shown[row["step"]]["training"] == row["loss"]
        elif row["step"] in shown:
            assert shown[row["step"]]["validation"] == row["eval_loss"]
    old = [{k: v for k, v in row.items() if k != "steps"} for row in metrics(8) if row["step"] % 4 == 0 and "loss" in row]
    found.rows = old  # lines of a log that counts no steps, each of four
    assert course.step_seconds(found) == [(4, old[0]["seconds"] / 4), (8, old[1]["seconds"] / 4)]
    assert drawings.running_mean([1.0] * 50 + [3.0] * 50)[50] == pytest.approx(np.mean([1.0] * 2 + [3.0] * 3))


def test_labels_differ_and_wrong_folders_are_refused(tmp_path):
    for name in ("x/a", "y/a", "y/b"):
        made_run(tmp_path / name, bare=True)
    names = [r.name for r in read_runs([tmp_path / name for name in ("x/a", "y/a", "y/b")])]
    assert names == ["x/a", "y/a", "y/b"] and read_runs([tmp_path / "y" / "b"])[0].name == "b"
    for wrong, why in (([tmp_path / "y" / "bb"], "did you mean"), ([tmp_path / "x"], "no run folder"),
                       ([tmp_path / "x" / "a", tmp_path / "x" / ".." / "x" / "a"], "twice")):
        with pytest.raises(UsageError, match=why):
            read_runs(wrong)


def test_the_difference_of_two_recipes():
    one = {"model": "m", "adapter": {"method": "lora", "r": 4, "target_modules": ["q", "v"]}, "selection": [], "output_dir": "runs/a",
           "train": {"epochs": 1, "seed": 0}}
    two = {"model": "m", "adapter": {"method": "lora", "r": 8, "target_modules": ["q", "v"]}, "output_dir": "runs/b",
           "selection": [{"method": "sora", "threshold": 0.1}], "train": {"epochs": True, "seed": 0}}
    assert differences({"a": one, "b": two}) == [
        {"option": "adapter.r", "a": "4", "b": "8"}, {"option": "selection", "a": "[]", "b": "(not there)"},
        {"option": "train.epochs", "a": "1", "b": "true"}, {"option": "selection.0.method", "a": "(not there)", "b": "sora"},
        {"option": "selection.0.threshold", "a": "(not there)", "b": "0.1"}]
    assert differences({"a": one, "b": {**one, "output_dir": "elsewhere"}}) == []
    assert flatten({"a": {"b": {}, "c": [1, 2]}}) == {"a.b": {}, "a.c": [1, 2]}


def test_scores_of_rows_and_of_a_printed_result(tmp_path):
    made_run(tmp_path / "a", bare=True)
    kept = tmp_path / "a" / "eval"
    kept.mkdir()
    values = np.random.default_rng(0).integers(0, 2, 400)
    (kept / "t.jsonl").write_text("".join(json.dumps({"correct": bool(v)}) + "\n" for v in values))
    members = ("x", 0.25), ("x", 0.75), ("y", 1)
    (kept / "fleet.jsonl").write_text("".join(json.dumps({"score": s, "adapter": m}) + "\n" for m, s in members))
    (kept / "printed.json").write_text(json.dumps({"metrics": {"exact_match": 0.5, "exact_match_interval": [0.4, 0.6], "n": 9,
                                                              "bleu": 31.0, "bleu_interval": None, "seconds": 3.0}}))
    (kept / "two.json").write_text(json.dumps({"metrics": {}, "targets": {"x": {"loss": 1.5}, "y": {"f1": 1, "f1_interval": [0, 1]}}}))
    (kept / "broken.json").write_text("{")
    rows, notes = read_scores(tmp_path / "a", "a")
    found = {row["task"]: row for row in rows}
    spread = 1.96 * values.std() / len(values) ** 0.5  # what the percentile bootstrap of a mean tends to
    assert found["t"]["score"] == values.mean() and found["t"]["n"] == 400
    assert found["t"]["low"] == pytest.approx(values.mean() - spread, abs=0.006)
    assert found["t"]["high"] == pytest.approx(values.mean() + spread, abs=0.006)
    assert found["fleet / x"]["score"] == 0.5 and found["fleet / y"]["low"] == found["fleet / y"]["high"] == 1
    assert found["printed (exact_match)"] == {"task": "printed (exact_match)", "run": "a", "score": 0.5, "low": 0.4, "high": 0.6, "n": 9}
    assert found["two / x (loss)"]["score"] == 1.5 and found["two / y (f1)"]["high"] == 1
    assert found["printed (bleu)"]["score"] == 31.0 and found["printed (bleu)"]["low"] is None and "printed (seconds)" not in found
    assert len(notes) == 1 and "broken.json" in notes[0]


def test_maps_by_site_and_layer():
    steps = {1: {site: float(i) for i, site in enumerate(SITES)}, 4: {site: float(10 * i) for i, site in enumerate(SITES[:5])}}
    lines, columns, values, note = over_steps(steps)
    assert lines == SITES and columns == [1, 4] and values[2] == [2.0, 20.0] and values[5] == [5.0, None] and note == ""
    lines, roles, values = final_grid(steps)
    assert (lines, roles) == (["layer 0", "layer 1", "layer 2"], ["q_proj", "v_proj"])
    assert values == [[0.0, 10.0], [20.0, 30.0], [40.0, None]]
    many = {1: {f"model.layers.{i // 7}.mlp.m{i % 7}": float(i) for i in range(70)}}
    lines, _, values, note = over_steps(many)
    assert len(lines) == 10 and values[0] == [3.0] and "70 sites" in note
    assert final_grid({1: {"layer 0": 1.0, "layer 1": 0.0}}) is None


# -- spectra ---------------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("method, options", [("lora", {"r": 4}), ("lora", {"r": 40}), ("dora", {"r": 3}), ("loha", {"r": 2}),
                                             ("adalora", {"r": 4})])
def test_spectra_are_the_singular_values_of_the_dense_change(method, options):
    model = tiny.llama()
    graft = graftwork.attach(model, method, target_modules=["q_proj", "down_proj"], **options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in graft.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    if not graft.info.traits["multiplicative"]:
        graft.scale(0.5)
    dense = graft.delta_weights()
    for site, numbers in graft_spectra(graft, list(graft.adapters)):
        wanted = np.linalg.svd(dense[site].double().numpy(), compute_uv=False)
        mine = singular_values(graft, site).numpy()
        np.testing.assert_allclose(mine, wanted[:len(mine)], rtol=1e-5, atol=1e-6)
        assert numbers["frobenius"] == pytest.approx(np.linalg.norm(dense[site].numpy()), rel=1e-5)
        assert numbers["stable_rank"] == pytest.approx((wanted**2).sum() / wanted[0] ** 2, rel=1e-4)
        p = wanted[wanted > 1e-9 * wanted[0]] / wanted.sum()
        assert numbers["effective_rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-3)
        assert numbers["shape"] == list(dense[site].shape)
    assert (singular_values(graft, next(iter(graft.adapters)), dense=False) is None) == (graft.info.traits["low_rank"] is False)
    assert chosen_sites(graft, 2) == ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]
    assert len(chosen_sites(graft, 4)) == 4


# -- the page ----------------------------------------------------------------------------------------------------------------
EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """(page of a run whose every text is hostile beside a plain one, what the report says of itself)."""
    root = tmp_path_factory.mktemp("report")
    bad = made_run(root / f"_{EVIL}$x^{{$", recipe={"model": f"</pre><script>alert(2)</script>{EVIL}", "note": "--><svg onload=alert(3)>"})
    (bad / "samples.json").write_text(json.dumps([{"prompt": EVIL, EVIL: "</dd><script>alert(4)</script>", "after": "a\nb & c"}]))
    (bad / "eval" / f"{EVIL}.jsonl").write_text('{"correct": true}\n')
    info = json.loads((bad / "run.json").read_text())
    (bad / "run.json").write_text(json.dumps({**info, "failed": {EVIL: "\"'><script>alert(5)</script>"}}))
    rows = metrics()
    rows[-2]["sites"] = {EVIL: {EVIL: 1.0, "</text></svg><script>alert(6)</script>": 2.0}}
    (bad / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = made_run(root / "plain", scale=2.0, bare=True)
    (plain / "config.yaml").write_text("model: tiny\n")
    return root / "out" / "page.html", write_report([bad, plain], root / "out" / "page.html")


@pytest.mark.slow
def test_nothing_that_a_user_wrote_becomes_markup(pages):
    page = Page(pages[0])
    assert {name for name, _ in page.tags} & {"script", "img", "iframe", "object", "embed", "form", "input"} == set()
    assert not [(tag, a) for tag, attributes in page.tags for a in attributes if a.startswith("on")]
    assert page.text.count(EVIL) > 10 and "</pre><script>alert(2)" in page.text and "</text></svg><script>alert(6)" in page.text
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href", "xlink:href")]
    assert links and all(value.startswith(("#", "data:")) for value in links)


@pytest.mark.slow
def test_every_figure_has_words_and_numbers(pages):
    path, found = pages
    page = Page(path)
    assert page.count("figure") == len(found["figures"]) >= 14 and page.count("details") >= page.count("figure")
    assert all(re.fullmatch("[a-z0-9-]+", each["name"]) for each in found["figures"])  # they are names of files too
    drawn = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(drawn) == 2 * len(found["figures"]) and all(a["role"] == "img" and len(a["aria-label"]) > 20 for a in drawn)
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert path.stat().st_size < 2_000_000
    assert [row["last loss"] for row in found["runs"]] == [metrics()[-2]["loss"], metrics(20, 2.0)[-2]["loss"]]
    assert [row["option"] for row in found["recipe_differences"]][:2] == ["model", "adapter.method"]
    shown = [row for rows in page.tables for row in rows]
    assert ["20", "0.1021", "0.1842"] in shown  # the training losses at the last step, as the log has them


@pytest.mark.slow
def test_missing_parts_are_left_out_with_a_line(tmp_path, capsys):
    made_run(tmp_path / "a", bare=True)
    (tmp_path / "a" / "plan.json").write_text("{")
    (tmp_path / "a" / "spectra.json").write_text('{"sites": {"x": {"shape": [2, 2], "values": []}}}')
    (tmp_path / "a" / "samples.json").write_text('[1]')
    code = main(["report", str(tmp_path / "a"), "-o", str(tmp_path / "r.html"), "--figures", str(tmp_path / "f"), "--json", "--quiet"])
    assert not code
    found = json.loads(capsys.readouterr().out)
    lines = "\n".join(found["left_out"])
    for part in ("plan.json cannot be read", "spectra.json is not as expected (sites.x.values", "no run.json", "no plan", "no evaluation",
                 "samples.json is not as expected (rows.0", "no samples", "config.yaml", "--spectra 24"):
        assert part in lines, part
    assert all(line.partition(": ")[2].rstrip(".") in Page(tmp_path / "r.html").text for line in found["left_out"])
    for each in found["figures"]:
        assert ET.parse(each["file"]).getroot().tag.endswith("svg")
    png = drawings.scores("s", "S", [{"task": "t", "run": "r", "score": 0.5, "low": None, "high": None, "n": 3}]).save(tmp_path, "png")
    assert png == tmp_path / "s.png" and png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(SystemExit) as leave:
        main(["report", str(tmp_path / "a"), "--format", "pdf", "-o", str(tmp_path / "r.html")])
    assert leave.value.code == 2 and "figure format 'pdf'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as leave:
        main(["report", str(tmp_path), "-o", str(tmp_path / "r.html"), "--plan"])
    assert leave.value.code == 2 and "no run folder" in capsys.readouterr().err


@pytest.mark.full
def test_long_runs_stay_small(tmp_path):
    found = [made_run(tmp_path / name, steps=6000, scale=k + 1.0) for k, name in enumerate("abc")]
    for each in found:
        rows = [json.loads(line) for line in (each / "metrics.jsonl").read_text().splitlines()]
        for row in rows:
            row.pop("sites", None)
        (each / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_report(found, tmp_path / "r.html")
    assert (tmp_path / "r.html").stat().st_size < 2_000_000


def test_tables_escape_and_show_numbers(tmp_path):
    html = table([{"<k>": 1234567, "v": 0.00012345}, {"v": float("nan"), "more": "<b>"}])
    assert all(text in html for text in ("&lt;k&gt;", "1,234,567", "0.0001234", ">nan<", "&lt;b&gt;")) and "<b>" not in html
    write_page(tmp_path / "p.html", "<t>", [("<h>", html)], contents=True)
    page = Page(tmp_path / "p.html")
    assert page.count("t") == page.count("h") == 0 and page.text.count("<h>") == 2
