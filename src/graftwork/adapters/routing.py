"""The scope that chooses one graft per row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from ..errors import IncompatibleError, UsageError, nearest
from ..modeling.state import state_of


@contextmanager
def routing(model: nn.Module, rows: Iterable[str | None], *, expansion: int = 1) -> Iterator[None]:
    """Scope in which row i of the batch is answered by the graft named rows[i]; None is the bare base.

    expansion: consecutive rows of the tensors per name (beams, several samples)."""
    holder = state_of(model)
    names = tuple(rows)
    for name in set(names) - {None}:
        if name not in holder.grafts:
            raise UsageError(f"no graft named '{name}' is attached{nearest(name, holder.grafts)}",
                             remedy=f"attached: {', '.join(holder.grafts) or 'none'}")
    if any(g.merged for g in holder.grafts.values()):
        raise UsageError("a merged graft is part of every row", remedy="unmerge it before routing")
    edited = [g.name for g in holder.grafts.values() if g.edited_storage]
    if edited and set(names) != {edited[0]}:
        raise IncompatibleError(f"graft '{edited[0]}' runs on an edited base that other rows cannot share",
                                remedy="train it on dense storage, or convert it to lora (exact, rank 2r)")
    with holder.scope(rows=names, expansion=expansion, token_rows=None):
        yield
