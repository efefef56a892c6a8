"""CAME (arXiv 2307.02047): Adafactor with a first moment, each entry of which counts by how steady its updates are.

For G (m, n), with Adafactor's factored average F[name](X) = r c^T / mean(r) of X and fixed decays b1, b2, b3:

    U = G / sqrt(F[exp_avg_sq](G^2 + eps1));   U <- U / max(1, rms(U) / clip_threshold)
    M <- b1 M + (1 - b1) U                                    first moment, dense
    N = M / sqrt(F[exp_avg_res]((U - M)^2 + eps2))            (U - M)^2 is the instability: what M does not say of U
    W <- W - lr N                                             other shapes: the last two dimensions are factored; vectors N = M

State mn + 2 (m + n); a vector keeps V and M whole. Order and numbers are those of the authors' package, which (as here) corrects no
bias and leaves vectors without the confidence factor; its unused per-tensor RMS is not kept.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from ..registry import register
from .adafactor import clip_rms_, factored_slots, over_root
from .base import CommonConfig, Slots, below_one, kept_dtype
from .plain import PlainOptimizer


class CAME(CommonConfig):
    """Options of CAME; names of came-pytorch."""

    betas: Annotated[tuple[float, float, float], AfterValidator(below_one)] = Field(
        (0.9, 0.999, 0.9999), description="decay of the first moment, of the second moment and of the instability")
    eps: tuple[float, float] = Field((1e-30, 1e-16), description="added to G^2 and to the instability")
    clip_threshold: float = Field(1.0, gt=0, description="largest rms of an update before the first moment")


@register("optimizer", "came", config=CAME, title="CAME: Confidence-guided Adaptive Memory Efficient Optimization",
          paper="2307.02047", summary="Adafactor with a first moment weighed by its instability: half of Adam's state",
          bibtex="@inproceedings{luo2023came, title={CAME: Confidence-guided Adaptive Memory Efficient Optimization}, author={Luo, "
                 "Yang and Ren, Xiaozhe and Zheng, Zangwei and Jiang, Zhuo and Jiang, Xin and You, Yang}, booktitle={ACL}, "
                 "year={2023}}",
          projects=False, fused_capable=True, reads="gradient")
class CAMEOptimizer(PlainOptimizer):
    """CAME; tensors with at least two dimensions are factored."""

    @classmethod
    def slots(cls, config: CAME, shape: tuple[int, ...], dtype: torch.dtype, role: str) -> Slots:
        kept = kept_dtype(dtype, config)
        if len(shape) < 2:
            return {"exp_avg": (shape, kept), "exp_avg_sq": (shape, kept)}
        return {"exp_avg": (shape, kept), **factored_slots("exp_avg_sq", shape, kept), **factored_slots("exp_avg_res", shape, kept)}

    def move(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any], step: int) -> None:
        (b1, b2, b3), eps = self.config.betas, self.config.eps
        update = over_root(grad, grad.square().add_(eps[0]), state, "exp_avg_sq", b2)
        clip_rms_(update, self.config.clip_threshold)
        moment = state["exp_avg"].mul_(b1).add_(update, alpha=1.0 - b1)
        if grad.ndim >= 2:
            moment = over_root(moment, update.sub_(moment).square_().add_(eps[1]), state, "exp_avg_res", b3)
        weight.sub_(moment * group["lr"])
