"""Causal language modelling: the negative log-likelihood of each trained token given the tokens before it.

    loss = sum_{(r, t) trained} row_scale[r] * -log p(x[r, t] | x[r, <t])  (+ router loss)

Only the hidden states of trained positions go through the output head, in chunks (see _head.py), so that the tensor of
all logits (N * T, V), which for small models is the largest of a training step, never exists.

A mixture-of-experts model whose config sets `output_router_logits` adds its load-balancing loss with the config's
coefficient, weighted by this batch's share of the step's tokens: over the micro-batches of a step the weights add up
to one. The load is balanced over padding-free tokens of the whole micro-batch, trained or not, as in Transformers.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..registry import MethodConfig, register
from ._head import LogitRule, check_rule, head_loss, hidden_states, output_head
from .base import Batch, LossOutput, Objective, forward_inputs, scale_of, sum_by_row, token_counts, token_targets, unwrap


class CausalLM(MethodConfig):
    """chunk_tokens: positions that go through the output head at once (memory: chunk_tokens * vocabulary numbers).
    label_smoothing: share of the target's probability that is spread over the vocabulary.
    masked_head: false computes the logits of all positions, as the model itself does."""

    chunk_tokens: int = Field(256, ge=1)
    label_smoothing: float = Field(0.0, ge=0.0, lt=1.0)
    masked_head: bool = True


@register("objective", "causal_lm", config=CausalLM, title="Causal language modelling", task="causal_lm",
          summary="next-token loss on the trained tokens; the output head runs on these only, in chunks")
class CausalLMObjective(Objective):
    def __init__(self, config: CausalLM | None = None):
        super().__init__(config or CausalLM())
        self._checked: weakref.WeakSet = weakref.WeakSet()

    def targets_by_row(self, batch: Batch) -> list[int]:
        return token_counts(batch)

    def targets(self, batch: Batch) -> int:
        return batch["target_index"].shape[0] if "target_index" in batch else super().targets(batch)

    def loss(self, model: nn.Module, batch: Batch, row_scale: float | Tensor = 1.0) -> LossOutput:
        """batch: input_ids (N, T), attention_mask or position_ids, and target_index (n,) with target_ids (n,), or labels
        (N, T). Raises UsageError without targets, IncompatibleError when the model's head cannot be run by itself."""
        loss, terms, _, row, aux = self.terms(model, batch, row_scale, self.config.label_smoothing)
        n = batch["input_ids"].shape[0]
        counts = sum_by_row(torch.ones_like(row), row, n)
        metrics = {}
        if aux is not None:
            coefficient, value = aux
            share = (scale_of(row_scale, torch.arange(n, device=row.device)) * counts).sum()
            loss = loss + coefficient * share * value.to(loss.device)
            metrics["router_loss"] = value.detach()
        return LossOutput(loss, sum_by_row(terms, row, n), counts, metrics)

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            _, terms, correct, row, _ = self.terms(model, batch, 1.0, 0.0, count=True)
            n = batch["input_ids"].shape[0]
            counts = sum_by_row(torch.ones_like(row), row, n)
            right = sum_by_row(correct.long(), row, n)
            return {"loss": terms.double().sum(), "tokens": counts.sum(), "correct": right.sum(), "rows": (counts > 0).sum(),
                    "rows_correct": ((counts > 0) & (right == counts)).sum()}

    def terms(self, model: nn.Module, batch: Batch, row_scale: float | Tensor, smoothing: float, count: bool = False,
              ) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[float, Tensor] | None]:
        """(scaled loss, terms (n,), correct (n,), row (n,) of each term, (coefficient, value) of a router loss)."""
        inputs = forward_inputs(batch)
        index, targets = token_targets(batch)
        row = index // batch["input_ids"].shape[1]
        scale = scale_of(row_scale, row)
        if not self.config.masked_head:
            output = model(**{"use_cache": False, **inputs})
            loss, terms, correct = _all_positions(output.logits, index, targets, scale, smoothing)
            return loss, terms, correct, row, router_loss(model, output)
        rule = LogitRule.of(unwrap(model).config)
        hidden, output, answer = hidden_states(model, inputs)
        head = output_head(model)
        if head not in self._checked and not isinstance(answer, FakeTensor) and answer.device.type != "meta":
            check_rule(model, rule, answer)
            self._checked.add(head)
        chosen = hidden.reshape(-1, hidden.shape[-1]).index_select(0, index)
        loss, terms, correct = head_loss(model, chosen, targets, scale, row, rule=rule, chunk=self.config.chunk_tokens,
                                         smoothing=smoothing, count=count)
        return loss, terms, correct, row, router_loss(model, output)


def _all_positions(logits: Tensor, index: Tensor, targets: Tensor, scale: Tensor, smoothing: float):
    """The loss from the logits (N, T, V) of every position; those that are not trained are ignored."""
    flat = logits.flatten(0, 1).float()
    wanted = torch.full((flat.shape[0],), -100, dtype=torch.int64, device=flat.device).index_copy_(0, index, targets)
    terms = F.cross_entropy(flat, wanted, reduction="none", label_smoothing=smoothing).index_select(0, index)
    with torch.no_grad():
        correct = logits.detach().flatten(0, 1).argmax(-1).index_select(0, index) == targets
    return (terms * scale).sum(), terms.detach(), correct


def router_loss(model: nn.Module, output: Any) -> tuple[float, Tensor] | None:
    value = getattr(output, "aux_loss", None)
    if not isinstance(value, Tensor):
        return None
    config = unwrap(model).config.get_text_config()
    return float(getattr(config, "router_aux_loss_coef", 0.0)), value
