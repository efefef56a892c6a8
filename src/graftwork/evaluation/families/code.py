"""pass@k: the chance that one of k programs passes the tests, from n programs of which c pass (Chen et al., arXiv 2107.03374):

    pass@k = mean over rows of 1 - C(n - c, k) / C(n, k),

which is unbiased, where 1 - (1 - c/n)^k is not. Computed as a product: 1 - prod_{i = n-c+1}^{n} (1 - k / i).
"""

from __future__ import annotations

import numpy as np

from ...errors import UsageError
from .base import Metric, metric, ratio


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate from n programs of which c pass."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise UsageError(f"pass@{k} cannot be estimated from {n} programs of which {c} pass", remedy="--samples at least k")
    return 1.0 if n - c < k else float(1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


@metric("pass_at_k", needs=("programs",), summary="share of problems solved by one of k programs (--k), by running their tests")
class PassAtK(Metric):
    def usable(self, row):
        return row.get("programs") is not None

    def statistics(self, rows):
        return np.array([[1.0, *(pass_at_k(len(row["programs"]), sum(row["passed"]), k) for k in self.options.k)] for row in rows])

    def scores(self, sums):
        return {f"pass@{k}": ratio(sums[..., j], sums[..., 0]) for j, k in enumerate(self.options.k, 1)}

    def also(self, rows):
        return {"samples": len(rows[0]["programs"]) if rows else 0}
