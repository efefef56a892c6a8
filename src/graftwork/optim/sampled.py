"""Subspace stages drawn from a seed, without a look at the gradient: columns, and random orthonormal directions.

(APOLLO's Gaussian view is `subspace.RandomSubspace`.) Both move on to the next seed at each refresh, and draw on the CPU
whatever the device, so that a seed means the same everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Clock, Slots
from .subspace import Basis, Subspace, next_seed


class _Seeded(Subspace):
    seeded = True

    def refresh(self, grad: Tensor, state: dict[str, Tensor], clock: Clock) -> None:
        if clock.step > 0:
            clock.seed = next_seed(clock.seed)
            state["seed"].fill_(clock.seed)


class ColumnSubspace(_Seeded):
    """floor(rank * n) columns out of n, `rank` being a share. Only the seed is kept; the numbers are drawn at each step."""

    def low_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        return shape[0], int(self.rank * shape[1])

    def slots(self, shape: tuple[int, ...], dtype: torch.dtype) -> Slots:
        return {"seed": ((), torch.int64)}

    def basis(self, grad: Tensor, state: dict[str, Tensor], clock: Clock) -> Basis:
        order = torch.randperm(grad.shape[1], generator=torch.Generator().manual_seed(clock.seed))
        return None, order[:self.low_shape(grad.shape)[1]].to(grad.device)


class OrthogonalSubspace(_Seeded):
    """Orthonormal directions, uniform over all subspaces of the smaller side. Kept in the state: drawing them takes a QR."""

    def slots(self, shape: tuple[int, ...], dtype: torch.dtype) -> Slots:
        return {"seed": ((), torch.int64), **self._basis_slots(shape, dtype)}

    def refresh(self, grad: Tensor, state: dict[str, Tensor], clock: Clock) -> None:
        super().refresh(grad, state, clock)
        name, size = ("projection_right", grad.shape[1]) if "projection_right" in state else ("projection_left", grad.shape[0])
        generator = torch.Generator().manual_seed(clock.seed)
        drawn = torch.randn((size, self.rank_for(grad.shape)), generator=generator)
        state[name].copy_(torch.linalg.qr(drawn.to(device=grad.device, dtype=grad.dtype))[0].T)
