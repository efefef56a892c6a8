"""Metrics of labels: accuracy, F1 (macro, micro, of one label), Matthews' correlation.

For each class k, tp_k, p_k (predicted) and t_k (true) are counted; s is the number of rows. A prediction that is no known label (text of
a generative model) is wrong and belongs to no class.

    accuracy = sum_k tp_k / s
    F1_k     = 2 tp_k / (p_k + t_k)          0 where the class neither occurs nor is predicted (in a resample)
    macro_f1 = mean_k F1_k over the classes that occur or are predicted
    micro_f1 = 2 sum_k tp_k / sum_k (p_k + t_k)
    mcc      = (s c - sum_k p_k t_k) / sqrt((s^2 - sum_k p_k^2) (s^2 - sum_k t_k^2)),   c = sum_k tp_k        (Gorodkin 2004)

mcc counts unknown predictions as one more class, and is 0 where one class only is predicted or true (as scikit-learn has it).
"""

from __future__ import annotations

import numpy as np

from ...errors import UsageError, nearest
from .base import Metric, metric, ratio


class Classes(Metric):
    """Statistics (n, 3 (C + 1)): for each of C classes and for unknown labels one each of tp, p, t. Sparse: three entries a row."""

    def fit(self, rows):
        found = {row["label"] for row in rows} | {row["label_predicted"] for row in rows}
        self.classes = sorted(label for label in found if label is not None)

    def statistics(self, rows):
        from scipy.sparse import csr_array

        place, width = {label: k for k, label in enumerate([*self.classes, None])}, len(self.classes) + 1
        entries = []
        for i, row in enumerate(rows):
            p, t = place[row["label_predicted"]], place[row["label"]]
            entries += [(i, width + p), (i, 2 * width + t), *([(i, p)] if p == t else [])]
        line, column = np.array(entries).T
        return csr_array((np.ones(len(line)), (line, column)), shape=(len(rows), 3 * width))

    def counts(self, sums):
        """(tp, p, t), each (..., C + 1)."""
        return np.split(sums, 3, axis=-1)

    def notes(self, rows):
        unknown = sum(row["label_predicted"] is None for row in rows)
        return [f"{unknown} of {len(rows)} answers are none of the labels {', '.join(self.classes[:8])}: wrong"] if unknown else []


@metric("accuracy", needs=("labels",), summary="share of rows with the right label")
class Accuracy(Classes):
    def scores(self, sums):
        tp, _, t = self.counts(sums)
        return {"accuracy": ratio(tp.sum(-1), t.sum(-1))}


@metric("macro_f1", needs=("labels",), summary="mean F1 over the classes")
class MacroF1(Classes):
    def scores(self, sums):
        tp, p, t = (part[..., :-1] for part in self.counts(sums))
        seen = p + t > 0
        return {"macro_f1": ratio(ratio(2 * tp, p + t, 0.0).sum(-1), seen.sum(-1))}


@metric("micro_f1", needs=("labels",), summary="F1 of the counts of all classes; the accuracy where every answer is a label")
class MicroF1(Classes):
    def scores(self, sums):
        tp, p, t = (part[..., :-1] for part in self.counts(sums))
        return {"micro_f1": ratio(2 * tp.sum(-1), (p + t).sum(-1))}


@metric("f1", needs=("labels",), summary="F1 of one label: --positive, else `1`")
class OneF1(Classes):
    def fit(self, rows):
        super().fit(rows)
        positive = self.options.positive or "1"
        if positive not in self.classes:
            raise UsageError(f"f1: no row has or is given the label '{positive}'{nearest(positive, self.classes)}",
                             remedy=f"--positive LABEL, one of {', '.join(self.classes[:20])}")
        self.place = self.classes.index(positive)

    def scores(self, sums):
        tp, p, t = (part[..., self.place] for part in self.counts(sums))
        return {"f1": ratio(2 * tp, p + t, 0.0)}


@metric("mcc", needs=("labels",), summary="Matthews' correlation, any number of classes")
class Matthews(Classes):
    def scores(self, sums):
        tp, p, t = self.counts(sums)
        s = t.sum(-1)
        above = s * tp.sum(-1) - (p * t).sum(-1)
        below = (s**2 - (p**2).sum(-1)) * (s**2 - (t**2).sum(-1))
        return {"mcc": ratio(above, np.sqrt(np.maximum(below, 0.0)), 0.0)}

    def notes(self, rows):
        flat = [what for what, key in (("all rows have", "label"), ("all answers are", "label_predicted"))
                if len({row[key] for row in rows}) == 1]
        return [*super().notes(rows), *([f"mcc is 0 by convention: {' and '.join(flat)} one label"] if flat else [])]
