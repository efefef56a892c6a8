"""Subspace stage: which r-dimensional view of an (m, n) gradient the rule sees, and when that view changes.

A basis is a pair (L, Q) of matrices with r rows, L: (r, m), Q: (r, n); one of them may be None.

    side right: R = G Q^T (m, r), back N Q      side left: R = L G (r, n), back L^T N      side full: R = L G Q^T (r, r)

Q may also be a vector of column numbers (int64): R = those columns of G, exactly.

`std` compresses the smaller of the two dimensions (right if m >= n), `reverse_std` the larger. The refresh clock fires when
`step % gap == 0` with the step before its increment, hence at the first gradient; the gradient of that step is already
projected with the new basis.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .base import Clock, Slots

Basis = tuple[Tensor | None, Tensor | None]
ProjType = Literal["std", "reverse_std", "left", "right", "full"]
_OVERSAMPLE, _POWER_ITERATIONS = 8, 2  # of the randomized SVD (Halko, Martinsson, Tropp 2011, algorithm 4.4)


def next_seed(seed: int) -> int:
    """The seed after `seed`: APOLLO's sequence, the 15th of 15 integers drawn below 2^63 - 1."""
    generator = torch.Generator().manual_seed(seed)
    with _disable_current_modes():  # real numbers even while a simulation runs on fake tensors: a seed must be a number
        return torch.randint(0, torch.iinfo(torch.int64).max, (15,), generator=generator).tolist()[-1]


def project(grad: Tensor, basis: Basis) -> Tensor:
    """R of the gradient (m, n)."""
    left, right = basis
    if right is not None and right.dtype == torch.int64:
        return grad.index_select(1, right)
    low = grad if left is None else left @ grad
    return low if right is None else low @ right.T


def back_factors(low: Tensor, basis: Basis) -> tuple[Tensor, Tensor]:
    """Two matrices (m, k) and (k, n) whose product is `low` projected back."""
    left, right = basis
    if left is None:
        return low, right
    return left.T, low if right is None else low @ right


def remainder(grad: Tensor, low: Tensor, basis: Basis, scale: float = 1.0) -> Tensor:
    """G - scale * (R projected back), a new tensor (m, n): what the rule does not see."""
    right = basis[1]
    if right is not None and right.dtype == torch.int64:
        return grad.index_add(1, right, low, alpha=-scale)
    return torch.addmm(grad, *back_factors(low, basis), alpha=-scale)


def sides(shape: tuple[int, ...], proj_type: ProjType) -> tuple[bool, bool]:
    """(compress dim 0?, compress dim 1?)"""
    tall = shape[0] >= shape[1]
    return {"std": (not tall, tall), "reverse_std": (tall, not tall), "left": (True, False), "right": (False, True),
            "full": (True, True)}[proj_type]


class Subspace:
    """Base: geometry and clock. `rank` is a number, cut to min(m, n), above which the view holds nothing new; or a share of it."""

    seeded = False

    def __init__(self, rank: int | float, gap: int, proj_type: ProjType = "std"):
        self.rank, self.gap, self.proj_type = rank, gap, proj_type

    def accepts(self, shape: tuple[int, ...], role: str) -> bool:
        """Only 2-D weights of linear maps with both dimensions above 1 are projected; the others get the plain rule."""
        return role == "linear" and len(shape) == 2 and min(shape) > 1

    def rank_for(self, shape: tuple[int, ...]) -> int:
        return min(self.rank, *shape) if isinstance(self.rank, int) else round(self.rank * min(shape))

    def low_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        r = self.rank_for(shape)
        left, right = sides(shape, self.proj_type)
        return (r if left else shape[0], r if right else shape[1])

    def due(self, clock: Clock, state: dict[str, Tensor]) -> bool:
        return clock.step % self.gap == 0

    def basis(self, grad: Tensor, state: dict[str, Tensor], clock: Clock) -> Basis:
        """The current basis, in the dtype of the gradient; here the one kept in the state."""
        kept = (state.get("projection_left"), state.get("projection_right"))
        return tuple(None if q is None else q.to(grad.dtype) for q in kept)

    def _basis_slots(self, shape: tuple[int, ...], dtype: torch.dtype) -> Slots:
        r = self.rank_for(shape)
        names = ("projection_left", "projection_right")
        return {name: ((r, size), dtype) for name, size, on in zip(names, shape, sides(shape, self.proj_type)) if on}


