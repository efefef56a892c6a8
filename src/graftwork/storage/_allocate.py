"""Which configuration every layer gets under a budget: the integer programme that AdaQuant (arXiv 2006.10518) and LQ-LoRA (arXiv
2311.12023) share.

    minimise sum_l cost[l][c_l]   with   sum_l size[l][c_l] <= budget,   one choice c_l a layer

A configuration that costs no less and is no smaller than another of its layer is dropped first; small tables then go to scipy's
`milp`, which is exact. Large ones (and what `milp` does not finish in time) go to bisection over the multiplier m in
argmin_c cost + m size, after which what is left of the budget is spent on the best trades, one at a time: within a fraction of a percent
of the optimum. Costs are taken to add up, which is an assumption: measure the whole choice again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import UsageError

#: undominated configurations above which `milp` is not tried
EXACT = 20_000


def allocate(cost: Sequence[Sequence[float]], size: Sequence[Sequence[float]], budget: float, *, exact: bool | None = None,
             seconds: float = 30.0) -> list[int]:
    """The choice of every layer. cost, size: one row a layer, one column a configuration (rows may differ in length). exact: None: by the
    size of the table; False: bisection only. Never above budget, never worse than the best configuration given to all layers.
    Raises UsageError for tables that do not fit or a budget below the smallest sizes."""
    costs, sizes = [np.asarray(row, np.float64) for row in cost], [np.asarray(row, np.float64) for row in size]
    if len(costs) != len(sizes) or any(a.shape != b.shape or a.ndim != 1 or not a.size for a, b in zip(costs, sizes)):
        raise UsageError("allocation: cost and size need a row a layer, of the same lengths")
    if not all(np.isfinite(row).all() for row in (*costs, *sizes)):
        raise UsageError("allocation: the table of costs has NaN or infinite entries", remedy="measure the costs again")
    if not costs:
        return []
    left = [_undominated(a, b) for a, b in zip(costs, sizes)]
    costs, sizes = [row[keep] for row, keep in zip(costs, left)], [row[keep] for row, keep in zip(sizes, left)]
    smallest = _total(sizes, [0] * len(sizes))
    if smallest > budget:
        raise UsageError(f"allocation: no choice fits into {budget:g}",
                         remedy=f"a budget of {smallest:g} or more, or smaller configurations")
    chosen = _bisection(costs, sizes, budget)
    if exact or (exact is None and sum(map(len, costs)) <= EXACT):
        found = _programme(costs, sizes, budget, seconds)
        if found is not None and _total(sizes, found) <= budget and _total(costs, found) < _total(costs, chosen):
            chosen = found
    original = [int(keep[each]) for keep, each in zip(left, chosen)]
    return _or_uniform(original, cost, size, budget)


def _undominated(cost: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Indices, smallest first; each is larger and cheaper than the one before."""
    kept, least = [], np.inf
    for i in np.lexsort((cost, size)):
        if cost[i] < least:
            kept.append(i)
            least = cost[i]
    return np.array(kept)


def _total(rows, chosen) -> float:
    return float(sum(row[each] for row, each in zip(rows, chosen)))


def _bisection(costs, sizes, budget: float) -> list[int]:
    def at(multiplier):
        return [int(np.argmin(a + multiplier * b)) for a, b in zip(costs, sizes)]

    low, high = 0.0, 1.0
    if _total(sizes, best := at(0.0)) <= budget:
        return best
    while _total(sizes, at(high)) > budget:
        if high > 1e280:  # ties that no multiplier parts
            best = [0] * len(costs)
            break
        low, high = high, high * 8
    else:
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (low, middle) if _total(sizes, at(middle)) <= budget else (middle, high)
        best = at(high)
    spent = _total(sizes, best)
    while True:  # what is left: the trade that saves the most for its size, or at all where it is free
        trade = None
        for layer, (a, b) in enumerate(zip(costs, sizes)):
            gain, more = a[best[layer]] - a, b - b[best[layer]]
            fits = (gain > 0) & (spent + more <= budget)
            if fits.any():
                worth = np.where(fits, gain / np.maximum(more, 1e-300), -np.inf)
                each = int(np.argmax(worth))
                if trade is None or worth[each] > trade[0]:
                    trade = (worth[each], layer, each)
        if trade is None:
            return best
        best[trade[1]] = trade[2]
        spent = _total(sizes, best)


def _programme(costs, sizes, budget: float, seconds: float) -> list[int] | None:
    """milp's choice, or None. Costs and sizes are brought to about 1: its tolerances are absolute."""
    from scipy.optimize import LinearConstraint, milp
    from scipy.sparse import csr_matrix, vstack

    lengths = [len(row) for row in costs]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    base = np.concatenate([row - row.min() for row in costs])
    flat, unit = np.concatenate(sizes), max(abs(budget), 1e-300)
    one = csr_matrix((np.ones(len(base)), (np.repeat(np.arange(len(costs)), lengths), np.arange(len(base)))))
    matrix = vstack([one, csr_matrix(flat[None] / unit)])
    ones = np.ones(len(costs))
    for slack in (0.0, 2e-6):  # the second where it took its tolerance
        limits = LinearConstraint(matrix, np.append(ones, -np.inf), np.append(ones, budget / unit - slack))
        found = milp(base / (base.max() or 1.0), integrality=np.ones(len(base)), bounds=(0, 1), constraints=limits,
                     options={"time_limit": seconds, "mip_rel_gap": 0.0})
        if found.x is None:
            return None
        chosen = [int(np.argmax(found.x[a:b])) for a, b in zip(starts, starts[1:])]
        if _total(sizes, chosen) <= budget:
            return chosen
    return None


def _or_uniform(chosen: list[int], cost, size, budget: float) -> list[int]:
    best, least = chosen, _total(cost, chosen)
    for each in range(min(map(len, cost))):
        uniform = [each] * len(cost)
        if _total(size, uniform) <= budget and _total(cost, uniform) < least:
            best, least = uniform, _total(cost, uniform)
    return best
