"""SGD with (Nesterov) momentum (Sutskever et al., ICML 2013), in the form of torch.optim.SGD.

    W <- (1 - lr wd) W;   B <- mu B + G;   W <- W - lr B        (nesterov: W <- W - lr (G + mu B);   mu = 0: W <- W - lr G)

State mn with momentum, none without. Weights and buffers are equal bit for bit to `torch.optim.SGD(fused=True)`, whose kernel this
uses. Departures: decay is decoupled as in the other optimizers here, `coupled_decay` adds wd W to G as torch does; no dampening.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..registry import register
from .base import BaseOptimizer, CommonConfig, Slots, kept_dtype
from .rules import sgd_any_


class SGD(CommonConfig):
    """Options of SGD; names of torch.optim.SGD."""

    lr: float = Field(1e-2, ge=0, description="learning rate")
    momentum: float = Field(0.9, ge=0, lt=1, description="0: no momentum and no state")
    nesterov: bool = Field(False, description="look ahead along the momentum")
    coupled_decay: bool = Field(False, description="weight decay goes through the momentum, as in torch.optim.SGD")

    @model_validator(mode="after")
    def _nesterov_has_momentum(self):
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs momentum above 0")
        return self


@register("optimizer", "sgd", config=SGD, title="SGD with momentum",
          summary="the gradient, or its running sum; one buffer per weight or none",
          bibtex="@inproceedings{sutskever2013importance, title={On the Importance of Initialization and Momentum in Deep "
                 "Learning}, author={Sutskever, Ilya and Martens, James and Dahl, George and Hinton, Geoffrey}, "
                 "booktitle={ICML}, year={2013}}",
          projects=False, fused_capable=True, reads="gradient")
class SGDOptimizer(BaseOptimizer):
    """SGD on tensors of any shape."""

    @classmethod
    def slots(cls, config: SGD, shape: tuple[int, ...], dtype: torch.dtype, role: str) -> Slots:
        return {"momentum_buffer": (shape, kept_dtype(dtype, config))} if config.momentum else {}

    @classmethod
    def elementwise(cls, config: SGD, shape: tuple[int, ...], role: str) -> bool:
        return True

    def update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        states = []
        for p in params:
            state, clock = self.prepare(group, p)
            clock.step += 1
            states.append(state)
        sgd_any_(params, [p.grad for p in params], [s["momentum_buffer"] for s in states] if self.config.momentum else None,
                 [s["step"] for s in states], lr=group["lr"], momentum=self.config.momentum, nesterov=self.config.nesterov,
                 weight_decay=group["weight_decay"], coupled=self.config.coupled_decay)
