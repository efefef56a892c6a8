"""Residual stage: from the direction N in the subspace back to a full-size update, and what happens to the rest of G.

An update is lazy: `add_to(weight, alpha)` adds alpha times it in place. So a low-rank update goes through one fused
multiply-add, and a rescaled gradient is never materialised: neither needs a temporary of the weight's size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .subspace import Basis


def _tensor_norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x).reshape(1, 1)


def _row_norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=1, keepdim=True)  # (m, 1)


def _column_norms(x: Tensor) -> Tensor:
    # vector_norm over dim 0 walks memory in strides (20x slower on CPU); squares in slices of rows need no full-size temporary
    return sum(part.square().sum(0, keepdim=True) for part in x.split(64)).sqrt()  # (1, n)


@dataclass
class LowRankUpdate:
    """left @ right, (m, k) and (k, n)."""

    left: Tensor
    right: Tensor

    def add_to(self, weight: Tensor, alpha: float) -> None:
        weight.addmm_(self.left, self.right, alpha=alpha)


@dataclass
class ScaledUpdate:
    """gradient * coefficient, with a coefficient that broadcasts: (m, 1), (1, n) or (1, 1)."""

    gradient: Tensor
    coefficient: Tensor

    def add_to(self, weight: Tensor, alpha: float) -> None:
        weight.addcmul_(self.gradient, self.coefficient, value=alpha)


class Dropped:
    """GaLore: the part of the gradient outside the subspace is lost; the update is scale * (N projected back)."""

    def __init__(self, scale: float):
        self.scale = scale

    def slots(self) -> dict:
        return {}

    def update(self, grad: Tensor, low: Tensor, direction: Tensor, basis: Basis, state: dict[str, Tensor],
               step: int) -> tuple[LowRankUpdate, float]:
        """The update and a number to multiply it with. `step` counts from 1."""
        left, right = basis
        if left is None:
            return LowRankUpdate(direction, right), self.scale
        return LowRankUpdate(left.T, direction if right is None else direction @ right), self.scale


class NormScaled:
    """APOLLO: the whole gradient, each channel (or the tensor) scaled as Adam scaled its projection, growth limited.

        s = ||N|| / (||R|| + 1e-8)  per row if dim 1 was compressed, per column if dim 0 was, or one for the tensor
        U = s G,   l = max(||U|| / ||U_previous||, gamma) / gamma,   update = sqrt(scale) U / l,   ||U_previous|| <- ||U|| / l

    The first step is not limited, nor is one after an all-zero gradient: the reference divides by a norm of 0 there and
    holds the tensor at updates of 1e-8, growing by one percent a step, for thousands of steps.
    """

    def __init__(self, scale: float, *, per_channel: bool, growth: float | None):
        self.scale, self.per_channel, self.growth = scale, per_channel, growth

    def slots(self) -> dict:
        return {} if self.growth is None else {"update_norm": ((), torch.float32)}

    def update(self, grad: Tensor, low: Tensor, direction: Tensor, basis: Basis, state: dict[str, Tensor],
               step: int) -> tuple[ScaledUpdate, float]:
        norm = _tensor_norm if not self.per_channel else _row_norms if basis[0] is None else _column_norms
        coefficient = norm(direction) / (norm(low) + 1e-8)
        if self.growth is not None:
            coefficient = coefficient / self._limit(grad, coefficient, norm, state, step)
        return ScaledUpdate(grad, coefficient), self.scale ** 0.5

    def _limit(self, grad: Tensor, coefficient: Tensor, norm, state: dict[str, Tensor], step: int) -> Tensor:
        size = torch.linalg.vector_norm(norm(grad) * coefficient)  # ||s G|| without forming s G
        previous = state["update_norm"]
        limit = torch.ones_like(size)
        if step > 1:
            limit = torch.where(previous > 0, (size / (previous + 1e-8)).clamp(min=self.growth) / self.growth, limit)
        previous.copy_(size / limit)
        return limit
