"""A metric itself as the objective: accuracy, exact match or F1, for estimators that need values and no derivative.

    loss = sum_i row_scale[row(i)] * (1 - m_i)           so that one minus the mean of m falls

The metric is piecewise constant: its derivative is zero wherever there is one. Zeroth-order estimators compare its values (MeZO, arXiv
2305.17333, section 3.3: (m(theta - eps z) - m(theta + eps z)) / (2 eps) in the place of the difference of losses); estimators that
differentiate are refused. Many rows a step make it finer: with n terms it moves in steps of 1/n, and a perturbation that flips no
prediction moves nothing.

With a causal model (predictions: the most probable token after the true ones before it, at trained positions):
    accuracy      m_i in {0, 1} per token
    exact_match   m_r in {0, 1} per row: all its tokens, which is when greedy decoding writes them
    f1            m_r per row: the overlap of the predicted and the wanted tokens, both as bags. The bags have one size, so precision and
                  recall are one number
With a score head (one label a row):
    accuracy, exact_match    m_r in {0, 1}; a real label (data.format: regression) within 0.5
    f1            macro F1 of the micro-batch, over the classes that occur among its labels or predictions: m_r is the same for its rows

Evaluation reports what `causal_lm` and `classification` report, likelihoods included; early stopping goes by that loss. A prediction
from logits that are not finite has the loss NaN, so that a run that has diverged stops. The logits of `chunk_tokens` positions exist
at a time. Text is not generated: rows that decoding would write differently from the true ones are wrong at their first such token
and are scored on as if it had been right.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.autograd.forward_ad as forward_ad
from pydantic import Field
from torch import Tensor, nn

from ..errors import IncompatibleError
from ..modeling.state import state_of
from ..registry import MethodConfig, register
from . import base
from ._head import hidden_states, output_head
from .base import Batch, LossOutput, Objective, forward_inputs, scale_of, sum_by_row, token_targets, unwrap
from .classification import Classification, ClassificationObjective, _is_verbal, _logits


class Metric(MethodConfig):
    """Options of `metric`."""

    metric: Literal["accuracy", "exact_match", "f1"] = Field("accuracy", description="what is to rise: right tokens (or rows of a score "
                                                             "head), rows that are right as a whole, or F1")
    chunk_tokens: int = Field(256, ge=1, description="positions that go through the output head at once")


@register("objective", "metric", config=Metric, paper="2305.17333", title="A metric as the objective", task="sequence_classification",
          summary="accuracy, exact match or F1 itself, for estimators that need no derivative", differentiable=False, real=True,
          bibtex="@inproceedings{malladi2023mezo, title={Fine-Tuning Language Models with Just Forward Passes}, author={Malladi, "
                 "Sadhika and Gao, Tianyu and Nichani, Eshaan and Damian, Alex and Lee, Jason D. and Chen, Danqi and Arora, "
                 "Sanjeev}, booktitle={NeurIPS}, year={2023}}")
class MetricObjective(Objective):
    def __init__(self, config: Metric | None = None):
        super().__init__(config or Metric())
        self.plain = ClassificationObjective(Classification(chunk_tokens=self.config.chunk_tokens))
        self.by_token = self.config.metric == "accuracy"

    def targets_by_row(self, batch: Batch) -> list[int]:
        words = self.by_token and _is_verbal(batch)
        return self.plain.words.targets_by_row(batch) if words else self.plain.targets_by_row(batch)

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return (self.plain.words if self.by_token and _is_verbal(batch) else self.plain).evaluate(model, batch)

    def loss(self, model: nn.Module, batch: Batch, row_scale: float | Tensor = 1.0) -> LossOutput:
        """batch: as in classification. Raises IncompatibleError where a derivative is being taken."""
        if torch.is_grad_enabled() or forward_ad._current_level >= 0:
            raise IncompatibleError("a metric has no derivative that could be followed", remedy="estimator: mezo, or objective: causal_lm")
        terms, counts = (self._of_words if _is_verbal(batch) else self._of_labels)(model, batch)
        scale = scale_of(row_scale, torch.arange(terms.shape[0], device=terms.device))
        return LossOutput((terms * scale).sum(), terms, counts)

    def _of_labels(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """(1 - m (N,), ones (N,)) with a score head."""
        logits, labels = _logits(model, batch), batch["labels"]
        self.plain._terms(logits, labels, 0.0)  # whether labels and head belong together
        real = labels.is_floating_point()
        if real and self.config.metric == "f1":
            raise IncompatibleError("real labels have no classes, and F1 is over classes", remedy="objective.metric: accuracy")
        top, predicted = logits.max(-1)
        right = (logits[:, 0] - labels).abs() < 0.5 if real else predicted == labels
        terms = 1.0 - right.float()
        if self.config.metric == "f1":
            classes = torch.arange(logits.shape[1], device=labels.device)
            chosen, wanted = predicted[:, None] == classes, labels[:, None] == classes
            both = (chosen.sum(0) + wanted.sum(0)).float()
            scores = 2 * (chosen & wanted).sum(0) / both.clamp_min(1)
            terms = (1 - scores.sum() / (both > 0).sum()).expand(labels.shape[0])
        return torch.where(top.isfinite(), terms, torch.nan), torch.ones_like(terms, dtype=torch.int64)

    def _of_words(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """(sum of 1 - m of each row (N,), number of its terms (N,)) with a causal model."""
        rows = batch["input_ids"].shape[0]
        index, wanted = token_targets(batch)
        row = index // batch["input_ids"].shape[1]
        predicted, finite = self._predictions(model, batch, index, row)
        counts = sum_by_row(torch.ones_like(row), row, rows)
        if self.config.metric == "f1":
            hits = overlap(predicted, wanted, row)
        else:
            hits = predicted == wanted
        hits = sum_by_row(torch.where(finite, hits.float(), torch.nan), row, rows)
        if self.by_token:
            return counts - hits, counts
        some = counts > 0
        value = hits / counts.clamp_min(1) if self.config.metric == "f1" else torch.where(hits.isnan(), hits, (hits == counts).float())
        return torch.where(some, 1 - value, 0.0), some.long()

    def _predictions(self, model: nn.Module, batch: Batch, index: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """(most probable tokens (n,), whether their logits are finite (n,)). What a model does to its logits after the head keeps
        their order."""
        hidden, _, _ = hidden_states(model, forward_inputs(batch))
        head, holder = output_head(model), state_of(unwrap(model))
        chosen, found, finite = hidden.reshape(-1, hidden.shape[-1]).index_select(0, index), [], []
        for h, rows in zip(chosen.split(self.config.chunk_tokens), row.split(self.config.chunk_tokens)):
            with holder.tokens(rows), base.logits_scope():
                top, best = head(h).max(-1)
            found.append(best)
            finite.append(top.isfinite())
        return torch.cat(found), torch.cat(finite)


def overlap(predicted: Tensor, wanted: Tensor, row: Tensor) -> Tensor:
    """(n,) bool: whether a predicted token takes part in the overlap of its row's two bags. The
    k-th time that a token is predicted in a row counts if the row wants it at least k times."""
    wide = 1 << 32  # above any token: a key names a row and a token
    keys, order = (row * wide + predicted).sort(stable=True)
    pool = (row * wide + wanted).sort().values
    earlier = torch.arange(len(keys), device=keys.device) - torch.searchsorted(keys, keys)
    available = torch.searchsorted(pool, keys, right=True) - torch.searchsorted(pool, keys)
    return (earlier < available)[torch.argsort(order)]
