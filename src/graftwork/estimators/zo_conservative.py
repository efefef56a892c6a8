"""ZO-SGD-Cons (arXiv 2402.11592): a zeroth-order step that is kept only if it helps.

    g as in `_spsa.py`      theta <- the best of theta, theta - lr g, theta + lr g by the loss on the batch of the step

Three forwards more than zo_sgd per block. Weight decay acts whatever is chosen and takes no part in the comparison; ties stay.
The losses of the three are metrics, and which won: 1 descent, 0 stay, -1 ascent. State: none. Memory: the forward and one piece.

Differs from the official code: the trials are moves along g and nothing else (there each is a step of the optimizer, so that
momentum and decay of the trials remain in what is kept). A loss that is not finite is never chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import register
from . import mezo
from ._spsa import SPSA, ZO_BENCH, SPSAEstimator
from .base import StepContext, StepResult
from .mezo import Named, perturbed_modules


class ZOConservative(SPSA):
    """Options of `zo_conservative`."""


@register("estimator", "zo_conservative", config=ZOConservative, paper="2402.11592", title="ZO-SGD-Cons",
          summary="zeroth-order SGD that keeps the best of staying, stepping and stepping back; five forwards",
          bibtex=ZO_BENCH)
class ZOConservativeEstimator(SPSAEstimator):
    """Difference -> g -> the best of three."""

    def step(self, ctx: StepContext) -> StepResult:
        self.chosen: list[tuple[Tensor, Tensor]] = []  # of this step, for its metrics
        result = super().step(ctx)
        losses = torch.stack([three for three, _ in self.chosen]).mean(0)
        names = ("loss_stay", "loss_descent", "loss_ascent")
        sign = torch.stack([sign for _, sign in self.chosen]).mean()
        result.metrics = {**result.metrics, **dict(zip(names, losses)), "kept": sign}
        return result

    def move(self, ctx: StepContext, moving: Named, coefficients: list[Tensor]) -> None:
        in_place, in_forward = self.split(ctx, moving)
        rate, n = self.rate(ctx), len(coefficients)

        def along(factor: float) -> list:
            return [((ctx.seed, ctx.step, q), c * (factor * rate / n)) for q, c in enumerate(coefficients)]

        losses = [self._loss(ctx)[0]]
        for factor in (-1, 1):
            self.shift(in_place, along(factor))
            with perturbed_modules(ctx.model, in_forward, self.add, along(factor)):
                losses.append(self._loss(ctx)[0])
            self.shift(in_place, along(-factor))
        three = torch.stack(losses)
        best = torch.nan_to_num(three, nan=torch.inf).argmin()
        sign = torch.tensor([0.0, 1.0, -1.0], dtype=three.dtype, device=three.device).index_select(0, best.reshape(1))[0]
        self.chosen.append((three, sign))
        mezo.update(moving, ctx.seed, ctx.step, [c * sign for c in coefficients], rate, self.config.weight_decay)
