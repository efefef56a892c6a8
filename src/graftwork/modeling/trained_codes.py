"""A weight that trains without being there: between steps it is codes, and the parameter is a stand-in of its shape.

The stand-in is a Parameter (out, in) of the compute dtype on one element of memory, NaN, so that code which reads it unaware is
noticed. It names the weight, carries `requires_grad` and receives the dense gradient; its owner (a storage) multiplies by the codes.
An optimizer reads the values, moves them and writes them back, one tensor at a time (graftwork.optim.rounding).
"""

from __future__ import annotations

import math
import weakref
from typing import Protocol

import torch
from torch import Tensor, nn


class CodedWeight(Protocol):
    """Who owns the codes behind a stand-in."""

    def read(self) -> Tensor:
        """The weight's values, float32, a new tensor of the stand-in's shape."""

    def write(self, values: Tensor, generator: torch.Generator | None = None) -> None:
        """Code these values instead; rounded stochastically with a generator."""

    def parts(self) -> dict[str, Tensor]:
        """The tensors the weight is made of, by their names beside it."""


def blank(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The memory of a stand-in."""
    return torch.full((1,), math.nan, dtype=dtype, device=device).expand(shape)


def stand_in(owner: CodedWeight, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    parameter = nn.Parameter(blank(shape, dtype, device))
    parameter.graft_codes = weakref.ref(owner)  # the owner holds the parameter
    return parameter


def codes_of(parameter: Tensor | None) -> CodedWeight | None:
    """The owner of the codes behind a parameter; None for one that holds its values."""
    reference = getattr(parameter, "__dict__", {}).get("graft_codes")
    return None if reference is None else reference()
