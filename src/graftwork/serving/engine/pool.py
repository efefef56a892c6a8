"""One pool of pages for everything that comes and goes on a device: keys and values of requests, and adapters.

The pool is one block of bytes, cut into 2 L lanes (keys and values of L layers); a lane is a row of cells, one cell holding
what its layer keeps of one token, whatever the number of heads and the width (grouped queries, several head sizes). A page is
`page_tokens` neighbouring cells of every lane, so one number names the same page in all layers:

    lane    [page 0: cell 0 .. t-1][page 1: cell t .. 2t-1] ...      lane.cell_bytes = heads * width * itemsize

Keys and values take pages anywhere. A tensor of an adapter has to lie in one piece, so an adapter takes a run of neighbouring
pages and its tensors are packed into the run's 2 L pieces (`Packing`): no tensor of another shape is padded to a common size.
Where no run is free, pages of keys and values are moved out of the way (`make_run`).

Pages are counted by users: a page of a prompt that several requests share is free when the last one lets go. The pool never
looks into what it holds; owners are names that the page map and the invariants are written in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from ...errors import UsageError

ALIGN = 64  # bytes: tensors of an adapter start on a cache line


@dataclass(frozen=True)
class LayerShape:
    """What one layer keeps of a token: heads and widths of its keys and values."""

    heads: int
    key_width: int
    value_width: int


@dataclass(frozen=True)
class Packing:
    """Where tensors lie in a run of pages: places[i] = (lane, byte offset inside the run's piece of that lane)."""

    pages: int
    places: tuple[tuple[int, int], ...]


class Pool:
    """pages: how many. page_tokens: cells of a page. dtype: of keys and values. Raises UsageError for a pool without room."""

    def __init__(self, layers: Sequence[LayerShape], pages: int, *, page_tokens: int = 16, dtype: torch.dtype = torch.float32,
                 device: torch.device | str = "cpu"):
        if pages < 1:
            raise UsageError(f"a pool of {pages} pages has no room", remedy="give it more memory")
        if page_tokens < 8 or page_tokens % 8:
            raise UsageError(f"a page of {page_tokens} tokens", remedy="a multiple of 8, so that tensors of any dtype are aligned")
        self.pages, self.page_tokens, self.dtype, self.device = pages, page_tokens, dtype, torch.device(device)
        widths = [(shape.heads, width) for shape in layers for width in (shape.key_width, shape.value_width)]
        self.cell_bytes = [heads * width * dtype.itemsize for heads, width in widths]
        self.page_bytes = page_tokens * sum(self.cell_bytes)
        starts = np.concatenate([[0], np.cumsum([_aligned(pages * page_tokens * size) for size in self.cell_bytes])])
        self.buffer = torch.zeros(int(starts[-1]), dtype=torch.uint8, device=device)
        self.lanes = [self.buffer[int(start): int(start) + pages * page_tokens * size]
                      for start, size in zip(starts, self.cell_bytes)]
        cells = [lane.view(dtype).view(pages * page_tokens, heads, width) for lane, (heads, width) in zip(self.lanes, widths)]
        self.keys, self.values = cells[0::2], cells[1::2]
        self.users = np.zeros(pages, dtype=np.int32)
        self.free = pages  # how many have no user; counted along, as it is asked for in every step
        self.owner: list[str | None] = [None] * pages
        self.fixed = np.zeros(pages, dtype=bool)  # pages of a run, which cannot be moved one by one

    # -- counts -------------------------------------------------------------------------------------------------------------
    @property
    def used(self) -> int:
        return self.pages - self.free

    @property
    def nbytes(self) -> int:
        return self.buffer.numel()

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)

    # -- single pages ---------------------------------------------------------------------------------------------------------
    def take(self, count: int, owner: str, after: int | None = None) -> list[int] | None:
        """`count` pages, or None when so many are not free. They follow page `after` where they can, so that a request's
        tokens lie in one piece; else the longest free run is begun in its middle, which leaves its owner room to grow."""
        if count > self.free:
            return None
        taken: list[int] = []
        at = after
        while len(taken) < count:
            if at is None or at + 1 >= self.pages or self.users[at + 1]:
                start, length = self._longest_run()
                at = start - 1 + (length - (count - len(taken))) // 2 if self._beside(start) and length > count - len(taken) else start - 1
            at += 1
            self.users[at], self.owner[at] = 1, owner
            self.free -= 1
            taken.append(at)
        return taken

    def share(self, pages: Sequence[int]) -> None:
        """One more user of each of these pages."""
        for page in pages:
            assert self.users[page] > 0, f"page {page} is free and cannot be shared"
            self.users[page] += 1

    def give(self, pages: Sequence[int]) -> None:
        """One user less of each of these pages; without users a page is free."""
        for page in pages:
            assert self.users[page] > 0, f"page {page} is given back twice"
            self.users[page] -= 1
            if not self.users[page]:
                self.owner[page], self.fixed[page] = None, False
                self.free += 1

    # -- runs of pages ----------------------------------------------------------------------------------------------------------
    def take_run(self, count: int, owner: str) -> int | None:
        """The first page of `count` free neighbours (the smallest gap that holds them), or None."""
        if count == 0:
            return 0
        fitting = [(length, start) for start, length in self._runs(self.users == 0) if length >= count]
        if not fitting:
            return None
        start = min(fitting)[1]
        return self._occupy(start, count, owner)

    def make_run(self, count: int, owner: str, moved: Callable[[dict[int, int]], None]) -> int | None:
        """Like take_run, after moving single pages out of the cheapest window if need be; moved({old: new}) is called once
        the bytes are copied, so that whoever holds page numbers can follow. None: not so many pages are free, or runs of
        adapters stand in the way everywhere."""
        start = self.take_run(count, owner)
        if start is not None or count > self.free or count > self.pages:
            return start
        busy = np.concatenate([[0], np.cumsum(self.users > 0)])
        stuck = np.concatenate([[0], np.cumsum(self.fixed)])
        cost = busy[count:] - busy[:-count]
        cost = np.where(stuck[count:] - stuck[:-count] > 0, self.pages + 1, cost)
        start = int(cost.argmin())
        if cost[start] > self.pages:
            return None
        inside = [p for p in range(start, start + count) if self.users[p]]
        outside = [p for p in np.flatnonzero(self.users == 0).tolist() if not start <= p < start + count][: len(inside)]
        if len(outside) < len(inside):
            return None
        self._copy(inside, outside)
        for old, new in zip(inside, outside):
            self.users[new], self.owner[new] = self.users[old], self.owner[old]
            self.users[old], self.owner[old] = 0, None
        moved(dict(zip(inside, outside)))
        return self._occupy(start, count, owner)

    def pack(self, sizes: Sequence[int]) -> Packing:
        """Pages whose 2 L pieces hold tensors of these sizes in bytes, and where each one goes: largest first, each into the first piece
        that has room. Few, not always the fewest."""
        if not sizes:
            return Packing(0, ())
        order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
        total, largest = sum(map(_aligned, sizes)), max(sizes, default=0)
        pages = max(1, -(-total // self.page_bytes), -(-largest // (self.page_tokens * max(self.cell_bytes))))
        while True:
            room = [pages * self.page_tokens * size for size in self.cell_bytes]
            used = [0] * len(room)
            places: list[tuple[int, int]] = [(0, 0)] * len(sizes)
            lanes = sorted(range(len(room)), key=lambda lane: -room[lane])
            for i in order:
                lane = next((k for k in lanes if room[k] - used[k] >= sizes[i]), None)
                if lane is None:
                    break
                places[i] = (lane, used[lane])
                used[lane] += _aligned(sizes[i])
            else:
                return Packing(pages, tuple(places))
            pages += 1

    def piece(self, start: int, place: tuple[int, int], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The tensor at `place` of the run that begins with page `start`: a view of the pool."""
        lane, offset = place
        first = start * self.page_tokens * self.cell_bytes[lane] + offset
        return self.lanes[lane][first: first + prod(shape) * dtype.itemsize].view(dtype).view(tuple(shape))

    # -- inside ---------------------------------------------------------------------------------------------------------------
    def _occupy(self, start: int, count: int, owner: str) -> int:
        self.users[start: start + count], self.fixed[start: start + count] = 1, True
        self.owner[start: start + count] = [owner] * count
        self.free -= count
        return start

    def _copy(self, old: list[int], new: list[int]) -> None:
        if self.device.type == "meta":  # a simulated pool holds nothing
            return
        source, target = torch.tensor(old, device=self.device), torch.tensor(new, device=self.device)
        for lane, size in zip(self.lanes, self.cell_bytes):
            pages = lane.view(self.pages, self.page_tokens * size)
            pages.index_copy_(0, target, pages.index_select(0, source))

    @staticmethod
    def _runs(mask: np.ndarray) -> list[tuple[int, int]]:
        """(start, length) of every stretch of True."""
        edges = _edges(mask).tolist()
        return [(a, b - a) for a, b in zip(edges[0::2], edges[1::2])]

    def _longest_run(self) -> tuple[int, int]:
        edges = _edges(self.users == 0)
        lengths = edges[1::2] - edges[0::2]
        at = int(lengths.argmax())
        return int(edges[2 * at]), int(lengths[at])

    def _beside(self, start: int) -> bool:
        """Whether the page before a free run is in use: its owner may want to grow into the run."""
        return start > 0 and not self.fixed[start - 1]


def _edges(mask: np.ndarray) -> np.ndarray:
    """Where stretches of True begin and end, in turn."""
    padded = np.zeros(len(mask) + 2, dtype=bool)
    padded[1:-1] = mask
    return np.flatnonzero(padded[1:] != padded[:-1])


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN
