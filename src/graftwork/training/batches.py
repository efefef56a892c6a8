"""The micro-batches of each optimizer step, as a function of (data, seed, step) alone: a resume needs no replay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from ..data.order import BatchOrder

Batch = dict[str, Any]


class StepBatches:
    """Item t: the list of collated micro-batches of optimizer step t, for one data set.

    Each step takes batch_size * accumulation rows of the epoch's permutation, cut into micro-batches of batch_size."""

    def __init__(self, data: Any, collate: Callable[[list[dict]], Batch], batch_size: int, accumulation: int, total_steps: int,
                 seed: int):
        self.data, self.collate, self.batch_size, self.rows = data, collate, batch_size, batch_size * accumulation
        self.total_steps, self.seed = total_steps, seed
        self._order: BatchOrder | None = None

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each row of the data."""
        return list(self.data.lengths())

    @cached_property
    def target_counts(self) -> list[int]:
        """Trained tokens (or labels) of each row of the data."""
        rows = (self.data[i]["labels"] for i in range(len(self.data)))
        return [sum(x != -100 for x in labels[1:]) if isinstance(labels, list) else 1 for labels in rows]

    @staticmethod
    def steps_per_epoch(rows: int, batch_size: int, accumulation: int) -> int:
        return BatchOrder.batches_per_epoch(rows, batch_size * accumulation)

    def __len__(self) -> int:
        return self.total_steps

    def indices(self, step: int) -> list[int]:
        """Rows of one step, in order."""
        epoch, place = divmod(step, BatchOrder.batches_per_epoch(len(self.data), self.rows))
        if self._order is None or self._order.epoch != epoch:
            self._order = BatchOrder(len(self.data), self.rows, self.seed, epoch)
        return self._order[place]

    def micro(self, step: int) -> list[list[dict]]:
        """The step's rows, uncollated, by micro-batch."""
        chosen = self.indices(step)
        # one run trains one adapter (a fleet names it itself), so a row's own "adapter" does not route
        rows = [{k: v for k, v in {**self.data[i], "index": i}.items() if k != "adapter"} for i in chosen]
        return [rows[k:k + self.batch_size] for k in range(0, len(rows), self.batch_size)]

    def __getitem__(self, step: int) -> list[Batch]:
        if not 0 <= step < self.total_steps:
            raise IndexError(step)
        return [self.collate(rows) for rows in self.micro(step)]


class FleetBatches:
    """Item t: mixed micro-batches of a fleet. Each member takes the very rows that it would take alone at its step t, so
    its micro-batches, its loss scale and its learning rate are those of training it alone; a member that is done, or named in
    `stopped`, is absent. Empty when no member is left."""

    def __init__(self, members: dict[str, StepBatches], collate: Callable[[list[dict]], Batch]):
        self.members, self.collate = members, collate
        self.total_steps = max(m.total_steps for m in members.values())
        self.stopped: Mapping[str, str] = {}

    def __len__(self) -> int:
        return self.total_steps

    def __getitem__(self, step: int) -> list[Batch]:
        if not 0 <= step < self.total_steps:
            raise IndexError(step)
        parts = [[[{**row, "adapter": name} for row in rows] for rows in member.micro(step)]
                 for name, member in self.members.items() if step < member.total_steps and name not in self.stopped]
        return [self.collate([row for part in parts if k < len(part) for row in part[k]])
                for k in range(max((len(part) for part in parts), default=0))]


def total_steps(rows: int, *, epochs: float, max_steps: int, batch_size: int, accumulation: int) -> int:
    """Optimizer steps of a run over `rows` rows."""
    if max_steps > 0:
        return max_steps
    return max(1, round(epochs * StepBatches.steps_per_epoch(rows, batch_size, accumulation)))


def identity(items: Sequence[Any]) -> Any:
    """Collate function of a loader whose items are whole steps."""
    return items[0]


def heaviest_step(batches: Any, within: range | None = None) -> int:
    """The step whose largest micro-batch has the most padded tokens (of equals, the one with most trained tokens), looked for
    within these steps (all of the run) after the first of them, where optimizer state exists."""
    def weight(step: int) -> tuple[int, int]:
        members = batches.members.values() if isinstance(batches, FleetBatches) else [batches]
        best, chunks = (0, 0), []
        for m in members:
            if step < m.total_steps:
                chosen = m.indices(step)
                chunks.append([chosen[k:k + m.batch_size] for k in range(0, len(chosen), m.batch_size)])
        lengths = [m.lengths for m in members if step < m.total_steps]
        targets = [m.target_counts for m in members if step < m.total_steps]
        for k in range(max(len(c) for c in chunks)):
            rows = [(length[i], target[i]) for c, length, target in zip(chunks, lengths, targets) if k < len(c) for i in c[k]]
            best = max(best, (len(rows) * max(n for n, _ in rows), sum(t for _, t in rows)))
        return best

    steps = range(len(batches))
    if within:
        steps = range(within.start, min(within.stop, len(batches)), within.step) or steps
    return max(steps[1:] or steps, key=weight)
