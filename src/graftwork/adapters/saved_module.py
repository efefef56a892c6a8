"""A whole linear module that a graft trains and keeps beside its adapters (PEFT's `modules_to_save`).

y = W' x + b', W' (out, in) a copy of the module's own weight at the start. Not a method of its own: it rides on one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .base import Adapter


class SavedModule(Adapter):
    """Trained copy of a linear map."""

    method = "saved_module"

    def __init__(self, site, config, *, shared, generator):
        super().__init__(site, config, shared=shared, generator=generator)
        self.weight: nn.Parameter
        self.register_parameter("bias", None)

    def take(self, product) -> None:
        """Start from the module's own values, in fp32."""
        self.weight = nn.Parameter(product.dense().detach().float().clone())
        if product.bias is not None:
            self.bias = nn.Parameter(product.bias.detach().float().clone())

    def forward(self, x, base):
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def delta(self, x, base):
        return self.forward(x, base) - base(x)

    def delta_weight(self, base):
        return self.weight.float() - base.weight().float()

    @classmethod
    def stack(cls, adapters, dtype):
        return [(a.weight.to(dtype), None if a.bias is None else a.bias.to(dtype)) for a in adapters]

    @classmethod
    def forward_rows(cls, bank, index, x, base):
        """One product of all rows per module: a copy of the module for each row, as low-rank factors have it, would be too large."""
        y, place = None, index.view(-1, *[1] * (x.dim() - 1))
        for k, (weight, bias) in enumerate(bank):
            own = F.linear(x, weight, bias)
            y = own if y is None else torch.where(place == k, own, y)
        return y - base(x)
