"""Which rows form which batch: a pure function of (seed, epoch), so a resume at any step replays nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch

from ..errors import UsageError


class BatchOrder:
    """The batches of one epoch: `order[k]` is the list of row indices of batch k, `len(order)` their number.

    A seeded permutation of range(n), cut into pieces of `batch_size`; the last one may be shorter (`drop_last` leaves it
    out). shuffle=False keeps the order of the rows. `at_step(..., step)` finds the place of a global step.
    """

    def __init__(self, n: int, batch_size: int, seed: int, epoch: int = 0, *, shuffle: bool = True, drop_last: bool = False):
        if n < 1 or batch_size < 1:
            raise UsageError(f"no batches from {n} rows in batches of {batch_size}", remedy="both must be at least 1")
        if drop_last and n < batch_size:
            raise UsageError(f"{n} rows make no full batch of {batch_size}",
                             remedy="use a smaller batch_size, or keep the last batch")
        self.n, self.batch_size, self.seed, self.epoch = n, batch_size, seed, epoch
        self.shuffle, self.drop_last = shuffle, drop_last
        self.permutation = self._permutation() if shuffle else list(range(n))

    def _permutation(self) -> list[int]:
        # A hash, since neighbouring seeds of a Mersenne twister and (seed, epoch + 1) = (seed + 1, epoch) must not meet.
        key = int.from_bytes(hashlib.sha256(f"{self.seed}/{self.epoch}".encode()).digest()[:8], "big") >> 1
        return torch.randperm(self.n, generator=torch.Generator().manual_seed(key)).tolist()

    @staticmethod
    def batches_per_epoch(n: int, batch_size: int, drop_last: bool = False) -> int:
        return n // batch_size if drop_last else -(-n // batch_size)

    @classmethod
    def at_step(cls, n: int, batch_size: int, seed: int, step: int, **options) -> tuple[BatchOrder, int]:
        """The order of the epoch that holds global batch number `step` (from 0), and its place in that epoch."""
        epoch, place = divmod(step, max(cls.batches_per_epoch(n, batch_size, options.get("drop_last", False)), 1))
        return cls(n, batch_size, seed, epoch, **options), place

    def __len__(self) -> int:
        return self.batches_per_epoch(self.n, self.batch_size, self.drop_last)

    def __getitem__(self, k: int) -> list[int]:
        if not -len(self) <= k < len(self):
            raise IndexError(k)
        k %= len(self)
        return self.permutation[k * self.batch_size:(k + 1) * self.batch_size]

    def __iter__(self) -> Iterator[list[int]]:
        return (self[k] for k in range(len(self)))
