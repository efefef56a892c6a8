"""AdamW (arXiv 1711.05101): Adam with decoupled weight decay, the default for everything that is not projected.

    W <- (1 - lr wd) W;   M <- b1 M + (1 - b1) G;   V <- b2 V + (1 - b2) G^2
    W <- W - lr / (1 - b1^t) * M / (sqrt(V / (1 - b2^t)) + eps)

State 2 mn. Same order as torch.optim.AdamW, through the same fused kernel, so weights and moments are equal bit for bit to
`torch.optim.AdamW(fused=True)` in float32. Departures: state of bfloat16 weights is float32 by default (torch keeps it in
bfloat16, where V stalls: b2 = 0.999 is below its resolution), and parameters without a gradient hold no state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registry import register
from .base import BaseOptimizer, OptimizerConfig, Slots, kept_dtype
from .rules import adamw_any_


class AdamW(OptimizerConfig):
    """Options of AdamW; names and defaults of torch.optim.AdamW, but weight_decay 0 as in Transformers."""


@register("optimizer", "adamw", config=AdamW, title="AdamW", paper="1711.05101",
          summary="Adam with decoupled weight decay; two moments per weight",
          bibtex="@inproceedings{loshchilov2019decoupled, title={Decoupled Weight Decay Regularization}, "
                 "author={Loshchilov, Ilya and Hutter, Frank}, booktitle={ICLR}, year={2019}}",
          projects=False, fused_capable=True, reads="gradient")
class AdamWOptimizer(BaseOptimizer):
    """AdamW on tensors of any shape and float dtype."""

    @classmethod
    def slots(cls, config: AdamW, shape: tuple[int, ...], dtype: torch.dtype, role: str) -> Slots:
        kept = kept_dtype(dtype, config)
        return {"exp_avg": (shape, kept), "exp_avg_sq": (shape, kept)}

    @classmethod
    def elementwise(cls, config: AdamW, shape: tuple[int, ...], role: str) -> bool:
        return True

    def update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        states = []
        for p in params:
            state, clock = self.prepare(group, p)
            clock.step += 1
            states.append(state)
        adamw_any_(params, [p.grad for p in params], *([s[k] for s in states] for k in ("exp_avg", "exp_avg_sq", "step")),
                   lr=group["lr"], betas=self.config.betas, eps=self.config.eps, weight_decay=group["weight_decay"])
