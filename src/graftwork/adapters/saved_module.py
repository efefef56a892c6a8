"""A whole linear module that a graft trains and keeps beside its adapters (PEFT's `modules_to_save`).

y = W' x + b', W' (out, in) a copy of the module's own weight at the start. Not a method of its own: it rides on one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .base import Adapter, as_rows


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
        bias = None if adapters[0].bias is None else torch.stack([a.bias for a in adapters]).to(dtype)
        return torch.stack([a.weight for a in adapters]).to(dtype), bias

    @classmethod
    def forward_rows(cls, bank, index, x, base):
        weight, bias = bank
        shape = x.shape
        y = torch.bmm(as_rows(x), weight[index].transpose(1, 2))
        y = y if bias is None else y + bias[index].unsqueeze(1)
        return y.reshape(*shape[:-1], y.shape[-1]) - base(x)
