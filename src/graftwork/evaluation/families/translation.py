"""BLEU and chrF by sacrebleu, in percent as usual: corpus scores from the counts of each row.

sacrebleu makes the counts (matches and totals of n-grams, lengths) and the score of their sum; resampling adds the counts up anew, so
an interval is one of the corpus score. Its defaults hold: BLEU with tokenizer 13a and exponential smoothing, chrF2 with character
6-grams; rows may differ in their number of references (chrF takes the best of each row). sacrebleu keeps counts behind methods whose
names begin with an underscore; a test holds them to its public corpus_score.
"""

from __future__ import annotations

import numpy as np

from .base import Metric, metric


class _Sacrebleu(Metric):
    kind = ""

    def __init__(self, options=None):
        import sacrebleu

        super().__init__(options)
        self.judge = getattr(sacrebleu, self.kind)()

    def usable(self, row):
        return bool(row.get("compared_references"))

    def statistics(self, rows):
        width = max(len(row["compared_references"]) for row in rows)
        columns = [[(row["compared_references"] + [None] * width)[k] for row in rows] for k in range(width)]
        counts = self.judge._extract_corpus_statistics([row["compared"] or "" for row in rows], columns)
        return np.array(counts, dtype=np.float64)

    def scores(self, sums):
        values = [self.judge._compute_score_from_stats(line.astype(np.int64).tolist()).score for line in sums.reshape(-1, sums.shape[-1])]
        return {self.name: np.array(values).reshape(sums.shape[:-1])}


@metric("bleu", package="sacrebleu", summary="BLEU of sacrebleu (13a, exponential smoothing), 0 to 100")
class Bleu(_Sacrebleu):
    kind = "BLEU"


@metric("chrf", package="sacrebleu", summary="chrF2 of sacrebleu, 0 to 100")
class Chrf(_Sacrebleu):
    kind = "CHRF"
