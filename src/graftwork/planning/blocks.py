"""What the ledger counts: one block per live storage, snapshots of the totals, and the tensors of nested values."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


class Block(weakref.ref):
    """One live storage. Its callback is the ledger's `_died`; `born` is the number of the operation that made it."""

    __slots__ = ("key", "nbytes", "category", "born")

    def __new__(cls, storage, died, *_):
        return super().__new__(cls, storage, died)

    def __init__(self, storage, died, key: int, nbytes: int, category: int, born: int):
        super().__init__(storage, died)
        self.key, self.nbytes, self.category, self.born = key, nbytes, category, born


class Snapshot:
    __slots__ = ("event", "phase", "total", "bytes", "pools", "blocks")

    def __init__(self, event: int, phase: str, total: int, by_category: list[int], pools: list[int], blocks: int):
        self.event, self.phase, self.total = event, phase, total
        self.bytes, self.pools, self.blocks = by_category.copy(), pools.copy(), blocks


def device_of(tensor: Tensor) -> torch.device:
    """`tensor.device`; of a FakeTensor without the dispatch that the attribute costs it."""
    return getattr(tensor, "fake_device", None) or tensor.device


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Tensors of nested lists, tuples and dicts; wrapper subclasses yield what they wrap."""
    if isinstance(tree, Tensor):
        if is_traceable_wrapper_subclass(tree):
            for name in tree.__tensor_flatten__()[0]:
                yield from tensors_in(getattr(tree, name))
        elif tree.layout == torch.sparse_coo:
            yield tree._indices()
            yield tree._values()
        else:
            yield tree
    elif isinstance(tree, (list, tuple, dict)):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from tensors_in(item)
