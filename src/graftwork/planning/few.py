"""What is the same many times in a step is simulated a few times.

Rounds. MeZO draws and adds its noise, optimizers update large tensors, and products decode or widen weights in pieces of 2^20 values,
70,000 of them for 70B; losses are computed for some rows at a time; NOLA draws its random matrices in groups, sixteen a site and pass.
All that goes through `modeling.repeated.each`. Every round needs the memory of the second one (which begins while the first one's
buffers are alive), so the first, the second and the last are simulated, and the work of the second counts for all between.

Sweeps. An estimator that measures one block at a time (`zo_blockwise`) goes forward through the whole model for each: 160 times for 80
layers. Blocks of equal shapes need the same, so the first and the last of them are measured, and the work of the last counts for the rest.
What a measurement leaves behind, a few numbers, is there for every block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..estimators import _spsa, mezo
from ..modeling import repeated
from .work import Work


@contextmanager
def few_for_all(work: Work, depth: int = 1, layers: int = 1) -> Iterator[None]:
    """Steps in this scope take few pieces and sweeps; `work.times` tells what each stands for. depth: layers of the simulated model,
    which stands for one of `layers`."""
    places = [(repeated, "each", lambda rounds: _few(work, rounds)), *_few_sweeps(work, depth, layers)]
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    for owner, name, made in places:
        setattr(owner, name, made)
    try:
        yield
    finally:
        for owner, name, was in kept:
            setattr(owner, name, was)


def _few(work: Work, every: Sequence[Any]) -> Iterator[Any]:
    """The first, the second and the last, the second in place of all between."""
    around = work.times  # of the piece that these are parts of
    for i in sorted({*range(min(2, len(every))), *range(len(every))[-1:]}):
        work.times = around * (max(1, len(every) - 2) if i == 1 else 1)
        yield every[i]
    work.times = around


def _few_sweeps(work: Work, depth: int, layers: int) -> list[tuple[Any, str, Callable[..., Any]]]:
    """Blocks that come once a layer, or several times, are as many as the whole model has."""
    listed, measured = _spsa.blocks_of, _spsa.SPSAEstimator.measure
    there: Counter[tuple] = Counter()
    done: Counter[tuple] = Counter()
    left: dict[tuple, Any] = {}  # what makes the like of the tensors of a measurement, which would stay alive here

    def shapes(block: mezo.Named) -> tuple:
        return tuple((p.shape, p.dtype) for _, p in block)

    def blocks_of(moving: mezo.Named, by: str) -> list[mezo.Named]:
        blocks = listed(moving, by)
        there.clear()
        done.clear()
        there.update(map(shapes, blocks))
        return blocks

    def measure(self: Any, ctx: Any, block: mezo.Named) -> tuple[list[Tensor], Tensor, list]:
        key, around = shapes(block), work.times
        count, number = there[key], done[key]
        done[key] += 1
        if 0 < number < count - 1:
            work.times = 0
            made = tree_map(lambda create: create(), left[key])
        else:
            whole = count // depth * layers if count % depth == 0 else count
            work.times = around * (whole - 1 if number else 1)
            made = measured(self, ctx, block)
            left[key] = tree_map(lambda t: partial(torch.empty, t.shape, dtype=t.dtype, device=t.device), made)
        work.times = around
        return made

    return [(_spsa, "blocks_of", blocks_of), (_spsa.SPSAEstimator, "measure", measure)]


__all__ = ["few_for_all"]
