"""Starts that take a low-rank piece s B0 A0 out of W and leave the stored base as it is.

The adapter subtracts its frozen start, y = W x + s B A x - s B0 A0 x. So y is unchanged at step 0 up to rounding, on dense and on
quantized storage alike: nothing is quantized again, no file of pristine weights is needed, and other grafts still see the same
base. It costs one more rank-r product and a frozen copy of the start. Export as LoRA: rank 2r, [s B | -s B0], [A ; A0].
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .base import Initializer


class SubtractedStart(Initializer):
    """Base of these initializers. A subclass says how many ranks of a matrix its start takes, and calls `place`."""

    ranks_taken: ClassVar[int] = 1  # times r; at most min(in, out) in all

    def check(self, adapter, config, sites):
        super().check(adapter, config, sites)
        if not getattr(config, "rank_pattern", {}):  # else each site is checked when it is built
            for site in sites:
                self.check_rank(site.name, config.r, site)

    def check_rank(self, name: str, r: int, shape) -> None:
        """Raises UsageError when a matrix has too few ranks for the start. shape: anything with in_features and out_features."""
        most = min(shape.in_features, shape.out_features) // self.ranks_taken
        if r > most:
            raise UsageError(f"initializer '{self.method}' takes {self.ranks_taken * r} ranks for r = {r}, and '{name}' is "
                             f"{shape.out_features} x {shape.in_features}", remedy=f"adapter.r: {most}, or exclude this module")

    @staticmethod
    @torch.no_grad()
    def place(adapter: nn.Module, B: Tensor, A: Tensor) -> None:
        """Start a LoRA at s B A, B (out, r), A (r, in), and subtract it."""
        adapter.lora_B.copy_(B)
        adapter.lora_A.copy_(A)
        # taken from the parameters as they are, so that s B A - B0 A0 vanishes to rounding at the start
        adapter.set_pair(adapter.lora_B.detach() * adapter.scale, adapter.lora_A.detach().clone(), in_storage=False)

    def plan_extra(self, graft):
        for name, adapter in graft.adapters.items():
            self.check_rank(name, adapter.r, adapter)
            adapter.set_pair(torch.empty_like(adapter.lora_B), torch.empty_like(adapter.lora_A), in_storage=False)
