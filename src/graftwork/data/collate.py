"""Rows of a `TokenDataset` to one batch of tensors, with everything the chunked loss needs computed on the host.

Index arithmetic: the hidden state of position (row, t) predicts token t + 1, so a trained token labels[row, t+1]
becomes the target of flat position p = row * T + t of the hidden states viewed as (N * T, d). The counts are Python
integers and tensor shapes known before the step: the training path needs no data-dependent shape.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..errors import UsageError

Batch = dict[str, Any]
#: what a model's forward takes; the rest of a batch is for losses and routing
_FORWARD = ("input_ids", "attention_mask", "position_ids", "token_type_ids")


def model_inputs(batch: Batch) -> Batch:
    """The keyword arguments for `model(...)` or its backbone. A packed batch must run without a cache (packing.py)."""
    inputs = {name: batch[name] for name in _FORWARD if name in batch}
    return {**inputs, "use_cache": False} if "segment_ids" in batch else inputs


def real_tokens(batch: Batch) -> torch.Tensor:
    """(N, T) bool: True where a token is no padding, for plain and packed batches."""
    return batch["segment_ids"] > 0 if "segment_ids" in batch else batch["attention_mask"].bool()


def pad_token_of(tokenizer) -> int:
    """Padding is masked everywhere, so any id serves: pad, else EOS, else 0."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


class _Padding:
    def __init__(self, pad_token_id: int, *, pad_to_multiple_of: int | None = None, padding_side: str = "right"):
        if padding_side not in ("left", "right"):
            raise UsageError(f"padding_side must be 'left' or 'right', not {padding_side!r}")
        self.pad_token_id, self.multiple, self.side = pad_token_id, pad_to_multiple_of or 1, padding_side

    def width(self, rows: list[dict]) -> int:
        return -(-max(len(row["input_ids"]) for row in rows) // self.multiple) * self.multiple

    def slot(self, length: int, width: int) -> slice:
        return slice(0, length) if self.side == "right" else slice(width - length, width)

    def stack(self, rows: list[dict], name: str, fill: int) -> np.ndarray:
        width = self.width(rows)
        out = np.full((len(rows), width), fill, dtype=np.int64)
        for line, row in zip(out, rows):
            line[self.slot(len(row[name]), width)] = row[name]
        return out

    def mask(self, rows: list[dict]) -> np.ndarray:
        return self.stack([{"input_ids": r["input_ids"], "real": [1] * len(r["input_ids"])} for r in rows], "real", 0)


class Collator(_Padding):
    """Batches for causal models. `collate(rows)`, also called as a function, returns

    input_ids (N, T), labels (N, T) with -100 where untrained, attention_mask (N, T); for packed rows position_ids (N, T)
    and segment_ids (N, T) (1, 2, ... per example, 0 for padding) *instead of* attention_mask; target_index (n,) flat
    positions whose next token is trained; target_ids (n,) those tokens; row_tokens (N,) targets per row: all int64.
    Python: n_targets, n_tokens (without padding), row_counts (row_tokens as a list), rows (adapter name or None per row,
    if any row has one), index (rows of the data set, for messages). T is the longest row, rounded up to `pad_to_multiple_of`.
    """

    def collate(self, rows: list[dict]) -> Batch:
        packed = any("position_ids" in row for row in rows)
        ids, labels = self.stack(rows, "input_ids", self.pad_token_id), self.stack(rows, "labels", -100)
        mask = self.mask(rows)
        arrays = {"input_ids": ids, "labels": labels}
        if packed:
            arrays.update(self.packed(rows, ids.shape[1]))
        else:
            arrays["attention_mask"] = mask
            if self.side == "left":
                arrays["position_ids"] = np.maximum(mask.cumsum(1) - 1, 0)
        # Neither padding on the left nor the last token of the example before predicts the first token of an example.
        segments = arrays["segment_ids"] if packed else mask
        trained = (labels[:, 1:] != -100) & (segments[:, 1:] == segments[:, :-1])
        row, t = np.nonzero(trained)
        arrays.update(target_index=row * ids.shape[1] + t, target_ids=ids[row, t + 1], row_tokens=trained.sum(1))
        batch: Batch = {name: torch.from_numpy(np.ascontiguousarray(a, dtype=np.int64)) for name, a in arrays.items()}
        batch.update(n_targets=len(row), n_tokens=int(mask.sum()), row_counts=trained.sum(1).tolist())
        return _passed_on(batch, rows)

    __call__ = collate

    def packed(self, rows: list[dict], width: int) -> dict[str, np.ndarray]:
        """position_ids and segment_ids. Padding counts up from 0 too: one more segment, of which nothing is used."""
        positions, segments = np.zeros((len(rows), width), np.int64), np.zeros((len(rows), width), np.int64)
        for n, row in enumerate(rows):
            own = np.asarray(row.get("position_ids", range(len(row["input_ids"]))))
            slot = self.slot(len(own), width)
            positions[n], segments[n, slot] = np.arange(width), (own == 0).cumsum()
            positions[n, slot.stop:] = np.arange(width - slot.stop)
            positions[n, slot] = own
        return {"position_ids": positions, "segment_ids": segments}


class ClassificationCollator(_Padding):
    """Batches for classification and regression: input_ids, attention_mask (N, T), labels (N,), token_type_ids (N, T) where the
    tokenizer makes them: all int64, real labels fp32; rows, index and n_tokens as in `Collator`, n_targets = N."""

    def collate(self, rows: list[dict]) -> Batch:
        arrays = {"input_ids": self.stack(rows, "input_ids", self.pad_token_id), "attention_mask": self.mask(rows)}
        if "token_type_ids" in rows[0]:
            arrays["token_type_ids"] = self.stack(rows, "token_type_ids", 0)
        batch: Batch = {name: torch.from_numpy(a) for name, a in arrays.items()}
        batch["labels"] = torch.tensor([row["labels"] for row in rows],
                                       dtype=torch.float32 if isinstance(rows[0]["labels"], float) else torch.int64)
        batch.update(n_targets=len(rows), n_tokens=int(arrays["attention_mask"].sum()))
        return _passed_on(batch, rows)

    __call__ = collate


def _passed_on(batch: Batch, rows: list[dict]) -> Batch:
    if any(row.get("adapter") is not None for row in rows):
        batch["rows"] = tuple(row.get("adapter") for row in rows)
    if all("index" in row for row in rows):
        batch["index"] = tuple(row["index"] for row in rows)
    return batch
