"""Adapters that take the place of the frozen weight: W' x is all that the site computes, and W x is never multiplied.

The base keeps its W (other grafts, `disabled` and `detach` find it as it was), so such a method saves gradients, optimizer state and
products, and not the bytes of W while it trains.
"""

from __future__ import annotations

from torch import Tensor

from ._row_loop import LoopBank, one_by_one
from .base import Adapter


class Replaced(Adapter):
    """A subclass offers `product` and `weight`. The bias is the base's."""

    multiplicative = True

    def product(self, x: Tensor) -> Tensor:
        """W' x without bias, (..., in) -> (..., out) in x's dtype."""
        raise NotImplementedError

    def weight(self) -> Tensor:
        """W' (out, in), fp32."""
        raise NotImplementedError

    def delta_weight(self, base):
        return self.weight() - base.weight().float()

    def forward(self, x, base):
        y = self.product(x)
        return y if base.bias is None else y + base.bias.to(y.dtype)

    def delta(self, x, base):
        return self.forward(x, base) - base(x)

    # -- many rows ---------------------------------------------------------------------------------------------------
    @classmethod
    def stack(cls, adapters, dtype):
        return LoopBank(tuple(adapters), None, adapters[0].site_name)

    @classmethod
    def rows_inputs(cls, bank, index, x):
        return x[:0]  # nothing is wanted of the frozen product

    @classmethod
    def rows_combine(cls, bank, index, z, x, base):
        return one_by_one(bank.adapters, index, x, lambda adapter, rows: adapter.product(rows))

    @classmethod
    def forward_rows(cls, bank, index, x, base):
        y = cls.rows_combine(bank, index, None, x, base)
        return (y if base.bias is None else y + base.bias.to(y.dtype)) - base(x)
