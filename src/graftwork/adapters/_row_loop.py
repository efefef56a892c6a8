"""Rows of different adapters, one adapter after the other: for changes that have no small factors to stack."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..modeling.protocols import Base, has_values
from .base import Adapter


@dataclass
class LoopBank:
    """K adapters of one site, as they are."""

    adapters: tuple[Adapter, ...]
    dropout: Tensor | None
    key: str
    nbytes: int = 0  # nothing is stacked


def one_by_one(adapters: Sequence[Adapter], index: Tensor, x: Tensor, run: Callable[[Adapter, Tensor], Tensor]) -> Tensor:
    """run(adapter, its rows) put together: x (N, ..., in), row n of which is adapter index[n]'s -> (N, ..., out); 0 for rows of none."""
    if len(adapters) == 1 or not has_values(index):  # planned: all rows on one adapter have the same shapes
        return run(adapters[0], x)
    y = x.new_zeros(*x.shape[:-1], adapters[0].out_features)
    for number, adapter in enumerate(adapters):
        chosen = torch.where(index == number)[0]
        if chosen.shape[0]:
            y = y.index_copy(0, chosen, run(adapter, x.index_select(0, chosen)))
    return y


class RowLoop(Adapter):
    """Mixed into a method that offers `change(x, base)`, the change without dropout."""

    def change(self, x: Tensor, base: Base) -> Tensor:
        """x (..., in) -> (..., out)."""
        raise NotImplementedError

    def delta(self, x, base):
        return self.change(self.drop(x, base), base)

    @classmethod
    def stack(cls, adapters, dtype):
        return LoopBank(tuple(adapters), cls.bank_dropout(adapters), adapters[0].site_name)

    @classmethod
    def forward_rows(cls, bank, index, x, base):
        if bank.dropout is not None:
            x = base.noise.dropout(x, bank.dropout.to(x.device)[index].reshape(-1, *[1] * (x.dim() - 1)), bank.key)
        return one_by_one(bank.adapters, index, x, lambda adapter, rows: adapter.change(rows, base))
