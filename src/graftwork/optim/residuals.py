"""Residual stage: from the direction N in the subspace back to a full-size update, and what happens to the rest of G.

An update is lazy: `add_to(weight, alpha)` adds alpha times it in place. So a low-rank update goes through one fused
multiply-add, and a rescaled gradient is never materialised: neither needs a temporary of the weight's size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .subspace import Basis, back_factors, remainder


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


@dataclass
class ColumnUpdate:
    """values (m, k) in the columns `index` (k,), zero elsewhere."""

    index: Tensor
    values: Tensor

    def add_to(self, weight: Tensor, alpha: float) -> None:
        weight.index_add_(1, self.index, self.values, alpha=alpha)


@dataclass
class FullUpdate:
    """A tensor of the weight's size."""

    tensor: Tensor

    def add_to(self, weight: Tensor, alpha: float) -> None:
        weight.add_(self.tensor, alpha=alpha)


@dataclass
class SumUpdate:
    """The sum of updates, each times its number."""

    parts: tuple[tuple[Update, float], ...]

    def add_to(self, weight: Tensor, alpha: float) -> None:
        for part, factor in self.parts:
            part.add_to(weight, alpha * factor)


Update = LowRankUpdate | ScaledUpdate | ColumnUpdate | FullUpdate | SumUpdate


def projected_back(direction: Tensor, basis: Basis) -> LowRankUpdate | ColumnUpdate:
    if basis[1] is not None and basis[1].dtype == torch.int64:
        return ColumnUpdate(basis[1], direction)
    return LowRankUpdate(*back_factors(direction, basis))


class Dropped:
    """GaLore: the part of the gradient outside the subspace is lost; the update is scale * (N projected back)."""

    def __init__(self, scale: float):
        self.scale = scale

    def slots(self) -> dict:
        return {}

    def update(self, grad: Tensor, low: Tensor, direction: Tensor, basis: Basis, state: dict[str, Tensor],
               step: int) -> tuple[Update, float]:
        """The update and a number to multiply it with. `step` counts from 1."""
        return projected_back(direction, basis), self.scale


class GrowthLimit:
    """Limiter stage (Fira's, also APOLLO's): the norm of an update grows at most by the factor `growth` a step.

        l = max(||U|| / ||U_previous||, growth) / growth,   update = U / l,   ||U_previous|| <- ||U|| / l

    The first step is not limited, nor is one after an all-zero gradient: the references divide by a norm of 0 there and
    hold the tensor at updates of 1e-8, growing by one percent a step, for thousands of steps. `growth` None: no limit.
    """

    def __init__(self, growth: float | None):
        self.growth = growth

    def slots(self) -> dict:
        return {} if self.growth is None else {"update_norm": ((), torch.float32)}

    def apply(self, tensor: Tensor, coefficient: Tensor, norm, state: dict[str, Tensor], step: int) -> Tensor:
        """`coefficient` divided by l, where U = tensor * coefficient is not formed; `norm` gives norms of the coefficient's shape."""
        if self.growth is None:
            return coefficient
        size = torch.linalg.vector_norm(norm(tensor) * coefficient)
        previous = state["update_norm"]
        limit = torch.ones_like(size)
        if step > 1:
            limit = torch.where(previous > 0, (size / (previous + 1e-8)).clamp(min=self.growth) / self.growth, limit)
        previous.copy_(size / limit)
        return coefficient / limit


class _Rescaled:
    """What APOLLO and Fira share: s = ||N|| / (||R|| + 1e-8), and a limit on the growth of what s scales.

    One s per row if dim 1 was compressed, per column if dim 0 was; or one for the tensor.
    """

    def __init__(self, scale: float, *, per_channel: bool, growth: float | None):
        self.scale, self.per_channel, self.limit = scale, per_channel, GrowthLimit(growth)

    def slots(self) -> dict:
        return self.limit.slots()

    def rescaled(self, tensor: Tensor, low: Tensor, direction: Tensor, basis: Basis, state: dict[str, Tensor],
                 step: int) -> ScaledUpdate:
        norm = _tensor_norm if not self.per_channel else _row_norms if basis[0] is None else _column_norms
        coefficient = norm(direction) / (norm(low) + 1e-8)
        return ScaledUpdate(tensor, self.limit.apply(tensor, coefficient, norm, state, step))


class NormScaled(_Rescaled):
    """APOLLO: the whole gradient, each channel (or the tensor) scaled as Adam scaled its projection: sqrt(scale) s G, limited."""

    def update(self, grad: Tensor, low: Tensor, direction: Tensor, basis: Basis, state: dict[str, Tensor],
               step: int) -> tuple[ScaledUpdate, float]:
        return self.rescaled(grad, low, direction, basis, state, step), self.scale ** 0.5


class ScaledRemainder(_Rescaled):
    """Fira: scale * (N projected back) + s (G - R projected back), the second term limited.

    `exact` False subtracts only scale * (R projected back), as the reference package does.
    """

    def __init__(self, scale: float, *, per_channel: bool = True, growth: float | None = 1.01, exact: bool = True):
        super().__init__(scale, per_channel=per_channel, growth=growth)
        self.exact = exact

    def update(self, grad: Tensor, low: Tensor, direction: Tensor, basis: Basis, state: dict[str, Tensor],
               step: int) -> tuple[SumUpdate, float]:
        rest = remainder(grad, low, basis, 1.0 if self.exact else self.scale)
        scaled = self.rescaled(rest, low, direction, basis, state, step)
        return SumUpdate(((projected_back(direction, basis), self.scale), (scaled, 1.0))), 1.0
