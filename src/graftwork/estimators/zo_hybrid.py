"""Hybrid of zeroth and first order (arXiv 2402.11592): backpropagation through the last layers only, MeZO for what lies before them.

    theta = (phi, psi)     psi: the last `layers` layers and what is registered after them (norm, head), or the names of `first_order`
    phi <- phi - zeroth_lr * (mean_q c_q z_q + wd * phi)       c_q = (L(phi + eps z_q, psi) - L(phi - eps z_q, psi)) / (2 eps)
    psi: d L / d psi at the same theta, given to the optimizer

phi takes no part in the graph: it is recorded from the first module that holds a tensor of psi, so activations of the layers below are
freed as in inference, and their weights have no gradients and no optimizer state. 2 n forwards, and a forward with its short backward. A
tensor that the embedding shares with the head comes first in the model and belongs to phi. Names of `first_order` are parts of parameter
names; the graph then begins at the first of them.

The rate of phi is `zeroth_lr` with the schedule of the optimizer. Weight decay of the optimizer and clipping act on psi,
`weight_decay` of this estimator on phi. Dropout acts in the pass with the graph, whose loss is logged, and not between the two that
are compared. State: none. Memory: the forward, the activations and gradients of psi, one piece of a tensor.

The paper describes it in words and the released trainer does not have it: the choice of the parts and of one common theta is made here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import nn

from ..errors import IncompatibleError
from ..modeling.blocks import block_list
from ..registry import MethodConfig, register
from . import mezo
from ._spsa import ZO_BENCH
from .backprop import Backprop, BackpropEstimator
from .base import StepContext, StepResult
from .mezo import MeZOEstimator, Named, evaluating


class ZOHybrid(MethodConfig):
    """Options of `zo_hybrid`; those that mezo has are for the zeroth-order part."""

    zeroth_lr: float = Field(1e-6, gt=0, description="rate of the zeroth-order part; about 1e-6 for full weights, 1e-4 for LoRA")
    eps: float = Field(1e-3, gt=0, description="size of the perturbation; 1e-3 full weights, 1e-2 LoRA")
    n_samples: int = Field(1, ge=1, description="directions averaged per step")
    weight_decay: float = Field(0.0, ge=0, description="of the zeroth-order part")
    layers: int = Field(1, ge=0, description="last layers that are trained by backpropagation; 0: only what follows the layers")
    first_order: list[str] | None = Field(None, min_length=1, description="parts of the names that are, instead of the last layers")


@register("estimator", "zo_hybrid", config=ZOHybrid, paper="2402.11592", title="Hybrid ZO-FO",
          summary="backpropagation through the last layers, MeZO below them: the graph ends early", bibtex=ZO_BENCH)
class ZOHybridEstimator(MeZOEstimator):
    gradients = differentiates = moves_some = True

    def __init__(self, config: ZOHybrid | None = None):
        super().__init__(config or ZOHybrid())
        self.backward = BackpropEstimator(Backprop())

    def step(self, ctx: StepContext) -> StepResult:
        moving = [(n, p) for n, p in ctx.parameters if p.requires_grad]
        chosen = self.first_order(ctx.model, ctx.parameters)
        below = [(n, p) for n, p in moving if n not in chosen]
        coefficients, result = [], None
        if below:
            with torch.no_grad(), evaluating(ctx.model):
                coefficients, loss, rows = self.measure(ctx, below)
                result = StepResult(loss.float(), {}, rows)
        if len(below) < len(moving):  # else a selection has frozen all of psi for now
            for _, p in below:
                p.requires_grad_(False)
            try:
                result = self.backward.step(ctx)
            finally:
                for _, p in below:
                    p.requires_grad_(True)
        mezo.update(below, ctx.seed, ctx.step, coefficients, self.config.zeroth_lr * schedule(ctx.optimizer), self.config.weight_decay)
        names = ["projected_gradient", *(f"projected_gradient_{i}" for i in range(1, len(coefficients)))]
        result.metrics = {**result.metrics, **dict(zip(names, coefficients))}
        return result

    def first_order(self, model: nn.Module, trained: Named) -> set[str]:
        """Names of psi. Raises IncompatibleError when nothing of what is trained belongs to it."""
        parts = self.config.first_order
        if parts is not None:
            found = {n for n, _ in trained if any(part in n for part in parts)}
        else:
            late = after(model, self.config.layers)
            found = {n for n, p in trained if id(p) in late}
        if not found:
            raise IncompatibleError(f"zo_hybrid: nothing that is trained {'has such a name' if parts else 'is in the last layers'}",
                                    remedy="estimator: mezo, or other layers (estimator.layers, estimator.first_order)")
        return found


def after(model: nn.Module, layers: int) -> set[int]:
    """Ids of the parameters from the last `layers` blocks on, in the model's order; a tensor counts where it occurs first."""
    blocks = block_list(model, least=2)
    if not blocks:
        raise IncompatibleError("zo_hybrid finds no stack of layers in this model", remedy="name the parts: estimator.first_order: [...]")
    order = [id(p) for p in model.parameters()]
    position = {p: at for at, p in enumerate(order)}
    last = blocks[max(0, len(blocks) - layers):] or blocks[-1:]
    places: Sequence[int] = [position[id(p)] for block in last for p in block.parameters()]
    return set(order[min(places):] if layers else order[max(places) + 1:])


def schedule(optimizer: torch.optim.Optimizer | None) -> float:
    """The optimizer's rate over its own peak."""
    group = optimizer.param_groups[0] if optimizer is not None else {}
    peak = (group.get("base_lr") or 0.0) * group.get("lr_scale", 1.0)
    return group["lr"] / peak if peak else 1.0
