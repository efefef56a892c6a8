"""Decoding a weight is simulated twice for all that are alike.

A plan of 70B that has to go through every block decodes 560 weights three times, in 10 to 40 operations each, and most of its time goes
there. What such a call allocates and frees follows from the format, its options and the shapes: so of calls that are alike the second
one is noted, relative to its beginning, and from the third on the ledger is told its highest moment, the work is added, and only the
result is allocated. The first may leave tables behind, so it is not the one that is noted; neither is a call that leaves anything but a
new result, or that autograd looks into.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from ..storage.base import Storage
from .blocks import tensors_in
from .ledger import Course, Ledger
from .work import Counted, Work

#: methods of a storage that read its codes and return one dense result
CALLS = ("forward_product", "transposed", "dense_as", "dequantize")


@dataclass
class _Noted:
    """One call: what the ledger saw, what was counted but for the making of the result, and that."""

    course: Course
    counted: Counted
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class _Calls:
    """Stands before the calls of all storages of a model."""

    def __init__(self, ledger: Ledger, work: Work):
        self.ledger, self.work = ledger, work
        self.seen: Counter[tuple] = Counter()
        self.noted: dict[tuple, _Noted] = {}
        self.inside = False

    def __call__(self, call: Any, kind: tuple, *args: Any, **kwargs: Any) -> Any:
        values = (*args, *kwargs.values())
        if self.inside or not all(isinstance(v, Tensor | torch.dtype) for v in values) or _looked_into(values):
            return call(*args, **kwargs)
        key = (*kind, *kwargs, self.ledger.where, *map(_shape, values))
        noted = self.noted.get(key)
        if noted is not None:
            self.ledger.replay(noted.course)
            self.work.add(noted.counted)
            return torch.empty_strided(noted.shape, noted.stride, dtype=noted.dtype, device=noted.device)
        self.seen[key] += 1
        self.inside = True
        try:
            return call(*args, **kwargs) if self.seen[key] != 2 else self._note(key, call, args, kwargs)
        finally:
            self.inside = False

    def _note(self, key: tuple, call: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        known = self.ledger.known()
        with self.ledger.course() as course, self.work.apart() as counted:
            out = call(*args, **kwargs)
        if isinstance(out, Tensor) and not out.requires_grad and course.left == (nbytes := out.untyped_storage().nbytes()) \
                and out.untyped_storage()._cdata not in known and nbytes == out.numel() * out.itemsize:
            counted.operations -= 1
            self.noted[key] = _Noted(course, counted, tuple(out.shape), out.stride(), out.dtype, out.device)
        return out


def _shape(value: Tensor | torch.dtype) -> tuple:
    return (tuple(value.shape), value.stride(), value.dtype, value.device) if isinstance(value, Tensor) else (value,)


def _looked_into(values: tuple) -> bool:
    """Whether derivatives of what these calls do may be taken."""
    return forward_ad._current_level >= 0 or torch.is_grad_enabled() and any(t.requires_grad for t in tensors_in(values))


def _described(storage: Storage) -> tuple:
    """What two storages share whose calls are alike: all that they are but the values of their tensors."""
    plain = nn.Module().__dict__
    own = (*storage.named_parameters(recurse=False), *storage.named_buffers(recurse=False))  # children are what grafts attach
    return (type(storage), *((name, str(value)) for name, value in sorted(vars(storage).items()) if name not in plain),
            *((name, tuple(t.shape), t.dtype, t.device) for name, t in own))


@contextmanager
def _instead(storages: list[Storage], calls: Callable[[Storage, str], Callable[..., Any]], names: Sequence[str]) -> Iterator[None]:
    for storage in storages:
        for name in names:
            storage.__dict__[name] = calls(storage, name)
    try:
        yield
    finally:
        for storage in storages:
            for name in names:
                del storage.__dict__[name]


def alike(model: nn.Module, ledger: Ledger, work: Work) -> AbstractContextManager[None]:
    """Calls of this model's storages that are alike are simulated twice in this scope."""
    calls, numbers = _Calls(ledger, work), {}
    frozen = [m for m in model.modules() if isinstance(m, Storage) and not any(p.requires_grad for p in m.parameters(recurse=False))]
    kinds = {storage: numbers.setdefault(_described(storage), len(numbers)) for storage in frozen}
    return _instead(frozen, lambda storage, name: partial(calls, getattr(storage, name), (kinds[storage], name)), CALLS)


def shapes_alone(model: nn.Module) -> AbstractContextManager[None]:
    """Weights of this model's storages are read as tensors of their shape and dtype in this scope: outside of a ledger, without values,
    how they are decoded is nobody's business (many adapters read them when they are attached)."""
    def call(storage: Storage, name: str) -> Callable[..., Tensor]:
        return lambda leaves=None: torch.empty(storage.out_features, storage.in_features, dtype=storage.compute_dtype,
                                               device=storage.weight.device)

    return _instead([m for m in model.modules() if isinstance(m, Storage)], call, ("dequantize",))


__all__ = ["alike", "shapes_alone"]
