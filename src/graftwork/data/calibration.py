"""Calibration data: rows of tokens, without padding, for what looks at how a model's inputs are distributed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import DataError, UsageError
from .loading import load_dataset_rows
from .rendering import Renderer

#: rows that are computed together
ROWS = 4


class CalibrationRows:
    """`samples` rows of `length` token ids: the texts one after the other, cut. `digest`: SHA-256 of them; `notes`: what to know."""

    def __init__(self, rows: list[list[int]], notes: list[str]):
        self.rows, self.notes = rows, notes
        self.digest = hashlib.sha256(repr(rows).encode()).hexdigest()

    def batches(self) -> Iterator[dict[str, Any]]:
        """Model inputs."""
        import torch

        for start in range(0, len(self.rows), ROWS):
            ids = torch.tensor(self.rows[start:start + ROWS])
            yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def calibration_rows(data: Any, tokenizer: Any, *, samples: int = 128, length: int = 512) -> CalibrationRows:
    """data: a file or glob of any format that training reads, a .txt file, or an iterable of texts.

    Raises DataError where it has too little for one row."""
    if samples < 1 or length < 2:
        raise UsageError(f"{samples} rows of {length} tokens cannot calibrate anything", remedy="samples >= 1, length >= 2")
    if tokenizer is None:
        raise UsageError("calibration data needs a tokenizer, and the model has none", remedy="add the tokenizer files to its folder")
    ids: list[int] = []
    for part in _token_lists(data, tokenizer):
        ids += part
        if len(ids) >= samples * length:
            break
    rows = [ids[start:start + length] for start in range(0, min(len(ids), samples * length) - length + 1, length)]
    if not rows:
        raise DataError(f"the calibration data has {len(ids)} tokens, fewer than one row of {length}",
                        remedy=f"give more data, or --length {max(2, len(ids))} or less" if len(ids) > 1 else "give more data")
    short = [f"the calibration data gives {len(rows)} rows of {length} tokens, not {samples}"] if len(rows) < samples else []
    return CalibrationRows(rows, short)


def _token_lists(data: Any, tokenizer: Any) -> Iterator[list[int]]:
    if isinstance(data, (str, Path)):
        path = Path(data)
        if path.suffix == ".txt":
            try:
                data = [path.read_text(encoding="utf-8")]
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"cannot read {path}: {error}", remedy="give a UTF-8 text file") from None
        else:
            renderer = Renderer(tokenizer, train_on="all")
            for example in load_dataset_rows(str(path)):
                if example.texts is not None:
                    yield from (_ids(tokenizer, text) for text in example.texts)
                else:
                    yield renderer.encode(example).input_ids
            return
    if not isinstance(data, Iterable):
        raise UsageError(f"calibration data is a file or a list of texts, not {type(data).__name__}")
    for text in data:
        if not isinstance(text, str):
            raise UsageError(f"calibration data is a file or a list of texts; it holds {type(text).__name__}")
        yield _ids(tokenizer, text)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, verbose=False)["input_ids"]
