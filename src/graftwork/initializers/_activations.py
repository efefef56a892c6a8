"""Passes over a model's inputs: what an initializer that needs activations reads, module by module, of some batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .base import Initializer

INPUTS = ("input_ids", "attention_mask", "position_ids", "token_type_ids", "use_cache")


def token_mask(batch: Mapping[str, Any], label_mask: bool = False) -> Tensor | None:
    """Which tokens (N, T) count: the trained ones, where label_mask asks for them and the batch has labels, else all that are no
    padding; None: every one."""
    return batch["labels"] != -100 if label_mask and "labels" in batch else batch.get("attention_mask")


def counted_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """Rows (n, features) of an input (..., features) whose tokens count. An input of other tokens than the mask's counts whole."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if mask is None or mask.numel() != rows.shape[0] else rows[mask.reshape(-1).bool()]


class ActivationPass(Initializer):
    """An initializer that reads what modules are given."""

    needs = "activations"

    def statistics(self, model: nn.Module, sites: Sequence[Any], config: Any, batches: Iterable[dict[str, Tensor]] | None) -> Any:
        """Refuses what such a pass cannot see. Raises UsageError without data, and for fused experts."""
        super().statistics(model, sites, config, batches)
        if any(s.expert is not None for s in sites):
            raise UsageError(f"{self.method} reads the inputs of modules; fused experts have none of their own",
                             remedy="exclude the experts: adapter.target_modules: attention")

    @contextmanager
    def evaluating(self, model: nn.Module) -> Iterator[None]:
        """Without gradients and dropout."""
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            model.train(was_training)

    @staticmethod
    def look(model: nn.Module, readers: Mapping[str, Callable[[Tensor], None]], batch: Mapping[str, Any]) -> None:
        """One forward; readers[name] is called with each input of that module. The head is left out where nobody reads it."""
        trunk = f"{model.base_model_prefix}."
        runs = model.base_model if all(name.startswith(trunk) for name in readers) else model
        handles = [model.get_submodule(name).register_forward_pre_hook(lambda module, args, read=read: read(args[0]))
                   for name, read in readers.items()]
        try:
            runs(**{k: v for k, v in batch.items() if k in INPUTS})
        finally:
            for handle in handles:
                handle.remove()
