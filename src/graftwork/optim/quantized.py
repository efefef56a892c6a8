"""Q-GaLore's subspace stage: INT4 singular vectors, refreshed the more rarely the less they turn.

Codes. The r rows of the projection, read one after the other, in groups of g (graftwork.modeling.affine, 4 bits): scale and zero
point per group, two codes a byte. Projecting and projecting back use the decoded rows, which are orthonormal up to about 6 %.

Laziness. Each matrix has its own gap T, `update_proj_gap` at first; it refreshes when step % T == 0. A refresh measures how similar
the new subspace is to the one before, and if the mean of the last `queue` similarities reaches `threshold`, T <- int(growth T).

    overlap   (||P' P^T||_F^2 / ||P||_F^2 - r/a) / (1 - r/a),  P' (r, a) new rows, P decoded old ones:
              1 for the same subspace, 0 in the mean for an unrelated one, whatever r (at r = a: 1)
    cosine    |cos| of the first singular vector and that of the refresh before, kept in float32 (a numbers)

Measures are tensors and T is one on the host, so that only a refresh reads a value.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..modeling.affine import dequantize_affine, quantize_affine
from ..modeling.protocols import has_values
from .base import Clock, Slots
from .subspace import Basis, SVDSubspace, sides, top_vectors

Similarity = Literal["overlap", "cosine"]


class LazySubspace(SVDSubspace):
    """GaLore's `std` subspace with the two savings, each of which can be left out: group None (floating point rows), threshold
    None (one gap for all)."""

    def __init__(self, rank: int, gap: int, *, randomized: bool, group: int | None, similarity: Similarity, threshold: float | None,
                 growth: float, queue: int):
        super().__init__(rank, gap, randomized=randomized)
        self.group, self.similarity, self.threshold, self.growth, self.queue = group, similarity, threshold, growth, queue

    def slots(self, shape: tuple[int, ...], dtype: torch.dtype) -> Slots:
        slots = super().slots(shape, dtype)
        for name in [name for name in slots if name.startswith("projection") and self.group]:
            size = torch.Size(slots.pop(name)[0]).numel()
            groups = (-(-size // self.group),)
            slots.update({f"{name}_codes": ((-(-size // 2),), torch.uint8), f"{name}_scale": (groups, torch.float32),
                          f"{name}_zero": (groups, torch.float32)})
        if self.threshold is not None:
            slots.update({"refresh_gap": ((), torch.int64), "similarities": ((self.queue,), torch.float32)})
            if self.similarity == "cosine":
                slots["first_vector"] = ((min(shape),), torch.float32)
        return slots

    def due(self, clock: Clock, state: dict[str, Tensor]) -> bool:
        gap = state.get("refresh_gap")
        if clock.step == 0 or gap is None or not has_values(gap):
            return super().due(clock, state)
        return clock.step % int(gap) == 0

    def refresh(self, grad: Tensor, state: dict[str, Tensor], clock: Clock) -> None:
        self._move_seed(state, clock)
        u, vh = top_vectors(grad, self.rank_for(grad.shape), clock.seed if self.seeded else None)
        left = sides(tuple(grad.shape), self.proj_type)[0]
        name, rows = ("projection_left", u.T) if left else ("projection_right", vh)
        if self.threshold is not None:
            self._slow_down(rows, state, grad, clock)
        if not self.group:
            state[name].copy_(rows)
            return
        for part, value in zip(("codes", "scale", "zero"), quantize_affine(rows, 4, self.group)):
            state[f"{name}_{part}"].copy_(value)

    def basis(self, grad: Tensor, state: dict[str, Tensor], clock: Clock) -> Basis:
        if not self.group:
            return super().basis(grad, state, clock)
        left = "projection_left_codes" in state
        name, shape = ("projection_left" if left else "projection_right"), (self.rank_for(grad.shape), min(grad.shape))
        rows = dequantize_affine(*(state[f"{name}_{part}"] for part in ("codes", "scale", "zero")), shape[0] * shape[1], 4, self.group,
                                 grad.dtype).view(shape)
        return (rows, None) if left else (None, rows)

    def _slow_down(self, rows: Tensor, state: dict[str, Tensor], grad: Tensor, clock: Clock) -> None:
        gap, queue = state["refresh_gap"], state["similarities"]
        if clock.step == 0:
            gap.fill_(self.gap)
            queue.fill_(-torch.inf)  # a queue that is not full has no mean that reaches the threshold
        else:
            queue.copy_(torch.cat([queue[1:], self._similar(rows, state, grad, clock).reshape(1)]))
            slow = (queue.mean() >= self.threshold).to(gap.device)
            gap.copy_(torch.where(slow, (gap * self.growth).to(torch.int64), gap))
        if self.similarity == "cosine":
            state["first_vector"].copy_(rows[0])

    def _similar(self, rows: Tensor, state: dict[str, Tensor], grad: Tensor, clock: Clock) -> Tensor:
        if self.similarity == "cosine":
            return torch.cosine_similarity(rows[0].float(), state["first_vector"], dim=0).abs()
        old = next(q for q in self.basis(grad, state, clock) if q is not None)
        chance = rows.shape[0] / rows.shape[1]
        if chance == 1.0:
            return torch.ones_like(state["similarities"][0])
        share = (rows @ old.T).square().sum() / old.square().sum().clamp(min=1e-30)
        return ((share - chance) / (1.0 - chance)).float()
