"""What a metric is: statistics of rows that add up, and a function of their sums.

Observers (evaluation/observers/) write what they saw of the model into one mapping per row; `needs` names those that a metric reads.
A metric turns rows into numbers S (n, d) whose sums decide it: value = f(sum of S over rows). So intervals, paired differences and
members of a fleet all come from the same S. A metric that is no function of sums (Spearman) overrides `resampled`.

A family is a file of this package; @metric registers a class under a name.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ...errors import UsageError, nearest

Row = dict[str, Any]
METRICS: dict[str, type[Metric]] = {}


@dataclass(frozen=True)
class Options:
    """What the user may set of metrics. positive: the label whose F1 `f1` is. k: of pass@k."""

    positive: str | None = None
    k: tuple[int, ...] = (1,)


class Metric:
    """Base. name: as asked for. needs: observers. summary: one line for the documentation. package: a library that it uses. real:
    whether it is of real numbers, and so suits the rows of a regression head. sees_all: whether fit, also and notes are given the rows
    that do not count as well."""

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ("answers",)
    summary: ClassVar[str] = ""
    package: ClassVar[str | None] = None
    real: ClassVar[bool] = False
    sees_all: ClassVar[bool] = False

    def __init__(self, options: Options | None = None):
        self.options = options or Options()

    def fit(self, rows: Sequence[Row]) -> None:
        """Takes what all targets share (the classes that occur) from the rows of all of them. Raises UsageError."""

    def usable(self, row: Row) -> bool:
        """Whether the row counts."""
        return True

    def statistics(self, rows: Sequence[Row]) -> Any:
        """(n, d) float64 (or scipy.sparse) of n rows that count."""
        raise NotImplementedError

    def scores(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """{key: (...)} of sums (..., d); NaN where undefined."""
        raise NotImplementedError

    def resampled(self, statistics: Any, counts: np.ndarray) -> dict[str, np.ndarray]:
        """{key: (b,)} of b resamples with counts (b, n) of rows with statistics (n, d)."""
        return self.scores(np.asarray(counts @ statistics))

    def value(self, statistics: Any) -> dict[str, float]:
        """{key: number} on the rows as they are."""
        return {key: float(v[0]) for key, v in self.resampled(statistics, np.ones((1, statistics.shape[0]))).items()}

    def also(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Further entries of the scores, without intervals."""
        return {}

    def notes(self, rows: Sequence[Row]) -> list[str]:
        """What a reader should know."""
        return []


def metric(name: str, *, summary: str, needs: tuple[str, ...] = ("answers",), package: str | None = None) -> Callable:
    """Class decorator: makes the metric known under its name."""

    def decorate(cls: type[Metric]) -> type[Metric]:
        if name in METRICS:
            raise RuntimeError(f"metric '{name}' is registered twice")
        cls.name, cls.summary, cls.needs, cls.package = name, summary, needs, package
        METRICS[name] = cls
        return cls

    return decorate


def known() -> dict[str, type[Metric]]:
    """All metrics by name."""
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{__package__}.{module.name}")
    return METRICS


def find(names: Sequence[str], options: Options | None = None) -> list[Metric]:
    """Metrics by name, each once. Raises UsageError with the nearest name and the list, or for a package that is not installed."""
    table = known()
    unknown = [name for name in names if name not in table]
    if unknown or not names:
        raise UsageError(f"there is no metric '{', '.join(unknown)}'{nearest(unknown[0], table) if unknown else ''}",
                         remedy=f"metrics: {', '.join(table)}")
    for name in names:
        package = table[name].package
        if package is not None and importlib.util.find_spec(package) is None:
            raise UsageError(f"metric '{name}' needs the package {package}", remedy="pip install 'graftwork[eval]'")
    return [table[name](options) for name in dict.fromkeys(names)]


def ratio(above: np.ndarray, below: np.ndarray, empty: float = np.nan) -> np.ndarray:
    """above / below, `empty` where below is 0."""
    above, below = np.broadcast_arrays(np.asarray(above, np.float64), np.asarray(below, np.float64))
    return np.divide(above, below, out=np.full(above.shape, empty), where=below != 0)
