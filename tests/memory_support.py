"""What a step allocates, by the ledger: the peak of a call on top of a model, its batch and the state of its estimator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from graftwork.objectives.causal_lm import CausalLMObjective
from graftwork.planning.ledger import Ledger


def peak_of(action: Callable[[], Any], model: torch.nn.Module, batch: dict[str, Any], state: dict[str, Any] | None = None) -> int:
    """Peak bytes while `action` runs. state: of the estimator, there before the call."""
    with Ledger() as ledger:
        ledger.track(model, "weights")
        if state:
            ledger.track(state, "optimizer_state")
        ledger.track({k: v for k, v in batch.items() if isinstance(v, torch.Tensor)}, "other")
        action()
    return ledger.peak_bytes


def forward_peak(model: torch.nn.Module, batch: dict[str, Any], state: dict[str, Any] | None = None) -> int:
    """Peak bytes of one loss without a graph."""
    def forward() -> None:
        with torch.no_grad():
            CausalLMObjective().loss(model, batch, 1.0)

    return peak_of(forward, model, batch, state)
