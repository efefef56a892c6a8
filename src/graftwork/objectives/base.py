"""The contract of an objective: a batch becomes one scalar loss, and sums per row that a fleet reports per adapter.

    loss = sum_i row_scale[row(i)] * term_i (+ the model's own router loss),      row_loss[r] = sum_{i in row r} term_i

A term is one thing that is predicted: a token (causal_lm) or a row's label (classification). The caller knows how many
terms the whole step has (`targets`, on the host) and passes one over it as `row_scale`, so that micro-batches of
different size add up to the gradient of one large batch. For a fleet `row_scale` is (N,): one over the step's terms
of the adapter of each row.

Nothing on this path reads a value on the host: it runs under FakeTensorMode when the batch carries `target_index`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..registry import MethodConfig

Batch = dict[str, Any]

#: Called around every piece of work on logits; a ledger may replace it to book what is created inside as `logits`.
logits_scope: Callable[[], AbstractContextManager[Any]] = nullcontext

#: Entries of a batch that are for losses, routing and messages; everything else is handed to the model.
NOT_FOR_THE_MODEL = frozenset({"labels", "target_index", "target_ids", "row_tokens", "row_counts", "segment_ids",
                               "n_targets", "n_tokens", "rows", "index"})


@dataclass(frozen=True)
class LossOutput:
    """loss: scalar fp32 with gradient. row_loss (N,) fp32, detached: the unscaled sum of each row's terms.
    row_tokens (N,) int64: how many terms each row has. metrics: detached scalars."""

    loss: Tensor
    row_loss: Tensor
    row_tokens: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Objective:
    """Base of all objectives; holds its options and no state that training changes."""

    def __init__(self, config: MethodConfig):
        self.config = config

    def loss(self, model: nn.Module, batch: Batch, row_scale: float | Tensor = 1.0) -> LossOutput:
        """The scaled loss of one micro-batch. row_scale: a number, or (N,) one factor per row."""
        raise NotImplementedError

    def targets_by_row(self, batch: Batch) -> list[int]:
        """Number of terms of each row, on the host."""
        raise NotImplementedError

    def targets(self, batch: Batch) -> int:
        """Number of terms of a batch, on the host."""
        return sum(self.targets_by_row(batch))

    def modules(self) -> list[nn.Module]:
        """Models of its own that are in memory beside the one that is trained."""
        return []

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Sums over a batch, without gradients: `loss` (plain, without label smoothing), `tokens` (terms), `correct`
        (terms predicted right), `rows` (rows with a term) and `rows_correct` (rows with all terms right); more where `means` wants it."""
        raise NotImplementedError

    def means(self, sums: dict[str, float]) -> dict[str, float]:
        """What is reported of the added sums of all batches: loss (nats per term), perplexity, accuracy (terms), row_accuracy (rows with
        every term right), n (rows)."""
        loss = sums["loss"] / max(sums["tokens"], 1)
        return {"loss": loss, "perplexity": math.exp(min(loss, 50.0)), "accuracy": sums["correct"] / max(sums["tokens"], 1),
                "row_accuracy": sums["rows_correct"] / max(sums["rows"], 1), "n": int(sums["rows"])}


def unwrap(model: nn.Module) -> nn.Module:
    """The Transformers model inside DistributedDataParallel or torch.compile wrappers."""
    while True:
        inner = model._modules.get("module", model._modules.get("_orig_mod"))
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def forward_inputs(batch: Batch) -> Batch:
    """What is handed to the model's forward."""
    return {name: value for name, value in batch.items() if name not in NOT_FOR_THE_MODEL}


def token_targets(batch: Batch) -> tuple[Tensor, Tensor]:
    """(target_index (n,), target_ids (n,)), both int64. Flat position p = row * T + t predicts token (row, t + 1).

    Taken from the batch, else computed from `labels` (N, T) with -100 where untrained; computing reads the device.
    Raises UsageError when the batch has neither."""
    if "target_index" in batch:
        return batch["target_index"], batch["target_ids"]
    labels = batch.get("labels")
    if labels is None or labels.shape != batch["input_ids"].shape:
        raise UsageError("the batch names no tokens to train on: no 'target_index', and no 'labels' of the shape of 'input_ids'",
                         remedy="use the collator of graftwork.data, or give labels (N, T) with -100 where nothing is trained")
    trained = labels[:, 1:] != -100
    if "segment_ids" in batch:  # the end of one packed example does not predict the start of the next
        trained = trained & (batch["segment_ids"][:, 1:] == batch["segment_ids"][:, :-1])
    row, t = torch.where(trained)
    return row * labels.shape[1] + t, labels[row, t + 1]


def token_counts(batch: Batch) -> list[int]:
    """Trained tokens per row, on the host."""
    if "row_counts" in batch:
        return batch["row_counts"]
    if "row_tokens" in batch:
        return batch["row_tokens"].tolist()
    n, width = batch["input_ids"].shape
    return torch.bincount(token_targets(batch)[0] // width, minlength=n).tolist()


def sum_by_row(values: Tensor, row: Tensor, rows: int) -> Tensor:
    """(n,) values added up by their row (n,) int64: (rows,), in the dtype of the values."""
    return torch.zeros(rows, dtype=values.dtype, device=values.device).index_add_(0, row, values)


def scale_of(row_scale: float | Tensor, row: Tensor) -> Tensor:
    """row_scale for each of n terms whose rows are `row` (n,): (n,) fp32 on the device of `row`."""
    if isinstance(row_scale, Tensor) and row_scale.dim() > 0:
        return row_scale.to(row.device, torch.float32).index_select(0, row)
    if isinstance(row_scale, Tensor):
        return row_scale.to(row.device, torch.float32).expand(row.shape[0])
    return torch.full((row.shape[0],), row_scale, dtype=torch.float32, device=row.device)
