"""The integer programme over layers against exhaustive search."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graftwork.errors import UsageError
from graftwork.storage._allocate import allocate


def total(rows, chosen):
    return float(sum(row[each] for row, each in zip(rows, chosen)))


def table(rng, layers, configurations, whole):
    size = rng.integers(1, 9, (layers, configurations)).astype(float) if whole else rng.random((layers, configurations)) * 1e9
    cost = rng.random((layers, configurations)) * 10.0 ** rng.integers(-6, 3)
    if not whole:
        size.sort(1)
        cost = -np.sort(-cost, 1)  # larger is better, as with bits
    return cost.tolist(), size.tolist()


def best(cost, size, budget):
    found = [c for c in itertools.product(*(range(len(row)) for row in cost)) if total(size, c) <= budget]
    return min((total(cost, c) for c in found), default=None)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), layers=st.integers(1, 5), configurations=st.integers(1, 5), whole=st.booleans(), part=st.floats(0, 1))
def test_equals_exhaustive_search(seed, layers, configurations, whole, part):
    cost, size = table(np.random.default_rng(seed), layers, configurations, whole)
    low, high = sum(map(min, size)), sum(map(max, size))
    budget = low + part * (high - low)
    optimum = best(cost, size, budget)
    for exact in (None, False):
        if optimum is None:  # the sum of the smallest, in another order
            with pytest.raises(UsageError):
                allocate(cost, size, budget, exact=exact)
            continue
        chosen = allocate(cost, size, budget, exact=exact)
        assert len(chosen) == layers and total(size, chosen) <= budget
        uniform = [total(cost, [c] * layers) for c in range(configurations) if total(size, [c] * layers) <= budget]
        assert total(cost, chosen) <= min(uniform, default=np.inf) + 1e-12
        if exact is None:
            assert total(cost, chosen) == pytest.approx(optimum, rel=1e-6, abs=1e-9 * max(map(max, cost)))


@pytest.mark.slow
def test_bisection_is_near_the_optimum_on_a_model():
    """60 matrices, 12 configurations: errors that fall fourfold a bit."""
    rng = np.random.default_rng(0)
    bits = np.array([2.1, 2.4, 2.8, 3.1, 3.4, 3.9, 4.1, 4.4, 4.9, 6.1, 8.1, 8.5])
    weights = rng.choice([192 * 576, 576 * 576, 1536 * 576], 60).astype(float)
    cost = (weights * rng.lognormal(0, 2, 60))[:, None] * 4.0 ** -bits * rng.uniform(0.8, 1.2, (60, 12))
    size = weights[:, None] * bits
    budget = 3.0 * weights.sum()
    exact, near = allocate(cost, size, budget), allocate(cost, size, budget, exact=False)
    assert total(size, exact) <= budget and total(size, near) <= budget
    assert total(cost, exact) <= total(cost, near) <= 1.01 * total(cost, exact)
    assert total(cost, exact) < 0.8 * total(cost, [2] * 60)  # 2.8 bits everywhere


def test_what_cannot_be_is_refused():
    with pytest.raises(UsageError, match="no choice fits") as caught:
        allocate([[1.0, 0.5], [1.0, 0.5]], [[2.0, 3.0], [4.0, 5.0]], 5.9)
    assert "6 or more" in caught.value.remedy
    assert allocate([[1.0, 0.5], [1.0, 0.2, 0.1]], [[2.0, 3.0], [4.0, 5.0, 9.0]], 7) == [0, 1] and allocate([], [], 0) == []
    with pytest.raises(UsageError, match="same lengths"):
        allocate([[1.0, 2.0]], [[1.0]], 3)
    with pytest.raises(UsageError, match="NaN"):
        allocate([[float("nan")]], [[1.0]], 3)
