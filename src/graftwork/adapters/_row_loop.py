"""Rows of different adapters, one adapter after the other: for changes that have no small factors to stack."""

from __future__ import annotations

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
        if len(bank.adapters) == 1 or not has_values(index):  # planned: all rows on one adapter have the same shapes
            return bank.adapters[0].change(x, base)
        change = x.new_zeros(*x.shape[:-1], bank.adapters[0].out_features)
        for number, adapter in enumerate(bank.adapters):
            chosen = torch.where(index == number)[0]
            if chosen.shape[0]:
                change = change.index_copy(0, chosen, adapter.change(x.index_select(0, chosen), base))
        return change
