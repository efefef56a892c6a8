"""Large tensors whose rule looks at one entry at a time: updated piece by piece, so that no temporary has the tensor's size.

An embedding of 32000 x 4096 in bfloat16 is 0.24 GiB, its float32 copy 0.49, and a rule on 8-bit state needs nine such copies: of
the weight, the gradient, both moments, and what coding them takes. A piece is a run of entries in memory order, a multiple of the
block of 8-bit state, so that the result is the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ..modeling import repeated
from ..modeling.blockwise import BLOCK

#: tensors of more entries are cut
LARGE = 2**22
#: entries of a piece, a multiple of BLOCK
PIECE = 2**20


def spans(size: int) -> Iterator[slice]:
    """The pieces of a tensor of `size` entries, in order."""
    for start in repeated.each(range(0, size, PIECE)):
        yield slice(start, min(start + PIECE, size))


def in_order(*tensors: Tensor) -> bool:
    """Whether all run through memory in the same order."""
    return all(t.is_contiguous() for t in tensors)


def cut(state: dict[str, Tensor], span: slice, size: int) -> dict[str, Tensor]:
    """The part of a parameter's state that belongs to these entries: views, but for what is one number for the whole parameter."""
    parts = {}
    for name, t in state.items():
        if t.ndim == 0:
            parts[name] = t.clone()
        else:  # one number per entry, or per block of them
            per = BLOCK if t.numel() < size else 1
            parts[name] = t.view(-1)[span.start // per: -(-span.stop // per)]
    return parts
