"""8-bit AdamW (arXiv 2110.02861): Adam's moments in blocks of 256 codes, read, updated in float32 and coded again.

    M = D(codes), V = D(codes);   W <- (1 - lr wd) W;   M <- b1 M + (1 - b1) G;   V <- b2 V + (1 - b2) G^2
    W <- W - lr / (1 - b1^t) * M / (sqrt(V / (1 - b2^t)) + eps);   codes <- Q(M), Q(V)

with the signed dynamic map for M, the unsigned one for V (graftwork.modeling.blockwise). W moves by the moments before they are
coded. State 2 mn bytes and 8 ceil(mn / 256); tensors below `min_8bit_size` weights keep `state_dtype`. While a tensor is updated
its two moments exist in float32, so no more than one tensor's at a time.

Departures from bitsandbytes: one code path for every device; exact nearest entries (its CPU code first rounds to a grid without
a 0, which gives every untouched weight a momentum of 1.5e-5 of its block's largest); decay before the update, as in AdamW here.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ..registry import register
from .base import OptimizerConfig, Slots, kept_dtype
from .coded import coded_slots, read_moments, write_moments
from .plain import PlainOptimizer
from .rules import adamw_


class AdamW8bit(OptimizerConfig):
    """Options of 8-bit AdamW; names of bitsandbytes."""

    min_8bit_size: int = Field(4096, ge=0, description="tensors with fewer weights keep state_dtype")


@register("optimizer", "adamw8bit", config=AdamW8bit, title="8-bit AdamW", paper="2110.02861", aliases=("adamw_8bit",),
          summary="AdamW with block-wise 8-bit moments: a quarter of the state",
          bibtex="@inproceedings{dettmers2022optimizers, title={8-bit Optimizers via Block-wise Quantization}, author={Dettmers, "
                 "Tim and Lewis, Mike and Shleifer, Sam and Zettlemoyer, Luke}, booktitle={ICLR}, year={2022}}",
          projects=False, fused_capable=True, reads="gradient")
class AdamW8bitOptimizer(PlainOptimizer):
    """8-bit AdamW on tensors of any shape."""

    @classmethod
    def slots(cls, config: AdamW8bit, shape: tuple[int, ...], dtype: torch.dtype, role: str) -> Slots:
        return coded_slots(shape, kept_dtype(dtype, config), config.min_8bit_size)

    @classmethod
    def elementwise(cls, config: AdamW8bit, shape: tuple[int, ...], role: str) -> bool:
        return True

    def move(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any], step: int) -> None:
        moments = read_moments(state, weight.dtype)
        # The kernel counts steps itself, in a tensor of its own here.
        before = torch.tensor(step - 1.0, dtype=torch.float32, device=weight.device)
        adamw_([weight], [grad], *([moment] for moment in moments.values()), [before], lr=group["lr"], betas=self.config.betas,
               eps=self.config.eps, weight_decay=0.0)
        write_moments(state, moments)
