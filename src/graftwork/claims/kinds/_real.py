"""Real models and steps for the small kinds: what an arm's recipe trains, on a batch of its shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..bases import base_folder
from .base import Options, merged


class RealOptions(Options):
    """base: smollm2-135m-instruct, scratch or tiny (bases.py); width and blocks are those of the last two."""

    base: str = "scratch"
    width: int = 192
    blocks: int = 4
    rows: int = 8
    length: int = 128


def real_step(check: RealOptions, sections: dict[str, Any], folder: Path, seed: int = 0) -> tuple[Any, dict[str, Any]]:
    """(training step, its micro-batch) of an arm, in fp32 unless it says otherwise; tokens drawn by `seed`, all trained."""
    import torch

    from ...data.collate import Collator
    from ...recipe import load_recipe
    from ...training.build import build_grafts, build_model, build_step

    model_path = base_folder(check.base, folder, 0, width=check.width, blocks=check.blocks)
    recipe = load_recipe(merged({"model": model_path, "train": {"batch_size": check.rows, "max_steps": 1000, "precision": "fp32"},
                                 "data": {"train": "from-the-shape.jsonl", "max_length": check.length}}, sections))
    model, _ = build_model(recipe)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, model.config.vocab_size, (check.rows, check.length), generator=generator).tolist()
    batch = Collator(0)([{"input_ids": row, "labels": [-100, *row[1:]]} for row in tokens])
    grafts = build_grafts(recipe, model, batches=lambda name: iter([batch] * 64))
    step = build_step(recipe, model, grafts, 1000)
    model.train()
    return step, batch
