"""Reverse-mode differentiation: the ordinary gradient, accumulated over the micro-batches of a step.

    g = d/dtheta sum_micro sum_rows scale[row] * loss[row]

The scales are those of the whole step (one over all its trained tokens), so accumulating k micro-batches equals one batch
k times as large, also when their token counts differ.
"""

from __future__ import annotations

from ..registry import MethodConfig, register
from .base import Estimator, StepResult, micro_forward


class Backprop(MethodConfig):
    """No options."""


@register("estimator", "backprop", config=Backprop, title="Backpropagation", summary="exact gradients by reverse-mode autograd")
class BackpropEstimator(Estimator):
    def step(self, ctx):
        total, rows, metrics = None, [], {}
        for micro in range(len(ctx.batches)):
            with micro_forward(ctx, micro) as out:
                loss = out.loss
                extra = ctx.graft_losses()
                if extra is not None:
                    loss = loss + extra / len(ctx.batches)
                loss.backward()
            total = out.loss.detach() if total is None else total + out.loss.detach()
            rows.append((out.row_loss, out.row_tokens))
            metrics = out.metrics
        return StepResult(total, metrics, rows)
