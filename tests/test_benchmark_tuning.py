"""The benchmark of fine-tuning on quantised weights: every row of it starts, trains and is scored, on a small model."""

import gzip
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import matrix  # noqa: E402
import storage_tuning  # noqa: E402
from storage_paths import BASELINE, PATHS, TARGET  # noqa: E402

SMALL = replace(storage_tuning.TASK, base=None, steps=1, batch=2, length=48, train=4, validation=2, test=2)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuning")
    data = folder / "e2e_nlg"
    data.mkdir()
    rows = [{"mr": f"name[{i}]", "ref": f"the place {i}", "refs": [f"the place {i}"]} for i in range(6)]
    for split in ("train", "validation", "test"):
        with gzip.open(data / f"{split}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRAFTWORK_DATA", str(folder))
        yield storage_tuning.Bench(SMALL, folder)


@pytest.mark.full
@pytest.mark.parametrize("label", PATHS)
def test_every_row_trains(bench, label):
    sections = bench.sections(label, PATHS[label].first)
    before, made = bench.start(sections), bench.run(sections, PATHS[label].rates[1], 0, 1, ("test",))
    assert "error" not in made and math.isfinite(before["test"]) and made["rows"] != before["rows"]


def test_sizes_meet_a_peak(monkeypatch):
    """Against a search through all sizes."""
    bench, asked = storage_tuning.Bench.__new__(storage_tuning.Bench), []

    def planned(sections, rate):
        r, g = sections["adapter"].get("r"), sections["storage"]["group_size"] if "group_size" in sections["storage"] else None
        trained = 1000 * r if r else 10**6 // g
        asked.append(trained)
        return {"peak_bytes": 500_000 + 13 * trained, "trained": trained}

    monkeypatch.setattr(bench, "planned", planned, raising=False)
    assert bench.size(TARGET, None) == {"size": 24, "off": 0.0, "peak_bytes": 812_000, "trained": 24_000}
    for label in ("lora, int2", "qa_lora, int3", "peqa, int3"):
        for target in (600_000, 812_000, 1_000_000):
            asked.clear()
            found = bench.size(label, target)
            every = {size: planned(bench.sections(label, size), 0)["peak_bytes"] / target - 1 for size in PATHS[label].sizes}
            assert abs(found["off"]) <= max(storage_tuning.NEAR, min(map(abs, every.values()))) and found["off"] == every[found["size"]]


@pytest.mark.full
def test_matrix_resumes_and_stops_by_the_clock(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "planned", lambda sections, rate: {"peak_bytes": 1000, "trained": 10})
    labels = [TARGET, "peqa, int3"]
    storage_tuning.run(bench, labels, tmp_path, 0.0, 1, rates=2, steps=1)  # over before it begins
    assert "stopped in lora, nf4" in capsys.readouterr().err and not storage_tuning.read(tmp_path)
    storage_tuning.run(bench, labels, tmp_path, math.inf, 2, rates=2, steps=1)
    found = storage_tuning.read(tmp_path)
    assert list(found) == labels and [len(entry["finals"]) for entry in found.values()] == [2, 2]
    assert "peqa, int3, not tuned" in storage_tuning.table(found)
    monkeypatch.setattr(bench, "run", None)  # every cell is there
    storage_tuning.run(bench, labels, tmp_path, math.inf, 2, rates=2, steps=1)


def test_a_row_is_taken_by_one_process(tmp_path):
    first, second = (matrix.unclaimed(["a", "b", "c"], tmp_path) for _ in range(2))
    assert next(first) == "a" and next(second) == "b" and list(first) == ["c"]
    second.close()  # as where a process ends
    assert list(matrix.unclaimed(["a", "b", "c"], tmp_path)) == ["a", "b", "c"] and not list(tmp_path.glob("*/*"))


@pytest.mark.full
def test_table_has_a_row_before_each(tmp_path):
    for label, test in ((TARGET, 2.0), (BASELINE, 2.5)):
        place = tmp_path / storage_tuning.slug(label)
        place.mkdir()
        (place / "size.json").write_text(json.dumps({"size": 24, "off": 0.01, "peak_bytes": 100}))
        (place / "start.json").write_text(json.dumps({"test": 4.0, "bits": 4.1}))
        (place / "search-lr0.001.json").write_text(json.dumps({"rate": 1e-3, "validation": 2.2, "peak_bytes": 102}))
        for seed in (1, 2):
            (place / f"final-seed{seed}.json").write_text(json.dumps(
                {"rate": 1e-3, "test": test + seed / 10, "rows": [test, test + seed / 5], "peak_bytes": 101}))
    text = storage_tuning.table(storage_tuning.read(tmp_path))
    assert "| lora, nf4, not tuned | | 4.100 | | | | | 4.000 | | |" in text and "2.150 ± 0.050 (2)" in text
    assert f"2 of {len(PATHS)} rows" in text and "-0.500 [-0.500, -0.500], better" in text
