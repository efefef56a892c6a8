"""LOMO (arXiv 2306.09782) and AdaLomo (arXiv 2310.10195): each tensor is updated inside backward and its gradient freed at once.

    LOMO:     W <- (1 - lr wd) W - lr clamp(G, -clip_value, clip_value)                       no state at all
    AdaLomo:  Adafactor's step with scale_parameter: lr max(eps2, rms(W)) U / max(1, rms(U) / clip_threshold)   state m + n

Gradient memory is that of the largest tensor. The step of a tensor needs nothing of the others, so there is neither gradient
accumulation nor clipping by the global norm; `fused: false` gives the same steps from whole gradients, where both are possible.
AdaLomo's own normalization of each update takes the place of clipping.

Departures from the reference package: tied weights are updated once, with the sum of their gradients; no second backward pass
for the global norm, whose cost is a run's time again; no loss scaling, which bfloat16 does not need. `state_dtype` has one value for
LOMO, which has nothing to keep.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..registry import register
from .adafactor import Adafactor, AdafactorOptimizer
from .base import CommonConfig, Slots
from .plain import PlainOptimizer

_FUSED = "update each tensor inside backward and free its gradient at once"


class Lomo(CommonConfig):
    """Options of LOMO."""

    lr: float = Field(1e-2, ge=0, description="learning rate")
    clip_value: float | None = Field(None, gt=0, description="largest size of a gradient's entry; null: no limit")
    state_dtype: Literal["float32"] = Field("float32", description="no effect: there is no state")
    fused: bool = Field(True, description=_FUSED)


class AdaLomo(Adafactor):
    """Options of AdaLomo: Adafactor's, with its defaults."""

    scale_parameter: bool = Field(True, description="multiply the learning rate by the rms of the weight")
    fused: bool = Field(True, description=_FUSED)


@register("optimizer", "lomo", config=Lomo, title="LOMO", paper="2306.09782",
          summary="SGD inside backward: no state, one tensor's gradient at a time",
          bibtex="@inproceedings{lv2024full, title={Full Parameter Fine-tuning for Large Language Models with Limited Resources}, "
                 "author={Lv, Kai and Yang, Yuqing and Liu, Tengxiao and Guo, Qipeng and Qiu, Xipeng}, booktitle={ACL}, year={2024}}",
          projects=False, fused_capable=True, reads="gradient")
class LomoOptimizer(PlainOptimizer):
    """SGD without momentum, fused by default."""

    @classmethod
    def slots(cls, config: Lomo, shape: tuple[int, ...], dtype: torch.dtype, role: str) -> Slots:
        return {}

    @classmethod
    def elementwise(cls, config: Lomo, shape: tuple[int, ...], role: str) -> bool:
        return True

    def move(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any], step: int) -> None:
        limit = self.config.clip_value
        weight.add_(grad if limit is None else grad.clamp(-limit, limit), alpha=-group["lr"])


@register("optimizer", "adalomo", config=AdaLomo, title="AdaLomo", paper="2310.10195",
          summary="Adafactor inside backward, rates relative to each weight: m + n numbers, one tensor's gradient at a time",
          bibtex="@inproceedings{lv2024adalomo, title={AdaLomo: Low-memory Optimization with Adaptive Learning Rate}, author={Lv, "
                 "Kai and Yan, Hang and Guo, Qipeng and Lv, Haijun and Qiu, Xipeng}, booktitle={Findings of ACL}, year={2024}}",
          projects=False, fused_capable=True, reads="gradient")
class AdaLomoOptimizer(AdafactorOptimizer):
    """Adafactor with the presets above."""
