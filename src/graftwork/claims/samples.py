"""Measured values with their spread, and what a comparison of them means.

`Samples` holds one value a seed and row, (seeds, rows); arms that saw the same rows and seeds stay paired. Interval of a mean:
percentile bootstrap over seeds and rows together (2,000 draws, seeded); with one row a seed the t-interval over seeds,
mean +- t(0.975, seeds - 1) s / sqrt(seeds); a single value has none.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

DRAWS = 2000


class Samples:
    """values: (seeds, rows) or a list, which is one seed. center: `mean`, or `median` for times, whose slow outliers say nothing."""

    def __init__(self, values: Any, center: str = "mean"):
        self.values = np.atleast_2d(np.asarray(values, dtype=np.float64))
        self.center = center

    @property
    def point(self) -> float:
        return float(getattr(np, self.center)(self.values))

    @property
    def seeds(self) -> int:
        return self.values.shape[0]

    @property
    def rows(self) -> int:
        return self.values.shape[1]

    def interval(self) -> tuple[float, float] | None:
        """95 %; None where there is one value only."""
        seeds, rows = self.values.shape
        if rows == 1 and seeds == 1:
            return None
        if rows == 1:
            from scipy.stats import t

            half = float(t.ppf(0.975, seeds - 1)) * float(self.values.std(ddof=1)) / math.sqrt(seeds)
            return self.point - half, self.point + half
        generator, center = np.random.default_rng(0), getattr(np, self.center)
        drawn = [center(self.values[generator.integers(0, seeds, seeds)][:, generator.integers(0, rows, rows)]) for _ in range(DRAWS)]
        low, high = np.quantile(drawn, [0.025, 0.975])
        return float(low), float(high)

    def _with(self, other: Any, operation: Any) -> Samples:
        if isinstance(other, Samples) and other.values.shape != self.values.shape:
            raise ValueError(f"samples of {self.values.shape} and {other.values.shape} are not pairs")
        return Samples(operation(self.values, other.values if isinstance(other, Samples) else other), self.center)

    def __add__(self, other: Any) -> Samples:
        return self._with(other, np.add)

    def __sub__(self, other: Any) -> Samples:
        return self._with(other, np.subtract)

    def __mul__(self, other: Any) -> Samples:
        return self._with(other, np.multiply)

    def __truediv__(self, other: Any) -> Samples:
        return self._with(other, np.divide)

    def __neg__(self) -> Samples:
        return Samples(-self.values, self.center)

    def __rsub__(self, other: Any) -> Samples:
        return -self + other

    __radd__, __rmul__ = __add__, __mul__

    def to_json(self) -> dict[str, Any]:
        by_seed = getattr(np, self.center)(self.values, axis=1)
        interval = self.interval()
        return {self.center: finite(self.point), "interval": interval and [finite(v) for v in interval],
                "by_seed": [finite(float(v)) for v in by_seed], "rows": self.rows}


def finite(value: float) -> float | None:
    """None, which JSON has, for what is no number."""
    return value if math.isfinite(value) else None


def compare(left: Any, sign: str, right: Any) -> tuple[bool, tuple[float, float] | None]:
    """(whether it is so, interval of left - right; None without spread). Of samples `<` and `>` need the whole interval on their side (a
    tie is no order), `<=` and `>=` only that it does not lie wholly on the other; `==`, the sign of identities, needs every value; a
    single value counts as it is."""
    if not isinstance(left, Samples) and not isinstance(right, Samples):
        return {"<": left < right, "<=": left <= right, ">": left > right, ">=": left >= right, "==": left == right}[sign], None
    difference = left - right
    interval = difference.interval()
    low, high = interval or (difference.point, difference.point)
    met = {"<": high < 0, "<=": low <= 0, ">": low > 0, ">=": high >= 0, "==": not difference.values.any()}[sign]
    return bool(met) and not (math.isnan(low) or math.isnan(high)), interval
