"""Reverse-mode differentiation: the ordinary gradient, accumulated over the micro-batches of a step.

    g = d/dtheta sum_micro sum_rows scale[row] * loss[row]

The scales are those of the whole step (one over all its trained tokens), so accumulating k micro-batches equals one batch
k times as large, also when their token counts differ.
"""

from __future__ import annotations

from ..registry import MethodConfig, register
from .base import Estimator, StepContext, StepResult, micro_forward


class Backprop(MethodConfig):
    """No options."""


@register("estimator", "backprop", config=Backprop, title="Backpropagation", summary="exact gradients by reverse-mode autograd")
class BackpropEstimator(Estimator):
    def step(self, ctx):
        total, rows, metrics = None, [], {}
        for micro in range(len(ctx.batches)):
            loss, row, metrics = self._accumulate(ctx, micro)
            total = loss if total is None else total + loss
            rows.append(row)
        return StepResult(total, metrics, rows)

    def _accumulate(self, ctx: StepContext, micro: int):
        """One micro-batch, in a call of its own: a loss that is still named keeps its graph, and with it what blocks recomputed, alive
        through the next forward pass."""
        with micro_forward(ctx, micro) as out:
            loss = out.loss
            extra = ctx.graft_losses()
            if extra is not None:
                loss = loss + extra / len(ctx.batches)
            loss.backward()
        return out.loss.detach(), (out.row_loss, out.row_tokens), out.metrics
