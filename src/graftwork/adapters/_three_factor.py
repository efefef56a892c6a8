"""A change of three factors, any of which may be frozen:

    y = W x + b + s B M A dropout(x)        A (r, in), M (r, r), B (out, r)

With a frozen A the adapter keeps A x (T, r) for the backward pass and not x (T, in).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..modeling.arithmetic import linear
from ._weights import FromWeight


def frozen(*shape: int) -> nn.Parameter:
    """A parameter of zeros that never trains."""
    return nn.Parameter(torch.zeros(*shape), requires_grad=False)


def kaiming(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """(rows, columns) of Kaiming-uniform values with a = sqrt 5, as nn.Linear starts."""
    bound = 1.0 / math.sqrt(columns)
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)


class ThreeFactor(FromWeight):
    """Subclasses make the parameters A, M, B and set r and scale."""

    A: nn.Parameter
    M: nn.Parameter
    B: nn.Parameter
    scale: float

    def middle(self) -> Tensor:
        """M with the scale folded in."""
        return self.M if self.scale == 1.0 else self.M * self.scale

    def factors(self, base=None):
        return self.B @ self.middle(), self.A

    def delta(self, x, base):
        hidden = linear(linear(self.drop(x, base), self.A.to(x.dtype)), self.middle().to(x.dtype))
        return linear(hidden, self.B.to(x.dtype))
