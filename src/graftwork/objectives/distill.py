"""Distillation of a frozen teacher's next-token distributions: what undoes the error of a quantised base (LREC of INT2.1, arXiv
2306.08162), and the usual way to learn from a larger model.

With p, q the distributions of teacher and student after the same tokens, at temperature tau, and y the next token,

    term_i = kl tau^2 sum_v p_v (log p_v - log q_v)  +  ce (-log q_y at temperature 1)

summed over trained positions (`data.train_on: all` for every token of plain text). The teacher is the recipe's own `model` with dense
weights, or the one that `teacher` names; it has to have the same vocabulary. It is a second model in memory, in the precision
of the run, and a plan counts it. LREC is this objective over a LoRA on 2-bit codes (examples/recipes/int2_1.yaml); the LoRA stays in 16
bits, and a second one can be trained beside it.

The logits of `chunk_tokens` positions exist at a time, of both models, and are made anew for the backward pass. Reported as `kl` and `ce`:
the means over the terms of a micro-batch. Evaluation reports what `causal_lm` does.

Departures: INT2.1 sums the KL over tokens but not the cross-entropy, so that its weights of 1 and 200 on rows of 2,048 tokens are `kl: 1,
ce: 0.1` here. The teacher's logits are computed, not read from a cache (10,000 rows of 2,048 tokens would be 1.2 TB). The official code
turns a NaN loss into 0 and steps; here it ends the run.
Oracle: the sum in float64 and its gradient by autograd over whole logits (tests/test_distillation.py).
"""

from __future__ import annotations

import weakref

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import checkpoint

from ..errors import IncompatibleError, UsageError
from ..modeling.state import state_of
from ..registry import MethodConfig, register
from . import base
from ._head import LogitRule, check_rule, hidden_states, output_head
from .base import Batch, LossOutput, Objective, forward_inputs, scale_of, sum_by_row, token_targets, unwrap
from .causal_lm import CausalLM, CausalLMObjective, router_loss


class Distill(MethodConfig):
    teacher: str | None = Field(None, description="model whose distributions are learned; none: the recipe's own, with dense weights")
    kl: float = Field(1.0, ge=0, description="weight of the divergence from the teacher")
    ce: float = Field(0.1, ge=0, description="weight of the next-token loss")
    temperature: float = Field(1.0, gt=0, description="of both distributions in the divergence")
    chunk_tokens: int = Field(128, ge=1, description="positions that go through the output heads at once")

    @model_validator(mode="after")
    def _some(self):
        if not self.kl:
            raise ValueError("kl: 0 would need no teacher; objective: causal_lm")
        return self


@register("objective", "distill", config=Distill, title="Distillation of a teacher's distributions", paper="2306.08162", task="causal_lm",
          teacher=True, aliases=("lrec", "int2_1"),
          summary="KL to a frozen teacher (the dense weights of the same model, or another one) beside the next-token loss",
          bibtex="@article{chai2023int21, title={{INT2.1}: Towards Fine-Tunable Quantized Large Language Models with Error Correction "
                 "through Low-Rank Adaptation}, author={Chai, Yuji and Gkountouras, John and Ko, Glenn G. and Brooks, David and Wei, "
                 "Gu-Yeon}, journal={arXiv:2306.08162}, year={2023}}")
