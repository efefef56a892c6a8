"""Regression: one real number per row, or per pair of texts, as STS-B has them.

The model has a score head with one output (`AutoModelForSequenceClassification` with num_labels 1 and problem_type "regression": an
encoder, or a decoder that scores its last token). With output y_r and label t_r

    term_r = (y_r - t_r)^2,    averaged over rows

computed in fp32. The labels are learned as they are given: neither scaled nor cut to a range.

Evaluation: loss (mean squared error), rmse, and Pearson's correlation over all rows, from sums in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..errors import IncompatibleError, UsageError
from ..registry import MethodConfig, register
from .base import Batch, LossOutput, Objective, scale_of
from .classification import _is_verbal, _logits


class Regression(MethodConfig):
    """No options."""


@register("objective", "regression", config=Regression, title="Regression", task="sequence_classification", real=True, format="regression",
          summary="squared error of one real number per row (STS-B), by a score head with one output")
class RegressionObjective(Objective):
    def __init__(self, config: Regression | None = None):
        super().__init__(config or Regression())

    def targets_by_row(self, batch: Batch) -> list[int]:
        return [1] * batch["input_ids"].shape[0]

    def loss(self, model: nn.Module, batch: Batch, row_scale: float | Tensor = 1.0) -> LossOutput:
        """batch: input_ids (N, T), attention_mask, labels (N,). Raises IncompatibleError for a model or labels of another kind, UsageError
        for labels of another shape."""
        scores, labels = self._pairs(model, batch)
        terms = (scores - labels).square()
        scale = scale_of(row_scale, torch.arange(terms.shape[0], device=terms.device))
        return LossOutput((terms * scale).sum(), terms.detach(), torch.ones_like(terms, dtype=torch.int64))

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Sums for `scores`; a prediction counts as right within 0.5."""
        with torch.no_grad():
            scores, labels = (each.double() for each in self._pairs(model, batch))
        gap = scores - labels
        rows, right = torch.ones_like(gap).sum(), (gap.abs() < 0.5).sum()
        return {"loss": gap.square().sum(), "tokens": rows, "correct": right, "rows": rows, "rows_correct": right,
                "score": scores.sum(), "label": labels.sum(), "score_score": scores.square().sum(), "label_label": labels.square().sum(),
                "score_label": (scores * labels).sum()}

    def means(self, sums: dict[str, float]) -> dict[str, float]:
        """loss, rmse, pearson (left out where it is undefined), n."""
        n = max(sums["rows"], 1)
        loss, of_scores, of_labels = sums["loss"] / n, sums["score"] / n, sums["label"] / n
        spread = [sums["score_score"] / n - of_scores**2, sums["label_label"] / n - of_labels**2]
        found = {"loss": loss, "rmse": math.sqrt(loss) if loss >= 0 else loss}
        # differences of sums carry their rounding: a spread below it is none
        if all(s > 1e-12 * max(sums[k] / n, 1e-300) for s, k in zip(spread, ("score_score", "label_label"))):
            found["pearson"] = (sums["score_label"] / n - of_scores * of_labels) / math.sqrt(spread[0] * spread[1])
        return {**found, "n": int(sums["rows"])}

    def _pairs(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """(outputs, labels), both (N,) fp32."""
        if _is_verbal(batch):
            raise IncompatibleError("the labels are tokens of the rows, and regression learns one number a row",
                                    remedy="data.format: regression, or objective: causal_lm")
        logits, labels = _logits(model, batch), batch["labels"]
        if logits.shape[1] != 1:
            raise IncompatibleError(f"real labels want a model with one output, this one has {logits.shape[1]}",
                                    remedy="load it with task='regression', or choose objective: classification")
        if labels.shape != logits.shape[:1]:
            raise UsageError(f"regression wants one label per row, labels have the shape {tuple(labels.shape)}")
        return logits[:, 0], labels.float()
