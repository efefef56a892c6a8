"""Which rows of a batch belong to which adapters of a site, and what is kept of that from step to step.

A site asks at every forward; a server's step asks at some hundred sites. So a group is made once for the rows that are named and
kept while they stay the same, and what a packed step makes of the rows of its tokens is kept on the tensor of these rows, which all
sites of the step see.

Bringing adapters together into a bank pays when the same rows come again. Rows that are new are answered from the adapters' own
tensors, one after the other (`add_directly`): in traffic of many adapters hardly two steps have the same rows, and a bank a step
would copy every adapter. Where the kernel for these rows goes adapter by adapter anyway, there never is a bank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ..modeling.arithmetic import product_dtype
from .base import Adapter
from .batched import KEPT, choose, row_index

#: forwards with the same rows after which a bank is made: about as many as lose what making it costs (32 adapters of rank 8 on q and
#: v of 30 layers: 0.25 s against 15 ms a step)
SETTLED = 16
_WRITES = attrgetter("_version")


@dataclass
class Group:
    """Adapters of one class (and one slice of outputs, `out_rows`) at one site, and the named rows that they answer.

    keys, adapters, grafts: one an adapter. position (rows,): of each named row among them, -1 for rows of others. selected: the rows
    that are in it (None: all); local: their positions. shares (rows,): the adapter's part in a row's sum (None: all 1).
    uses: forwards so far."""

    cls: type[Adapter]
    out_rows: slice | None
    keys: tuple[str, ...]
    adapters: list[Adapter]
    grafts: list[Any]
    position: Tensor
    selected: Tensor | None
    local: Tensor
    shares: Tensor | None
    uses: int = 0

    def __post_init__(self) -> None:
        self._loops: dict[int, bool] = {}
        simple = all(not a._modules and type(a).borrowed is Adapter.borrowed for a in self.adapters)
        self._own = [a._parameters for a in self.adapters] if simple else None

    @property
    def weights(self) -> list[float] | None:
        """Of the grafts in a sum; None where all are 1."""
        weights = [graft.weight for graft in self.grafts]
        return None if weights.count(1.0) == len(weights) else weights

    def version(self) -> tuple:
        """Changes whenever a tensor that an adapter reads is replaced or written. Runs at every site of every decode step."""
        if self._own is not None:
            tensors = [p for own in self._own for p in own.values() if p is not None]
        else:
            tensors = [p for a in self.adapters for p in (*a.parameters(), *a.borrowed())]
        return tuple(map(id, tensors)), tuple(map(_WRITES, tensors))

    def placed(self, index: Tensor | None, count: int, state) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """(selected, local, shares) of `count` entries of x whose named rows `index` gives (None: they are the named rows)."""
        if index is None:
            return self.selected, self.local, self._chosen(self.shares, self.selected)
        made, key = index.__dict__.setdefault("made", {}), (Group, self.position.numbers, getattr(self.shares, "numbers", None))
        if key not in made:
            made[key] = self._place(index, count, state)
        return made[key]

    def _place(self, index: Tensor, count: int, state) -> tuple[Tensor | None, Tensor, Tensor | None]:
        shares = None if self.shares is None else self.shares.index_select(0, index)
        known = getattr(index, "numbers", None)
        if known is not None:
            numbers = [self.position.numbers[row] for row in known]
            chosen = [i for i, number in enumerate(numbers) if number >= 0]
            selected = None if len(chosen) == len(numbers) else torch.tensor(chosen, dtype=torch.int64, device=index.device)
            return selected, row_index([numbers[i] for i in chosen], index.device), self._chosen(shares, selected)
        local, selected = self.position.index_select(0, index), None
        if self.selected is not None:
            selected = torch.where(local >= 0)[0]
            local = local.index_select(0, selected)
        elif state.token_rows is None:  # every row as often as any other, see `StateHolder.row_index`: known without asking the device
            local.numbers = tuple(n for n in self.position.numbers for _ in range(count // len(state.rows)))
        return selected, local, self._chosen(shares, selected)

    @staticmethod
    def _chosen(shares: Tensor | None, selected: Tensor | None) -> Tensor | None:
        return shares if shares is None or selected is None else shares.index_select(0, selected)

    # -- without a bank ---------------------------------------------------------------------------------------------------
    def runs(self, index: Tensor | None) -> list[tuple[slice, int]] | None:
        """[(neighboring entries of x, their adapter)]; None where nobody knows without asking the device."""
        known, place = getattr(index, "numbers", None), self.position.numbers
        if index is None:
            known = range(len(place))
        if known is None:
            return None
        made = (self.position if index is None else index).__dict__.setdefault("made", {})
        if ("runs", place) not in made:
            found, start = [], 0
            for number, run in groupby(place[row] for row in known):
                stop = start + sum(1 for _ in run)
                if number >= 0:
                    found.append((slice(start, stop), number))
                start = stop
            if len(made) >= KEPT:
                made.clear()
            made["runs", place] = found
        return made["runs", place]

    def pairs(self, x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor, float]] | None:
        """(B, A, scale) of each adapter, its own tensors; None where they are not all there in the dtype of the product."""
        if self.shares is not None or x.dim() != 2 or product_dtype(x.dtype, x.device) != x.dtype:
            return None
        found = [adapter.own_factors() for adapter in self.adapters]
        return found if all(pair is not None and pair[0].dtype == pair[1].dtype == x.dtype == y.dtype for pair in found) else None

    def waits(self, runs: Sequence[tuple[slice, int]], pairs: Sequence[tuple[Tensor, Tensor, float]]) -> bool:
        """Whether to go without a bank: its rows are new, or a bank would be read adapter by adapter too."""
        if self.uses <= SETTLED:
            return True
        rows = sum(part.stop - part.start for part, _ in runs)
        if rows not in self._loops:
            counts: Counter[int] = Counter()
            for part, k in runs:
                counts[k] += part.stop - part.start
            ranks, (B, A, _) = [pairs[k][1].shape[0] for k in counts], pairs[0]
            kernel = choose(rows, 1, len(counts), max(1, round(sum(ranks) / len(ranks))), A.shape[1], B.shape[0], A.dtype, A.device,
                            widest=max(ranks), fullest=max(counts.values()))
            self._loops[rows] = kernel in ("looped", "segmented")
        return self._loops[rows]

    def add_directly(self, y: Tensor, x: Tensor, runs: Iterable[tuple[slice, int]], pairs: Sequence[tuple[Tensor, Tensor, float]]) -> None:
        """y (T, out) += the change of x (T, in), in place and without a bank; no gradients."""
        if self.out_rows is not None:
            y = y[:, self.out_rows]
        for rows, k in runs:
            B, A, scale = pairs[k]
            y[rows].addmm_(x[rows] @ A.T, B.T, alpha=scale * self.grafts[k].weight)


def shared_index(numbers: Sequence[int], device: torch.device, kept: dict | None) -> Tensor:
    """`row_index`, the same tensor for all sites that ask with the same dictionary, which keeps a bounded number of them."""
    if kept is None:
        return row_index(numbers, device)
    key = (tuple(numbers), device, torch.is_inference_mode_enabled())
    if key not in kept:
        if len(kept) >= KEPT:
            kept.clear()
        kept[key] = row_index(numbers, device)
    return kept[key]


def shares_of(numbers: Sequence[float], device: torch.device) -> Tensor:
    """The rows' shares (rows,) of an adapter, which remember their values."""
    shares = torch.tensor(numbers, device=device)
    shares.numbers = tuple(numbers)
    return shares
