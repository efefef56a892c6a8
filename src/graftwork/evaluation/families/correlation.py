"""Pearson's and Spearman's correlation of predicted numbers with the true ones (STS-B).

The number is what a regression head gives; else the whole answer that is written, or what --extract finds in it. Answers that are no
number are left out and counted (`not_numbers`).
Undefined (null) where all numbers of one side are equal. Spearman's is Pearson's of the ranks, ties sharing theirs; resamples are
ranked anew: a row drawn c times stands c times, so its rank is

    rank_i = sum_{x_j < x_i} c_j + (sum_{x_j = x_i} c_j + 1) / 2.
"""

from __future__ import annotations

import math

import numpy as np

from ...errors import DataError
from .base import Metric, metric, ratio


class Numbers(Metric):
    """A metric of pairs of numbers."""

    sees_all, real = True, True

    def fit(self, rows):
        for row in rows:
            if row["references"] and number(row["references"][0]) is None:
                raise DataError(f"{row['source']}: the reference {row['references'][0]!r} is no finite number",
                                remedy=f"{self.name} compares numbers; mend the row or leave the metric out")

    def usable(self, row):
        return bool(row["references"]) and number(row["compared"]) is not None

    def statistics(self, rows):
        """(n, 2): the predicted and the true number."""
        return np.array([[number(row["compared"]), number(row["references"][0])] for row in rows], dtype=np.float64).reshape(-1, 2)

    def also(self, rows):
        return {"not_numbers": sum(not self.usable(row) for row in rows)}

    def notes(self, rows):
        lost = self.also(rows)["not_numbers"]
        return [f"{lost} of {len(rows)} answers are no number: left out of {self.name}"] if lost else []


@metric("pearson", summary="linear correlation with the true numbers")
class Pearson(Numbers):
    def resampled(self, statistics, counts):
        return {"pearson": weighted_correlation(statistics[:, 0][None], statistics[:, 1][None], counts)}


@metric("spearman", summary="rank correlation with the true numbers")
class Spearman(Numbers):
    def resampled(self, statistics, counts):
        x, y = (weighted_ranks(column, counts) for column in statistics.T)
        return {"spearman": weighted_correlation(x, y, counts)}


def number(text: str | float | None) -> float | None:
    """The finite number that a text or a number is, None otherwise."""
    try:
        value = float(text.strip() if isinstance(text, str) else text)
    except (ValueError, TypeError):
        return None
    return value if math.isfinite(value) else None


def weighted_ranks(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(b, n) average ranks of values (n,) when value i stands counts (b, n) times."""
    _, inverse = np.unique(values, return_inverse=True)
    tied = np.zeros((counts.shape[0], inverse.max() + 1 if len(inverse) else 0))
    np.add.at(tied.T, inverse, counts.T)
    below = tied.cumsum(1) - tied
    return (below + (tied + 1) / 2)[:, inverse]


def weighted_correlation(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(b,) Pearson's correlation of x and y (b or 1, n) with counts (b, n); NaN where one side is constant."""
    n = counts.sum(1, keepdims=True)
    dx, dy = x - ratio((x * counts).sum(1, keepdims=True), n), y - ratio((y * counts).sum(1, keepdims=True), n)
    spread = (counts * dx**2).sum(1) * (counts * dy**2).sum(1)
    size = (counts * x**2).sum(1) * (counts * y**2).sum(1)
    return ratio((counts * dx * dy).sum(1), np.sqrt(np.where(spread > 1e-24 * size, spread, 0.0)))
