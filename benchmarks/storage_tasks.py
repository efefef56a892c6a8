"""The texts and questions of benchmarks/storage.py, and what a model makes of them.

A question's options share a beginning, and many questions are short, so several of them are scored in one row: the tokens of the
beginning once, then those of every option, each with the positions that it would have alone, under a mask by which a token sees
its own option and beginning only. That is the same sum of log-likelihoods as one row an option, for half the tokens.
"""

from __future__ import annotations

import gzip
import random
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rows import read_rows
from torch import Tensor

#: tokens that the output head reads at a time, and of a row of questions
PIECE, ROW = 256, 512
Item = tuple[list[tuple[str, str]], int]  # (beginning, rest) of every option, which is right


# -- texts ------------------------------------------------------------------------------------------------------------------
def texts(root: Path, tokenizer: Any, window: int, count: int) -> dict[str, Tensor]:
    """{text: its first `count` windows (count, window) int64}."""
    with gzip.open(root / "lm/wikitext2_raw/test.txt.gz", "rt", encoding="utf-8") as file:
        wiki = file.read()
    web = "\n\n".join(row["text"] for row in read_rows(root / "lm/c4_sample/test.jsonl.gz"))
    found = {}
    for name, text in (("wikitext2", wiki), ("c4", web)):
        ids = tokenizer(text[: 12 * window * count], add_special_tokens=False)["input_ids"][: window * count]
        found[name] = torch.tensor(ids).view(-1, window)
    return found


@torch.no_grad()
def losses(model: Any, ids: Tensor) -> Tensor:
    """Negative log-likelihood (nats) of all tokens but the first of one window (T,): (T - 1,)."""
    hidden = model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0, :-1]
    return torch.cat([F.cross_entropy(model.lm_head(part).float(), asked, reduction="none")
                      for part, asked in zip(hidden.split(PIECE), ids[1:].split(PIECE))])


# -- questions --------------------------------------------------------------------------------------------------------------
def _lettered(row: dict[str, Any], word: str) -> Item | None:
    question, *options = re.split(rf"\s*{word}\d:\s*", row["instruction"].split("Answer format:")[0].strip())
    question, number = question.split("question:", 1)[-1].strip(), re.search(r"\d+", row["answer"])
    if len(options) < 2 or not number:
        return None
    return [(f"Question: {question}\nAnswer:", f" {option.strip()}") for option in options], int(number.group()) - 1


def _winogrande(row: dict[str, Any]) -> Item | None:
    sentence, *options = re.split(r"\s*Option\d:\s*", row["instruction"].split("Answer format:")[0].strip())
    sentence, number = sentence.split("sentence:", 1)[-1].strip(), re.search(r"\d+", row["answer"])
    before, gap, after = sentence.partition("_")
    if len(options) != 2 or not number or not gap or not after.strip() or not before.strip():
        return None
    return [(f"{before}{option.strip()}", after) for option in options], int(number.group()) - 1


READERS = {"piqa": lambda row: _lettered(row, "Solution"), "arc_easy": lambda row: _lettered(row, "Answer"),
           "openbookqa": lambda row: _lettered(row, "Answer"), "winogrande": _winogrande}


def questions(root: Path, count: int) -> dict[str, list[Item]]:
    """{task: `count` of its questions}."""
    found = {}
    for task, read in READERS.items():
        rows = [item for row in read_rows(root / f"commonsense/{task}/test.jsonl.gz") if (item := read(row))]
        random.Random(0).shuffle(rows)
        found[task] = rows[:count]
    return found


def packed(items: list[Item], tokenizer: Any) -> list[dict[str, list[int]]]:
    """Rows of about ROW tokens: `ids`, `positions`, `item` and `option` (-1: the beginning) of every token, and whether it `counts`."""
    rows: list[dict[str, list[int]]] = []
    for number, (choices, _) in enumerate(items):
        ids = [tokenizer(before + rest, add_special_tokens=False)["input_ids"] for before, rest in choices]
        starts = [len(tokenizer(before, add_special_tokens=False)["input_ids"]) for before, _ in choices]
        common = next((k for k in range(min(starts)) if len({each[k] for each in ids}) > 1), min(starts))
        parts = [(-1, ids[0][:common], 0, common)]
        parts += [(i, each[common:], common, start) for i, (each, start) in enumerate(zip(ids, starts))]
        if not rows or len(rows[-1]["ids"]) + sum(len(part) for _, part, _, _ in parts) > ROW:
            rows.append({key: [] for key in ("ids", "positions", "item", "option", "counts")})
        for option, part, first, start in parts:
            places = range(first, first + len(part))
            for key, values in (("ids", part), ("positions", places), ("item", [number] * len(part)),
                                ("option", [option] * len(part)), ("counts", [place >= start for place in places])):
                rows[-1][key].extend(values)
    return rows


@torch.no_grad()
def likelihoods(model: Any, tokenizer: Any, items: list[Item]) -> list[list[float]]:
    """Log-likelihood (nats) of the rest of every option of every item."""
    found = [[0.0] * len(choices) for choices, _ in items]
    for row in packed(items, tokenizer):
        row = {key: torch.tensor(values) for key, values in row.items()}
        order = torch.arange(len(row["ids"]))
        sees = (row["item"][:, None] == row["item"]) & (order <= order[:, None])
        sees &= (row["option"] == -1) | (row["option"][:, None] == row["option"])
        hidden = model.base_model(input_ids=row["ids"][None], position_ids=row["positions"][None], attention_mask=sees[None, None],
                                  use_cache=False).last_hidden_state[0]
        asked = row["counts"].nonzero()[:, 0]
        # what predicts a token is the last one that it sees besides itself
        behind = (sees[asked] & (order != asked[:, None])).int().mul(order + 1).amax(1) - 1
        loss = F.cross_entropy(model.lm_head(hidden[behind]).float(), row["ids"][asked], reduction="none")
        for item, option, each in zip(row["item"][asked].tolist(), row["option"][asked].tolist(), loss.tolist()):
            found[item][option] -= each
    return found


def right(model: Any, tokenizer: Any, items: list[Item]) -> list[int]:
    """1 where the option with the highest log-likelihood a character is the right one."""
    found = []
    for (choices, answer), scores in zip(items, likelihoods(model, tokenizer, items)):
        each = [score / len(rest) for score, (_, rest) in zip(scores, choices)]
        found.append(int(each.index(max(each)) == answer))
    return found
