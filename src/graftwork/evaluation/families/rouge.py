"""ROUGE-1, ROUGE-2 and ROUGE-L (F-measure, 0 to 1) by rouge-score, the best over a row's references, averaged over rows.

The library is the one whose numbers papers print; it lower-cases and keeps a-z and 0-9 only, so it says nothing of other scripts. No
stemming, which needs no word lists and is its default. Its cost, nltk, comes with the extra `eval` only.
"""

from __future__ import annotations

import numpy as np

from .base import Metric, metric, ratio

_KINDS = ("rouge1", "rouge2", "rougeL")


@metric("rouge", package="rouge_score", summary="ROUGE-1, ROUGE-2, ROUGE-L (F), 0 to 1; the best over the references")
class Rouge(Metric):
    def usable(self, row):
        return bool(row.get("compared_references"))

    def statistics(self, rows):
        import logging

        from rouge_score.rouge_scorer import RougeScorer

        logging.getLogger("absl").setLevel(logging.WARNING)  # it says at every start which tokenizer it takes
        judge = RougeScorer(list(_KINDS))
        found = [judge.score_multi(row["compared_references"], row["compared"] or "") for row in rows]
        return np.array([[1.0, *(scores[kind].fmeasure for kind in _KINDS)] for scores in found])

    def scores(self, sums):
        return {kind: ratio(sums[..., k], sums[..., 0]) for k, kind in enumerate(_KINDS, 1)}

    def notes(self, rows):
        silent = sum(not any(c.isascii() and c.isalnum() for text in row["compared_references"] for c in text)
                     for row in rows if self.usable(row))
        return [f"rouge: {silent} rows have references without a letter a-z or a digit, which count as empty"] if silent else []
