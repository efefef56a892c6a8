"""What a training leaves for its report: numbers by site, memory, spectra, samples."""

import json

import numpy as np
import pytest
import yaml

import graftwork
import tiny
from graftwork.cli.main import main
from graftwork.report import course
from graftwork.report.build import SECTIONS, add_plan
from graftwork.report.runs import read_runs
from graftwork.selection.lisa import LISA, LISASelection
from graftwork.serving.generate import generate
from training_support import completions, folder, interrupted, log_of, recipe, run


@pytest.mark.full
def test_training_writes_ranks_memory_spectra_and_samples(tmp_path, capsys):
    document = recipe(folder(tmp_path), completions(tmp_path / "d.jsonl", n=24), tmp_path / "a", adapter={"method": "adalora", "r": 4},
                      selection=[{"method": "adalora", "target_r": 2, "interval": 1, "warmup": 1, "final": 2}],
                      train={"max_steps": 8, "eval_steps": 4, "logging_steps": 2}, data={"eval_fraction": 0.25})
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(document))
    main(["train", str(tmp_path / "r.yaml"), "--samples", "3", "--quiet"])
    add_plan(tmp_path / "a", lambda text: None)
    assert "report.html" in capsys.readouterr().out and (tmp_path / "a" / "report.html").stat().st_size > 10_000
    one = read_runs([tmp_path / "a"])[0]
    assert [s for s, _ in one.series("steps")] == [2, 4, 6, 8] and all(v > 1e7 for _, v in one.series("process_bytes"))
    model, tokenizer = graftwork.load(str(tmp_path / "llama"))
    graft = graftwork.attach_saved(model, tmp_path / "a" / "graft")
    maps, last = one.maps()["rank"], {name: a.gate.count_nonzero().item() for name, a in graft.adapters.items()}
    assert sorted(maps) == [2, 4, 6, 8] and maps[8] == last and sum(last.values()) == 2 * len(last)
    assert sum(maps[2].values()) > sum(maps[4].values()) >= sum(maps[8].values())
    for site, change in graft.delta_weights().items():
        wanted = np.linalg.svd(change.double().numpy(), compute_uv=False)
        mine = one.spectra["sites"][site]["values"]
        np.testing.assert_allclose(mine, wanted[:len(mine)], atol=1e-6)
    assert len(one.samples) == 3 and one.info["measured"]["step"] >= 1
    for row in one.samples:
        with graft.disabled():
            before = generate(model, tokenizer, [row["prompt"]], max_new_tokens=96)[0].text.strip()
        after = generate(model, tokenizer, [row["prompt"]], max_new_tokens=96)[0].text.strip()
        assert before.startswith(row["before"]) and after.startswith(row["after"])
    figures = {figure.name for make in SECTIONS for figure in make(read_runs([tmp_path / "a"])).figures}
    assert {"loss", "memory-peak", "memory-run", "memory-step", "map-rank", "map-rank-end", "spectra"} <= figures
    over = next(f for f in course.memory(read_runs([tmp_path / "a"])).figures if f.name == "memory-run")
    plan = json.loads((tmp_path / "a" / "plan.json").read_text())
    assert over.rows[0]["tensors at the peak, planned"] == plan["peak_bytes"] / 2**20


@pytest.mark.slow
def test_selected_layers_are_those_that_were_drawn(tmp_path):
    run(recipe(folder(tmp_path), completions(tmp_path / "d.jsonl"), tmp_path / "a", adapter=None, selection=[{"method": "lisa", "layers": 1,
        "interval": 2}], optimizer={"method": "adamw", "lr": 1e-3}))
    maps = read_runs([tmp_path / "a"])[0].maps()["share of the layer that trains"]
    chooses = LISASelection(LISA(layers=1, interval=2))
    assert sorted(maps) == [1, 2, 3, 4, 5, 6]
    for step, shares in maps.items():
        active = chooses.active_layers(0, (step - 1) // 2, tiny.LAYERS)
        assert {name for name, share in shares.items() if name.startswith("layer") and share} == {f"layer {i}" for i in active}
        assert shares["before the layers"] == 1.0
    assert len({tuple(s.items()) for s in maps.values()}) > 1


CHOOSING = {
    "badam": (None, {"order": "ascending", "interval": 1, "embeddings": False}),
    "freeze": ({"method": "lora", "r": 4}, {"gradual": "unfreeze", "interval": 2}),
    "lamda_freeze": ({"method": "lora", "r": 4}, {"fraction": 0.5}),
    "sora": ({"method": "sora", "r": 4}, {"threshold": 0.02}),
    "increlora": ({"method": "increlora", "r": 2}, {"final_r": 3, "top": 3, "interval": 1}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHOOSING)
def test_each_selection_says_what_it_did(tmp_path, name):
    adapter, options = CHOOSING[name]
    done = run(recipe(folder(tmp_path), completions(tmp_path / "d.jsonl"), tmp_path / "a", adapter=adapter,
                      selection=[{"method": name, **options}], optimizer={"method": "adamw", "lr": 1e-2}))
    ((what, maps),) = read_runs([tmp_path / "a"])[0].maps().items()
    assert sorted(maps) == [1, 2, 3, 4, 5, 6]
    if name == "badam":
        assert [[maps[s][f"layer {i}"] for i in (0, 1)] for s in maps] == [[1, 0], [0, 1]] * 3
    elif name == "freeze":
        assert [[maps[s][f"layer {i}"] for i in (0, 1)] for s in maps] == [[0, 1]] * 2 + [[1, 1]] * 4
    elif name == "lamda_freeze":
        assert [set(maps[s].values()) for s in maps] == [{1.0}, {0.75}, {0.5}, {0.0}, {0.0}, {0.0}]
    else:
        assert what == "rank" and maps[6] == {n: int((a.gate != 0).sum()) for n, a in done.grafts[0].adapters.items()}
        assert len({tuple(m.values()) for m in maps.values()}) > 1
    if name == "increlora":
        assert sum(maps[6].values()) == 3 * len(maps[6]) > sum(maps[1].values())


@pytest.mark.slow
def test_a_resumed_run_writes_the_same_map(tmp_path):
    document = recipe(folder(tmp_path), completions(tmp_path / "d.jsonl"), tmp_path / "a", selection=[{"method": "diffora", "keep": 0.5}])
    run(document)
    interrupted({**document, "output_dir": str(tmp_path / "b"), "train": {**document["train"], "save_steps": 4}})
    whole, resumed = ([{k: r[k] for k in ("step", "loss", "sites")} for r in log_of(tmp_path / n)] for n in "ab")
    assert whole == resumed
    gates = [row["sites"]["gate"] for row in whole]
    assert (len(gates[0]), len(gates[-1])) == (14, 2 * round(0.5 * 7))
    assert set(gates[0].values()) == {0.5} and set(gates[-1].values()) == {1.0}
