"""Dense storage: the weight as it is, in the compute dtype. y = W x, W (out, in).

A plain nn.Linear (or Conv1D) already is this format, so `apply_storage` leaves such modules alone; the class exists
for code that builds storages one by one and for the conformance suite.
"""

from __future__ import annotations

from torch import nn

from ..modeling.arithmetic import linear
from ..registry import register
from .base import Storage, StorageConfig, check_weight


class Dense(StorageConfig):
    """No options of its own."""


@register("storage", "dense", config=Dense, title="Dense weights", aliases=("none",), lossless=True,
          summary="the weight as loaded, in the compute dtype; 16 bits in bf16")
class DenseStorage(Storage):
    def __init__(self, weight, bias, compute_dtype):
        super().__init__(*weight.shape, bias, compute_dtype)
        self.dense_weight = nn.Parameter(weight, requires_grad=False)

    @classmethod
    def from_weight(cls, weight, config, *, bias=None, dtype=None, statistics=None, generator=None):
        check_weight(weight, "dense storage")
        dtype = dtype or weight.dtype
        return cls(weight.detach().to(dtype), bias, dtype)

    def dequantize(self, leaves=None):
        return self.dense_weight if leaves is None else leaves["weight"]

    def product(self, x, leaves=None):
        return linear(x, self.dequantize(leaves))

    def leaves(self):
        return {"weight": self.dense_weight}