class SVDSubspace(Subspace):
    """GaLore's: the top singular vectors of the gradient at the refresh. Kept in the state.

    `randomized` finds them from a seeded sketch of min(m, n, r + 8) directions with two power iterations, in O(m n r) instead
    of O(m n min(m, n)); the sketch's seed moves on at each refresh. Error of the rank-r view, in the spectral norm: s_(r+1) of
    the exact one, plus, on average over seeds (Halko, Martinsson, Tropp 2011, corollary 10.10; p = 8, q = 2),

        [ (1 + sqrt(r / (p - 1))) s_(r+1)^(2q+1) + e sqrt(r + p) / p * sqrt(sum of s_j^(4q+2), j > r) ] ^ (1 / (2q + 1))
    """

    def __init__(self, rank: int | float, gap: int, proj_type: ProjType = "std", *, randomized: bool = False):
        super().__init__(rank, gap, proj_type)
        self.seeded = randomized

    def slots(self, shape: tuple[int, ...], dtype: torch.dtype) -> Slots:
        seed = {"seed": ((), torch.int64)} if self.seeded else {}
        return {**seed, **self._basis_slots(shape, dtype)}

    def _move_seed(self, state: dict[str, Tensor], clock: Clock) -> None:
        if self.seeded and clock.step > 0:
            clock.seed = next_seed(clock.seed)
            state["seed"].fill_(clock.seed)

    def refresh(self, grad: Tensor, state: dict[str, Tensor], clock: Clock) -> None:
        self._move_seed(state, clock)
        u, vh = top_vectors(grad, self.rank_for(grad.shape), clock.seed if self.seeded else None)
        # Copied into their own storage: a slice would keep all min(m, n) vectors alive.
        if "projection_left" in state:
            state["projection_left"].copy_(u.T)
        if "projection_right" in state:
            state["projection_right"].copy_(vh)


class RandomSubspace(Subspace):
    """APOLLO's: entries N(0, 1/r) from a generator seeded with the state's seed, redrawn from the next seed at each refresh.

    Only the seed is kept and the matrix is drawn again at every step, unless `cached`. Drawn by a CPU generator whatever the
    device, so that a seed means the same numbers everywhere.
    """

    seeded = True

    def __init__(self, rank: int, gap: int, *, cached: bool = False):
        super().__init__(rank, gap)
        self.cached = cached

    def slots(self, shape: tuple[int, ...], dtype: torch.dtype) -> Slots:
        return {"seed": ((), torch.int64), **(self._basis_slots(shape, dtype) if self.cached else {})}

    def refresh(self, grad: Tensor, state: dict[str, Tensor], clock: Clock) -> None:
        if clock.step > 0:
            clock.seed = next_seed(clock.seed)
            state["seed"].fill_(clock.seed)
        if self.cached:
            for name, matrix in zip(("projection_left", "projection_right"), self._draw(grad, clock)):
                if matrix is not None:
                    state[name].copy_(matrix)

    def basis(self, grad: Tensor, state: dict[str, Tensor], clock: Clock) -> Basis:
        return super().basis(grad, state, clock) if self.cached else self._draw(grad, clock)

    def _draw(self, grad: Tensor, clock: Clock) -> Basis:
        m, n = grad.shape
        r, (left, _) = self.rank_for((m, n)), sides((m, n), self.proj_type)
        generator = torch.Generator().manual_seed(clock.seed)
        # Drawn in float32 for every dtype, in the layout (m, r) on the left and (r, n) on the right.
        drawn = torch.randn((m, r) if left else (r, n), generator=generator)
        drawn = drawn.div_(math.sqrt(r)).to(device=grad.device, dtype=grad.dtype)
        return (drawn.T, None) if left else (None, drawn)


def top_vectors(grad: Tensor, rank: int, seed: int | None) -> tuple[Tensor, Tensor]:
    """Top left vectors (m, r) and right vectors (r, n) of a gradient; exactly, or from a sketch if a seed is given."""
    m, n = grad.shape
    width = min(m, n, rank + _OVERSAMPLE)
    if seed is None or width == min(m, n):
        u, _, vh = torch.linalg.svd(grad, full_matrices=False)
        return u[:, :rank], vh[:rank]
    sketch = torch.randn((n, width), generator=torch.Generator().manual_seed(seed)).to(device=grad.device, dtype=grad.dtype)
    q = torch.linalg.qr(grad @ sketch)[0]                       # (m, width)
    for _ in range(_POWER_ITERATIONS):
        q = torch.linalg.qr(grad.T @ q)[0]                      # (n, width)
        q = torch.linalg.qr(grad @ q)[0]                        # (m, width)
    u, _, vh = torch.linalg.svd(q.T @ grad, full_matrices=False)  # (width, width), (width, n)
    return q @ u[:, :rank], vh[:rank]
