"""What the training tests share: a tiny model folder, small data files, a recipe as a mapping, and one call that runs it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

import graftwork
import tiny
from graftwork.training import checkpoint as ckpt
from graftwork.training.run import train_recipe
from graftwork.training.trainer import TIME_FIELDS

WORDS = "the and in her on that user it as at is or an all".split()


def words(seed: int, n: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (n,), generator=generator).tolist())


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def completions(path: Path, n: int = 12, seed: int = 0) -> Path:
    """Rows of unequal length with unequal numbers of trained tokens."""
    first = seed * 1000
    return write_rows(path, [{"prompt": words(first + i, 2 + i % 3), "completion": " " + words(first + 500 + i, 1 + i % 5)}
                             for i in range(n)])


def labelled(path: Path, n: int = 12) -> Path:
    return write_rows(path, [{"text": words(i, 5), "label": ["no", "yes", "maybe"][i % 3]} for i in range(n)])


def folder(base: Path, kind: str = "llama", **options) -> Path:
    """A saved tiny model; built once per base folder."""
    path = base / kind
    if not path.exists():
        tiny.save(getattr(tiny, kind)(**options), path)
    return path


def recipe(model: Path, file: Path, out: Path, *, train: dict | None = None, data: dict | None = None, **sections) -> dict:
    return {"model": str(model), "adapter": {"method": "lora", "r": 4}, "optimizer": {"method": "adamw", "lr": 1e-2},
            "output_dir": str(out), **sections, "data": {"train": str(file), "max_length": 64, **(data or {})},
            "train": {"max_steps": 6, "batch_size": 4, "save_steps": 0, "precision": "fp32", **(train or {})}}


def run(document, **options):
    return train_recipe(document, quiet=True, **{"measure": False, **options})


def log_of(out: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIME_FIELDS} for row in rows]


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor in the safetensors files of a folder."""
    from safetensors.torch import load_file

    return {f"{f.name}/{k}": v for f in sorted(path.rglob("*.safetensors")) for k, v in load_file(f).items()}


def interrupted(document: dict, **options):
    """Runs a recipe, puts it back to its first checkpoint as if it had been stopped there, and resumes it."""
    run(document, **options)
    out = Path(document["output_dir"])
    shutil.rmtree(out / "graft")
    for step in ckpt.complete(out)[1:]:
        shutil.rmtree(step)
    return run(document, resume=True, **options)


def plans_runs_and_resumes(base: Path, *, save_steps: int = 3, **sections):
    """(plan, finished run) of a recipe on the tiny model, after checking that an interrupted run ends in the same values.
    Files are written to `base`; the artifact is in base / "a" / "graft"."""
    model, file = folder(base), completions(base / "d.jsonl")
    made = graftwork.plan(recipe(model, file, base / "p", **sections), estimate_time=False)
    whole = run(recipe(model, file, base / "a", **sections))
    resumed = interrupted(recipe(model, file, base / "b", train={"save_steps": save_steps}, **sections))
    mine, theirs = dict(whole.grafts[0].named_parameters()), dict(resumed.grafts[0].named_parameters())
    assert_identical({k: v.detach() for k, v in mine.items()}, {k: v.detach() for k, v in theirs.items()})
    return made, whole


def assert_identical(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys() and a
    different = [k for k in a if a[k].dtype != b[k].dtype or not torch.equal(a[k], b[k])]
    assert not different, different
