"""Classification of rows.

With a model that has a score head (`AutoModelForSequenceClassification`: BERT and MiniLM, also decoders that score their
last token), logits (N, C) and one label per row:

    term_r = -log softmax(logits_r)[label_r]            integer labels
    term_r = (logits_r - label_r)^2                     floating-point labels, C = 1 (recipes name the objective `regression`)

With a causal model the label is a word or several, the end of the row (its tokens are the trained ones), and

    term_r = -log p(label words_r | text_r) = sum over its tokens,    averaged over rows, not over tokens.

A row is right when each of its tokens is the most probable one, that is when greedy decoding writes the label.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..errors import IncompatibleError, UsageError
from ..registry import MethodConfig, register
from .base import Batch, LossOutput, Objective, forward_inputs, scale_of, unwrap
from .causal_lm import CausalLM, CausalLMObjective


class Classification(MethodConfig):
    """label_smoothing: share of the label's probability that is spread over the classes (with a causal model: over the
    vocabulary). chunk_tokens: as in causal_lm, for causal models."""

    label_smoothing: float = Field(0.0, ge=0.0, lt=1.0)
    chunk_tokens: int = Field(256, ge=1)


@register("objective", "classification", config=Classification, title="Classification", task="sequence_classification",
          summary="cross-entropy of one label per row; label words with a causal model")
class ClassificationObjective(Objective):
    def __init__(self, config: Classification | None = None):
        super().__init__(config or Classification())
        self.words = CausalLMObjective(CausalLM(chunk_tokens=self.config.chunk_tokens,
                                                label_smoothing=self.config.label_smoothing))

    def targets_by_row(self, batch: Batch) -> list[int]:
        if _is_verbal(batch):
            return [int(count > 0) for count in self.words.targets_by_row(batch)]
        return [1] * batch["input_ids"].shape[0]

    def loss(self, model: nn.Module, batch: Batch, row_scale: float | Tensor = 1.0) -> LossOutput:
        """batch: input_ids (N, T), attention_mask, labels (N,) int64 or floating point; or a batch of causal_lm.
        Raises IncompatibleError when model and labels do not belong together, UsageError for labels of another shape."""
        if _is_verbal(batch):
            out = self.words.loss(model, batch, row_scale)
            return LossOutput(out.loss, out.row_loss, (out.row_tokens > 0).long(), out.metrics)
        terms = self._terms(_logits(model, batch), batch["labels"], self.config.label_smoothing)
        scale = scale_of(row_scale, torch.arange(terms.shape[0], device=terms.device))
        return LossOutput((terms * scale).sum(), terms.detach(), torch.ones_like(terms, dtype=torch.int64))

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """As in base; a prediction of a real label counts as right within 0.5 (a rounded score)."""
        if _is_verbal(batch):
            sums = self.words.evaluate(model, batch)
            return {**sums, "tokens": sums["rows"], "correct": sums["rows_correct"]}
        with torch.no_grad():
            logits, labels = _logits(model, batch), batch["labels"]
            terms = self._terms(logits, labels, 0.0)
            right = (logits[:, 0] - labels).abs() < 0.5 if labels.is_floating_point() else logits.argmax(-1) == labels
            count, correct = torch.ones_like(right, dtype=torch.int64).sum(), right.sum()
            return {"loss": terms.double().sum(), "tokens": count, "correct": correct, "rows": count, "rows_correct": correct}

    def _terms(self, logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        """(N, C) fp32 and (N,) to (N,)."""
        if labels.shape != logits.shape[:1]:
            raise UsageError(f"classification wants one label per row, labels have the shape {tuple(labels.shape)}")
        if not labels.is_floating_point():
            return F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
        if logits.shape[1] != 1:
            raise IncompatibleError(f"real labels want a model with one output, this one has {logits.shape[1]}",
                                    remedy="load the model with num_labels=1, or make the labels whole numbers")
        return (logits[:, 0] - labels.float()).square()


def _is_verbal(batch: Batch) -> bool:
    """Whether the labels are tokens of the rows themselves."""
    return "target_index" in batch or ("labels" in batch and batch["labels"].shape == batch["input_ids"].shape)


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(**forward_inputs(batch)).logits
    if logits.dim() != 2:
        raise IncompatibleError(f"{type(unwrap(model)).__name__} has no score head for one label per row",
                                remedy="load it as a sequence classifier, or write the labels as completions "
                                       "(data format completion or messages)")
    return logits.float()
