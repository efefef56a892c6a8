"""Bootstrap intervals of any metric that is a function of sums over rows, and of the difference of two targets.

A resample draws n of the n rows with replacement, which is a vector of counts c ~ Multinomial(n, 1/n). With the statistics S (n, d)
of a metric its value on the resample is f(c S): counts, not rows, are resampled, so corpus metrics (BLEU, F1, perplexity, MCC) cost as
much as means. The interval is the percentile one (Efron 1979). A difference is taken within each resample: both targets on the same
rows (paired bootstrap, Koehn 2004), which takes out how hard the rows are. Values that a resample leaves undefined (a correlation
of equal numbers) are left out of its quantiles; with fewer than two rows, or when most resamples are undefined, there is no interval.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

#: numbers that the counts of one chunk of resamples may have
_CHUNK = 4_000_000


def counts_of(n: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Chunks (b, n) float64 of how often each of n rows is drawn; the chunks have `resamples` lines together. Seeded."""
    generator, chunk = np.random.default_rng(seed), max(1, _CHUNK // max(n, 1))
    for start in range(0, resamples, chunk):
        yield generator.multinomial(n, np.full(n, 1 / n), size=min(chunk, resamples - start)).astype(np.float64)


def resampled(metric: Any, statistics: Any, resamples: int, seed: int) -> dict[str, np.ndarray]:
    """{key: (resamples,)} of a metric's values on resamples of the rows of `statistics` (n, d)."""
    parts: dict[str, list[np.ndarray]] = {}
    for counts in counts_of(statistics.shape[0], resamples, seed):
        for key, values in metric.resampled(statistics, counts).items():
            parts.setdefault(key, []).append(np.asarray(values, dtype=np.float64))
    return {key: np.concatenate(values) for key, values in parts.items()}


def interval(values: np.ndarray, n: int, level: float = 0.95) -> list[float] | None:
    """[low, high] of resampled values (B,); None where n < 2 rows or most of the values are undefined."""
    known = values[np.isfinite(values)]
    if n < 2 or 2 * len(known) <= len(values):
        return None
    return [float(v) for v in np.quantile(known, [(1 - level) / 2, (1 + level) / 2])]


def difference(a: np.ndarray, b: np.ndarray, n: int, level: float = 0.95) -> dict[str, Any]:
    """Of the same resamples of two targets: {"interval": of a - b, "above": share of resamples in which a is larger, ties half}."""
    gap = a - b
    known = gap[np.isfinite(gap)]
    above = float(((known > 0) + 0.5 * (known == 0)).mean()) if len(known) else None
    return {"interval": interval(gap, n, level), "above": above}
