"""Metrics of a written answer against accepted ones: exact match and the F1 of their words.

Exact match: the answer (or what --extract finds in it) is one of the references, white space around it aside. Token F1 is that of
SQuAD: both texts in lower case, without punctuation and English articles, cut at white space; with the bags of words p and q

    F1 = 2 |p & q| / (|p| + |q|),        1 if both are empty, 0 if one is,

the best over the references.
"""

from __future__ import annotations

import re
import string
from collections import Counter

import numpy as np

from .base import Metric, metric, ratio

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Mean(Metric):
    """A mean over rows of the row's fields of the same names."""

    keys: tuple[str, ...] = ()

    def usable(self, row):
        return all(row.get(key) is not None for key in self.keys)

    def statistics(self, rows):
        return np.array([[1.0, *(float(row[key]) for key in self.keys)] for row in rows], dtype=np.float64)

    def scores(self, sums):
        return {key: ratio(sums[..., k], sums[..., 0]) for k, key in enumerate(self.keys, 1)}


@metric("exact_match", summary="share of answers that are one of the references; `finished`: share that ended by themselves")
class ExactMatch(Mean):
    keys = ("correct",)

    def scores(self, sums):
        return {"exact_match": super().scores(sums)["correct"]}

    def also(self, rows):
        written = [row for row in rows if row.get("finish_reason") is not None]
        return {"finished": sum(row["finish_reason"] == "stop" for row in written) / len(written)} if written else {}


@metric("token_f1", summary="F1 of the bags of words, as in SQuAD; the best over the references")
class TokenF1(Metric):
    def usable(self, row):
        return bool(row.get("compared_references"))

    def statistics(self, rows):
        return np.array([[1.0, max(token_f1(row["compared"] or "", text) for text in row["compared_references"])] for row in rows])

    def scores(self, sums):
        return {"token_f1": ratio(sums[..., 1], sums[..., 0])}


def words(text: str) -> list[str]:
    """Words of a text as SQuAD compares them."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def token_f1(prediction: str, reference: str) -> float:
    """F1 of the bags of words of two texts."""
    p, q = words(prediction), words(reference)
    if not p or not q:
        return float(p == q)
    return 2 * sum((Counter(p) & Counter(q)).values()) / (len(p) + len(q))
