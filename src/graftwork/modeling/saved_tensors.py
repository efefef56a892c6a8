"""Saved tensors kept small: equal rows once, aliases once (the training-time memory of eDKM, arXiv 2309.00964).

Within `rows_saved_once(key)`, key (N numbers of 16 bits), what operations save for the backward pass is kept as follows.

- Uniquification. A saved tensor whose memory is N rows of k numbers, of which rows with equal key are equal (the softmax of the distances
  of N half-precision weights to a code book, say), is kept as one row per distinct key (at most 65,536 of them) and an index of 16
  bits a row, the same for all tensors:  2 N + k min(N, 65536) itemsize  bytes in place of  k N itemsize.
- Marshaling. A tensor whose memory was saved before, as it is, as a view or transposed, refers to what was kept then; what was unpacked
  and is still in use is not built twice.

Everything is compared before it is dropped: what would not come back bit for bit is kept as it is, so gradients are exactly those
without the hooks. Parameters are never copied. A tensor that is kept as it is and changed in place before its use is an error, as in
autograd.

Departures: the public code walks a few steps of the graph for aliases and assumes that rows agree; here aliases are told by their memory,
and rows are compared. Sharding of the index over data-parallel processes is left out: the index is two bytes a weight.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..errors import UsageError


@dataclass
class Saved:
    """bytes: what is kept beyond parameters, each memory once; plain: what would be without the hooks; tensors, aliases: how many
    were saved, and how many of those referred to another."""

    bytes: int = 0
    plain: int = 0
    tensors: int = 0
    aliases: int = 0


@dataclass
class _Kept:
    """One memory: as `plain`, or as `rows` with the index of its key."""

    source: StorageWeakRef
    version: int
    plain: Tensor | None = None
    rows: Tensor | None = None
    unpacked: weakref.ref | None = None


@dataclass
class _View:
    kept: _Kept
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass
class _Rows:
    """The distinct values of a key: `first` (distinct,), where each occurs first; `index` (N,) int16, the place of each less 32,768."""

    first: Tensor
    index: Tensor
    count: int = field(init=False)

    def __post_init__(self):
        self.count = len(self.index)

    @classmethod
    def of(cls, key: Tensor) -> _Rows:
        bits = key.detach().reshape(-1).view(torch.int16)
        found, index = bits.unique(return_inverse=True)
        places = torch.arange(len(bits), device=bits.device)
        first = places.new_full((len(found),), len(bits)).scatter_reduce_(0, index, places, "amin")
        return cls(first, (index - 32768).to(torch.int16))

    def spread(self, rows: Tensor) -> Tensor:
        return rows.index_select(0, self.index.int() + 32768)


@contextmanager
def rows_saved_once(key: Tensor) -> Iterator[Saved]:
    """See the module. key: any shape, bf16 or fp16. Yields what was saved so far; the backward pass may run after the context.
    Raises UsageError for a key of another dtype."""
    if key.dtype not in (torch.bfloat16, torch.float16):
        raise UsageError(f"the rows of saved tensors are told apart by numbers of 16 bits, not {key.dtype}", remedy="cast the key to bf16")
    found, rows = Saved(), _Rows.of(key)
    known = weakref.WeakValueDictionary()  # what is kept lives as long as the operation that saved it
    used = False

    def pack(tensor: Tensor) -> _View:
        nonlocal used
        found.tensors += 1
        memory = tensor.untyped_storage()
        place = (memory._cdata, tensor.dtype)
        kept = known.get(place)
        if kept is not None and not kept.source.expired() and kept.version == tensor._version:
            found.aliases += 1
        else:
            kept = known[place] = _Kept(StorageWeakRef(memory), tensor._version)
            base = tensor._base if tensor._is_view() else tensor
            if base.is_leaf and base.requires_grad:
                kept.plain = _whole(tensor)
            else:
                found.plain += memory.nbytes()
                whole = _whole(tensor)
                kept.rows = _distinct(whole, rows, used)
                if kept.rows is None:
                    kept.plain = whole
                    found.bytes += memory.nbytes()
                else:
                    found.bytes += kept.rows.nbytes + (0 if used else rows.index.nbytes)
                    used = True
        return _View(kept, tensor.size(), tensor.stride(), tensor.storage_offset())

    def unpack(view: _View) -> Tensor:
        kept = view.kept
        if kept.plain is not None:
            if kept.plain._version != kept.version:
                raise RuntimeError("a tensor needed for a gradient was changed in place after it was saved")
            whole = kept.plain
        else:
            whole = None if kept.unpacked is None else kept.unpacked()
            if whole is None:
                whole = rows.spread(kept.rows).reshape(-1)
                kept.unpacked = weakref.ref(whole)
        return whole.as_strided(view.size, view.stride, view.offset)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield found


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor's memory, flat, as its dtype; the version is the tensor's own."""
    detached = tensor.detach()
    return detached.as_strided((tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0)


def _distinct(whole: Tensor, rows: _Rows, used: bool) -> Tensor | None:
    """(distinct, k): the rows of distinct keys, when they say it all in fewer bytes."""
    if not rows.count or whole.numel() % rows.count or not whole.numel():
        return None
    matrix = whole.view(rows.count, -1)
    if len(rows.first) * matrix.shape[1] * matrix.itemsize + (0 if used else rows.index.nbytes) >= matrix.nbytes:
        return None
    table = matrix.index_select(0, rows.first)
    step = max(1, (1 << 20) // matrix.shape[1])
    for start in range(0, rows.count, step):
        part = rows.index[start: start + step].int() + 32768
        same = table.index_select(0, part).view(torch.uint8) == matrix[start: start + step].view(torch.uint8)
        if not same.all():
            return None
    return table
