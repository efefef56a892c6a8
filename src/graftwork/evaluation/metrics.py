"""Scores of rows and what they say together."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from ..errors import UsageError


def pattern(text: str | None) -> re.Pattern | None:
    """A compiled --extract pattern. Raises UsageError when it is no regular expression."""
    if text is None:
        return None
    try:
        return re.compile(text, re.DOTALL)
    except re.error as error:
        raise UsageError(f"--extract: '{text}' is no regular expression: {error}",
                         remedy=r"for GSM8K for example: --extract '####\s*(\S+)'") from None


def extract(text: str, finder: re.Pattern | None) -> str | None:
    """The last match of the pattern (its first group, if it has one) without white space around; None without a match."""
    if finder is None:
        return text.strip()
    found = next(reversed(list(finder.finditer(text))), None)
    return None if found is None else (found.group(1 if finder.groups else 0) or "").strip()


def matches(prediction: str, references: Sequence[str], finder: re.Pattern | None = None) -> bool:
    """Whether the prediction is one of the references, white space around it aside. With a pattern what it finds is
    compared; a reference without a match counts as written (a bare final answer), a prediction without one is wrong."""
    answer = extract(prediction, finder)
    if answer is None:
        return False
    return answer in {reference.strip() if (cut := extract(reference, finder)) is None else cut for reference in references}


def bootstrap_interval(values: Sequence[float], *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> list[float]:
    """Percentile bootstrap interval of a mean, resampling rows. Seeded."""
    data, generator = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    chunk = max(1, 4_000_000 // len(data))
    means = np.concatenate([data[generator.integers(0, len(data), (min(chunk, resamples - k), len(data)))].mean(1)
                            for k in range(0, resamples, chunk)])
    return [float(v) for v in np.quantile(means, [(1 - level) / 2, (1 + level) / 2])]


def macro_f1(predicted: Sequence[int], wanted: Sequence[int]) -> float:
    """Mean F1 over the classes that occur among the labels or the predictions."""
    predicted, wanted = np.asarray(predicted), np.asarray(wanted)
    scores = []
    for label in np.union1d(predicted, wanted):
        hit = int(((predicted == label) & (wanted == label)).sum())
        scores.append(2 * hit / int((predicted == label).sum() + (wanted == label).sum()))
    return float(np.mean(scores))
