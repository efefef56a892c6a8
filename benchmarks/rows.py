"""The rows of a task as files, and the loss of each: what the comparisons of adapters and of optimizers have in common."""

from __future__ import annotations

import gzip
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from graftwork.data.dataset import build


def data_folder() -> Path:
    root = os.environ.get("GRAFTWORK_DATA")
    if not root:
        sys.exit("set GRAFTWORK_DATA to the folder of the data sets")
    return Path(root)


def read_rows(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write_rows(path: Path, rows: list[dict[str, Any]], count: int) -> None:
    """`count` of the rows, by one shuffle."""
    random.Random(0).shuffle(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:count]), encoding="utf-8")


@torch.no_grad()
def row_losses(model: Any, tokenizer: Any, path: Path, kind: str, length: int) -> list[float]:
    """Mean negative log-likelihood (nats) of the trained tokens of each row of a file. kind: its format."""
    data = build(tokenizer, path, format=kind, max_length=length)
    collate, losses = data.collator(), []
    order = sorted(range(len(data)), key=lambda i: len(data[i]["input_ids"]))
    for first in range(0, len(order), 8):
        batch = collate([data[i] for i in order[first: first + 8]])
        hidden = model.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        labels = batch["labels"][:, 1:]
        asked = labels != -100
        loss = F.cross_entropy(model.lm_head(hidden[:, :-1][asked]).float(), labels[asked], reduction="none")
        losses += (torch.zeros(len(asked)).index_add_(0, asked.nonzero()[:, 0], loss) / asked.sum(1).clamp(min=1)).tolist()
    return [loss for _, loss in sorted(zip(order, losses))]
