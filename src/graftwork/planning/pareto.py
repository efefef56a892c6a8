"""Which of several choices nobody would refuse: the Pareto set, the order of a reader's wishes, and what to look at first.

A choice is a vector of numbers or tuples, lower is better. a dominates b when it is nowhere worse and somewhere better; of equal
vectors the first stays. Vectors are rounded before (`coarse`), so that a difference of a per mille keeps nothing alive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def coarse(value: float, step: float = 0.03) -> int:
    """Steps of 3 % on a logarithmic scale; 0 and below are the lowest."""
    return round(math.log(value) / math.log1p(step)) if value > 0 else -10**9


def dominates(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return all(x <= y for x, y in zip(a, b)) and any(x < y for x, y in zip(a, b))


def front(items: Sequence[T], vector: Callable[[T], Sequence[Any]]) -> list[T]:
    """The items that no other dominates, in their order. Sorted first: who dominates comes before whom it dominates, so that each is
    compared with the front so far only."""
    vectors = [tuple(vector(item)) for item in items]
    kept: list[int] = []
    for i in sorted(range(len(items)), key=lambda i: (vectors[i], i)):
        if not any(vectors[k] == vectors[i] or dominates(vectors[k], vectors[i]) for k in kept):
            kept.append(i)
    return [items[i] for i in sorted(kept)]


def pick(items: Sequence[T], keys: Sequence[Callable[[T], Any]], group: Callable[[T], Any], count: int) -> list[T]:
    """`count` of the items to look at: in turn the best of each order in `keys` (the first order has every second turn), of a group
    that has been taken least often."""
    left, chosen, taken = list(items), [], {}
    turns = [keys[0] if i % 2 == 0 else keys[1 + i // 2 % (len(keys) - 1)] for i in range(2 * max(1, len(keys) - 1))] \
        if len(keys) > 1 else list(keys)
    while left and len(chosen) < count:
        key = turns[len(chosen) % len(turns)]
        best = min(left, key=lambda item: (taken.get(group(item), 0), key(item)))
        left.remove(best)
        chosen.append(best)
        taken[group(best)] = taken.get(group(best), 0) + 1
    return chosen


__all__ = ["coarse", "dominates", "front", "pick"]