class DistillObjective(Objective):
    """teacher: set by whoever builds the run, before `loss` is called."""

    def __init__(self, config: Distill | None = None):
        super().__init__(config or Distill())
        self.plain = CausalLMObjective(CausalLM(chunk_tokens=self.config.chunk_tokens))
        self.teacher: nn.Module | None = None
        self._checked: weakref.WeakSet = weakref.WeakSet()

    def teach(self, teacher: nn.Module, student: nn.Module) -> None:
        """Take a teacher; it is frozen. Raises IncompatibleError where its vocabulary is another one."""
        sizes = [unwrap(each).config.get_text_config().vocab_size for each in (teacher, student)]
        tokens = [getattr(each, "graft_tokenizer", None) for each in (teacher, student)]
        if sizes[0] != sizes[1] or None not in tokens and tokens[0].get_vocab() != tokens[1].get_vocab():
            raise IncompatibleError(f"the teacher's vocabulary ({sizes[0]} tokens) is not the student's ({sizes[1]})",
                                    remedy="a teacher with the same tokenizer, or none: the model's own dense weights")
        self.teacher = teacher.eval().requires_grad_(False)

    def modules(self) -> list[nn.Module]:
        return [] if self.teacher is None else [self.teacher]

    def targets_by_row(self, batch: Batch) -> list[int]:
        return self.plain.targets_by_row(batch)

    def targets(self, batch: Batch) -> int:
        return self.plain.targets(batch)

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return self.plain.evaluate(model, batch)

    def loss(self, model: nn.Module, batch: Batch, row_scale: float | Tensor = 1.0) -> LossOutput:
        """batch: as for causal_lm."""
        if self.teacher is None:
            raise UsageError("objective distill has no teacher", remedy="call its `teach(model, student)` first")
        inputs = forward_inputs(batch)
        index, targets = token_targets(batch)
        n, width = batch["input_ids"].shape
        with torch.no_grad():
            known, _ = self._chosen(self.teacher, inputs, index)
        hidden, output = self._chosen(model, inputs, index)
        row = index // width
        divergence, plain = self._terms(model, known, hidden, targets, row)
        terms, scale = self.config.kl * divergence + self.config.ce * plain, scale_of(row_scale, row)
        loss, counts = (terms * scale).sum(), sum_by_row(torch.ones_like(row), row, n)
        metrics = {"kl": divergence.detach().mean(), "ce": plain.detach().mean()}
        if (aux := router_loss(model, output)) is not None:
            share = (scale_of(row_scale, torch.arange(n, device=row.device)) * counts).sum()
            loss = loss + aux[0] * share * aux[1].to(loss.device)
            metrics["router_loss"] = aux[1].detach()
        return LossOutput(loss, sum_by_row(terms.detach(), row, n), counts, metrics)

    def _chosen(self, model: nn.Module, inputs: Batch, index: Tensor):
        """(hidden states (n, d) of the trained positions, the model's output)."""
        hidden, output, answer = hidden_states(model, inputs)
        head = output_head(model)
        if head not in self._checked and not isinstance(answer, FakeTensor) and answer.device.type != "meta":
            check_rule(model, LogitRule.of(unwrap(model).config), answer)
            self._checked.add(head)
        return hidden.reshape(-1, hidden.shape[-1]).index_select(0, index), output

    def _terms(self, model: nn.Module, known: Tensor, hidden: Tensor, targets: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """(divergence, next-token loss), (n,) each, from hidden states of teacher and student."""
        (guide, rule), (head, own) = ((output_head(each), LogitRule.of(unwrap(each).config)) for each in (self.teacher, model))
        holder, tau = state_of(unwrap(model)), self.config.temperature
        seed, chunk, parts = holder.current.seed, self.config.chunk_tokens, []

        def part(h: Tensor, t: Tensor, wanted: Tensor, rows: Tensor, start: int) -> Tensor:
            # another seed for each chunk, else a head's dropout would repeat its pattern in all of them
            with holder.tokens(rows), holder.scope(seed=seed + start), base.logits_scope():
                with torch.no_grad():
                    p = torch.log_softmax(rule(guide(t).float()) / tau, -1)
                z = own(head(h).float())
                divergence = tau**2 * F.kl_div(torch.log_softmax(z / tau, -1), p, reduction="none", log_target=True).sum(-1)
                return torch.stack([divergence, F.cross_entropy(z, wanted, reduction="none")])

        for start in range(0, len(hidden), chunk):
            of = slice(start, start + chunk)
            arguments = (hidden[of], known[of], targets[of], row[of], start)
            if torch.is_grad_enabled():
                parts.append(checkpoint(part, *arguments, use_reentrant=False, preserve_rng_state=False,
                                        context_fn=holder.checkpoint_contexts))
            else:
                parts.append(part(*arguments))
        if not parts:  # no target: a zero that still hangs on the graph
            parts.append(hidden.float().sum(-1).expand(2, -1))
        return tuple(torch.cat(parts, 1))
