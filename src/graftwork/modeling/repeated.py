"""Loops whose rounds are all alike: chunks of rows, pieces of a tensor, tiles of a matrix, groups of a basis.

They go through `repeated.each(rounds)`, looked up in this module when the loop begins. A plan replaces it to simulate a few rounds
for all of them (planning.few). A round may leave behind what does not grow with their number, and must not read values of another.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

Round = TypeVar("Round")


def each(rounds: Sequence[Round]) -> Iterable[Round]:
    """The rounds to run, in order."""
    return rounds
