"""The arithmetic and the memory traffic of a step, operation by operation, counted while it runs on fake tensors.

`Work` is called by the ledger after each operation (Ledger.on_operation). Of an operation it keeps

    flops   of matrix products, convolutions and attention, by PyTorch's own formulas (torch.utils.flop_counter)
    bytes   of the tensors that it reads and writes, each once; 0 for views and for memory that is only reserved.
            What looks rows up in a table (embedding, index_select, gather) reads what it returns, not the table.

and adds equal ones up, so a step of 80 equal blocks is a few hundred cells {(dtype, flops, bytes): how often}. The time that a
machine needs for the cells is `planning.roofline`'s business. What runs inside an optimizer's step is kept apart: it runs once
a step, everything else once a micro-batch. `times` is set while one operation stands for several (`planning.few`).

Not counted: decompositions (SVD, QR) have bytes but no flops, since PyTorch has no formula for them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from .blocks import tensors_in

#: views that their schema does not show, and memory that is reserved and not touched
_FREE = ("_unsafe_view", "empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided")
#: (table, index): only the rows that are returned are read
_LOOKUPS = ("embedding", "index_select", "gather", "index", "take_along_dim")
Cell = tuple[str, int, int]


def _formulas() -> dict[Any, Any]:
    """PyTorch's formulas; the same for operations in place, and those of matrix-vector products and of the attention of processors, which
    its registry lacks."""
    from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

    aten = torch.ops.aten
    in_place = {getattr(aten, f"{name}_"): flop_registry[getattr(aten, name)] for name in ("addmm", "baddbmm")}
    return {**flop_registry, **in_place,
            aten.mv: lambda matrix, vector, *args, out_val=None, **kw: 2 * matrix.numel(),
            aten.addmv: lambda bias, matrix, *args, out_val=None, **kw: 2 * matrix.numel(),
            aten._scaled_dot_product_flash_attention_for_cpu:
            lambda q, k, v, *args, out_val=None, **kw: sdpa_flop_count(q.shape, k.shape, v.shape),
            aten._scaled_dot_product_flash_attention_for_cpu_backward:
            lambda grad, q, k, v, *args, out_val=None, **kw: sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)}


@dataclass
class Counted:
    """Operations, and the cells of a stretch of them."""

    operations: int = 0
    cells: Counter[Cell] = field(default_factory=Counter)


class Work:
    """cells: of the micro-batches; update: of the optimizer's step; both {(dtype of the result, flops, bytes): count}. operations: how
    many there were, those that move nothing too."""

    def __init__(self, inside_optimizer: Any = lambda: False):
        self.formulas, self.inside_optimizer, self.times, self.operations = _formulas(), inside_optimizer, 1, 0
        self.cells: Counter[Cell] = Counter()
        self.update: Counter[Cell] = Counter()
        self._kinds: dict[Any, str] = {}

    @property
    def flops(self) -> int:
        return sum(flops * n for cells in (self.cells, self.update) for (_, flops, _), n in cells.items())

    def __call__(self, func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        self.operations += self.times
        kind = self._kinds.get(func) or self._kinds.setdefault(func, _kind(func))
        if kind == "free" or not self.times:
            return
        results = list(tensors_in(out))
        written = sum(t.numel() * t.itemsize for t in results)
        if kind == "lookup":
            moved = 2 * written + sum(t.numel() * t.itemsize for t in tensors_in((args[1:], kwargs)))
        else:
            read = {id(t): t.numel() * t.itemsize for t in tensors_in((args, kwargs))}
            moved = written + sum(read.values())
        formula = self.formulas.get(func._overloadpacket) if isinstance(func, torch._ops.OpOverload) else None
        flops = formula(*args, **kwargs, out_val=out) if formula is not None else 0
        if flops or moved:
            dtype = str(results[0].dtype).removeprefix("torch.") if flops and results else ""
            (self.update if self.inside_optimizer() else self.cells)[dtype, flops, moved] += self.times

    @contextmanager
    def apart(self) -> Iterator[Counted]:
        """What is counted inside, also by itself: once, whatever an operation stands for now."""
        outer, around = (self.operations, self.cells, self.update), self.times
        self.operations, self.cells, self.update, self.times = 0, Counter(), Counter(), 1
        counted = Counted()
        try:
            yield counted
        finally:
            counted.operations, counted.cells = self.operations, self.cells + self.update
            (self.operations, self.cells, self.update), self.times = outer, around
            self.add(counted)

    def add(self, counted: Counted) -> None:
        """Once more what was counted apart, as many times as an operation stands for now."""
        self.operations += self.times * counted.operations
        into = self.update if self.inside_optimizer() else self.cells
        for cell, n in counted.cells.items():
            into[cell] += self.times * n

    def repeat(self, times: int) -> None:
        """What was counted of micro-batches comes `times` times."""
        self.operations *= times
        self.cells = Counter({cell: n * times for cell, n in self.cells.items()})

    def step(self, micro_batches: float) -> list[list[Any]]:
        """[dtype, flops, bytes, count] of a whole step, in which what was counted comes `micro_batches` times and the update once."""
        total = Counter({cell: n * micro_batches for cell, n in self.cells.items()})
        total.update(self.update)
        return [[*cell, n] for cell, n in sorted(total.items())]


def _kind(func: Any) -> str:
    name = func._schema.name.partition("::")[2] if isinstance(func, torch._ops.OpOverload) else ""
    returned = [r.alias_info for r in func._schema.returns] if name else []
    if name in _FREE or any(alias is not None and not alias.is_write for alias in returned):
        return "free"
    return "lookup" if name in _LOOKUPS else "plain"


__all__ = ["Work"]
