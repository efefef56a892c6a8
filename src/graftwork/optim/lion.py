"""Lion (arXiv 2302.06675): the sign of an interpolation between momentum and gradient.

    W <- (1 - lr wd) W;   W <- W - lr sign(b1 M + (1 - b1) G);   M <- b2 M + (1 - b2) G

State mn, half of Adam's. Every entry moves by lr, so lr is 3 to 10 times smaller than Adam's and wd as much larger.
Departure: state of bfloat16 weights is float32 by default.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ..registry import register
from .base import Betas, CommonConfig, Slots, kept_dtype
from .plain import PlainOptimizer


class Lion(CommonConfig):
    """Options of Lion."""

    lr: float = Field(1e-4, ge=0, description="learning rate")
    betas: Betas = Field((0.9, 0.99), description="weight of the momentum in the update, and its decay")


@register("optimizer", "lion", config=Lion, title="Lion", paper="2302.06675",
          summary="sign of the momentum: one buffer per weight, every entry moves by lr",
          bibtex="@inproceedings{chen2023symbolic, title={Symbolic Discovery of Optimization Algorithms}, author={Chen, Xiangning "
                 "and Liang, Chen and Huang, Da and Real, Esteban and Wang, Kaiyuan and Pham, Hieu and Dong, Xuanyi and Luong, "
                 "Thang and Hsieh, Cho-Jui and Lu, Yifeng and Le, Quoc V.}, booktitle={NeurIPS}, year={2023}}",
          projects=False, fused_capable=True, reads="gradient")
class LionOptimizer(PlainOptimizer):
    """Lion on tensors of any shape."""

    @classmethod
    def slots(cls, config: Lion, shape: tuple[int, ...], dtype: torch.dtype, role: str) -> Slots:
        return {"exp_avg": (shape, kept_dtype(dtype, config))}

    @classmethod
    def elementwise(cls, config: Lion, shape: tuple[int, ...], role: str) -> bool:
        return True

    def move(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any], step: int) -> None:
        b1, b2 = self.config.betas
        momentum = state["exp_avg"]
        weight.add_(torch.lerp(grad, momentum, b1).sign_(), alpha=-group["lr"])
        momentum.lerp_(grad, 1.0 - b2)
