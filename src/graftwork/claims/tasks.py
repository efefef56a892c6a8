"""Data sets of the pack in GRAFTWORK_DATA as rows that a recipe can read.

A task is a folder of the pack, the format that its rows have as training data, and how a row becomes that. Only `train` is trained on,
learning rates are chosen on `validation`, and what is reported is measured on `test` (where a set lacks one of them, the parts are cut
from the ones it has, without overlap). Text for training from scratch is cut into rows of `length` bytes.
"""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError, UsageError, nearest
from ..files import atomic_write_text

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Task:
    """classes: names of the labels of a score head, in its (alphabetical) order; None for a causal model."""

    folder: str
    format: str
    row: Callable[[dict[str, Any]], dict[str, Any]]
    classes: tuple[str, ...] | None = None


def _answer(row: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": f"{row['question']}\n", "completion": f"{row['answer']}"}


def _instruction(row: dict[str, Any]) -> dict[str, Any]:
    given = f"{row['instruction']}\n{row['input']}".strip() if row.get("input") else row["instruction"]
    return {"prompt": f"{given}\n", "completion": row["output"]}


def _labels(names: tuple[str, ...], *columns: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def row(found: dict[str, Any]) -> dict[str, Any]:
        label = found["label"]
        return {"text": " | ".join(found[c] for c in columns), "label": names[label] if isinstance(label, int) else label}

    return row


_TREC = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
_YES, _ENTAILS, _PAIR = ("no", "yes"), ("entailment", "not_entailment"), ("sentence1", "sentence2")
TASKS: dict[str, Task] = {
    "e2e": Task("e2e_nlg", "completion", lambda r: {"prompt": f"{r['mr']}\n", "completion": r["ref"] if "ref" in r else r["refs"][0]}),
    "gsm8k": Task("math/gsm8k", "completion", _answer),
    "word_problems": Task("math/word_problems", "completion", _answer),
    "alpaca": Task("instruction/alpaca_gpt4_en", "completion", _instruction),
    "openbookqa": Task("commonsense/openbookqa", "completion", _instruction),
    "arc_easy": Task("commonsense/arc_easy", "completion", _instruction),
    "shakespeare": Task("lm/tinyshakespeare", "text", lambda r: r),
    "stories": Task("lm/tinystories", "text", lambda r: {"text": r["text"]}),
    "brown": Task("lm/brown_genres", "text", lambda r: {"text": r["text"]}),
    "sst2": Task("glue/sst2", "classification", _labels(_YES, "sentence"), _YES),
    "cola": Task("glue/cola", "classification", _labels(_YES, "sentence"), _YES),
    "mrpc": Task("glue/mrpc", "classification", _labels(_YES, *_PAIR), _YES),
    "rte": Task("glue/rte", "classification", _labels(_ENTAILS, *_PAIR), _ENTAILS),
    "trec": Task("text_classification/trec", "classification", lambda r: {"text": r["question"], "label": r["coarse"]}, _TREC),
}


def task_of(name: str) -> Task:
    if name not in TASKS:
        raise UsageError(f"there is no task '{name}'{nearest(name, TASKS)}", remedy=f"tasks: {', '.join(TASKS)}")
    return TASKS[name]


def data_folder() -> Path:
    """The data pack. Raises DataError where it is not named or not there."""
    root = os.environ.get("GRAFTWORK_DATA")
    if not root:
        raise DataError("this claim trains on real data, and GRAFTWORK_DATA is not set",
                        remedy="export GRAFTWORK_DATA=FOLDER of the data pack; memory and count claims need none")
    if not Path(root).is_dir():
        raise DataError(f"GRAFTWORK_DATA names no folder: {root}", remedy="export GRAFTWORK_DATA=FOLDER of the data pack")
    return Path(root)


def read_rows(task: Task, split: str, length: int) -> list[dict[str, Any]]:
    """All rows of a split, as the task has them. Raises DataError where the pack lacks it."""
    folder = data_folder() / task.folder
    text, lines = folder / f"{split}.txt.gz", folder / f"{split}.jsonl.gz"
    try:
        if text.exists():
            with gzip.open(text, "rt", encoding="utf-8") as file:
                return [{"text": piece} for piece in _pieces(file.read(), length)]
        with gzip.open(lines, "rt", encoding="utf-8") as file:
            rows = [task.row(json.loads(line)) for line in file]
    except FileNotFoundError:
        raise DataError(f"the data pack has no {task.folder} ({split})", remedy="GRAFTWORK_DATA must hold the whole pack") from None
    if task.format == "text":
        return [{"text": piece} for row in rows for piece in _pieces(row["text"], length)]
    return rows


def _pieces(text: str, length: int) -> list[str]:
    size = length - 1  # and the end token
    return [text[i:i + size] for i in range(0, max(1, len(text) - size), size)]


def splits(task: Task, length: int) -> dict[str, list[dict[str, Any]]]:
    """{train, validation, test}; a set with two splits gives the half of the second one to each of validation and test."""
    found = {}
    for split in SPLITS:
        try:
            found[split] = read_rows(task, split, length)
        except DataError:
            if split == "train" or not (data_folder() / task.folder).is_dir():
                raise
    for rows in found.values():
        random.Random(0).shuffle(rows)
    for absent, present in (("test", "validation"), ("validation", "test"), ("test", "train")):
        if absent not in found and present in found:
            half = len(found[present]) // 2
            found[absent], found[present] = found[present][:half], found[present][half:]
    if "validation" not in found:
        half = len(found["test"]) // 2
        found["validation"], found["test"] = found["test"][:half], found["test"][half:]
    return found


def write_split(path: Path, rows: list[dict[str, Any]], count: int) -> Path:
    atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in rows[:count]))
    return path
