"""Loss over a data set: the objective's own sums, one batch at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..modeling.state import state_of


@torch.no_grad()
def evaluate_loss(model: nn.Module, objective: Any, data: Any, *, batch_size: int = 8,
                  route: str | None = None) -> dict[str, float]:
    """The objective's means over a TokenDataset (loss, n and more). route: answer every row by this graft; None: whatever is attached
    acts on all rows. The mode stays."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    collate, sums = data.collator(), {}
    try:
        for start in range(0, len(data), batch_size):
            batch = collate([data[i] for i in range(start, min(start + batch_size, len(data)))])
            batch.pop("rows", None)
            rows = (route,) * batch["input_ids"].shape[0] if route is not None else None
            batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            with state_of(model).scope(rows=rows, labels=batch.get("labels")):
                for key, value in objective.evaluate(model, batch).items():
                    sums[key] = sums.get(key, 0.0) + float(value)
    finally:
        model.train(was_training)
    return objective.means(sums)
