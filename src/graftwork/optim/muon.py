"""Muon (K. Jordan et al. 2024): momentum of a matrix with its singular values brought near 1; AdamW for everything else.

    B <- mu B + (1 - mu) G;   U = (1 - mu) G + mu B (nesterov) or B;   O = NS(U);   f = sqrt(max(1, m / n)) or 0.2 sqrt(max(m, n))
    W <- (1 - lr wd) W;   W <- W - lr f O

    NS(U): X = U / ||U||_F (transposed if m > n), then ns_steps times  A = X X^T,  X <- a X + (b A + c A A) X

with (a, b, c) = (3.4445, -4.7750, 2.0315), a polynomial that does not converge to 1 but throws singular values quickly into about
[0.7, 1.2]; very small ones stay below. O does not depend on the size of G, so every matrix moves by an RMS of about
f / sqrt(max(m, n)). The second f (arXiv 2502.16982) makes that AdamW's usual 0.2, and with it AdamW's learning rates.

State mn; 2 numel for embeddings, head and vectors, which get AdamW at lr * other_lr_scale. Weights and buffers equal those of
torch.optim.Muon bit for bit in float32, where the processor has bfloat16 products (elsewhere they are computed in float32 and
rounded, 20 times as fast). Departures: no decay unless asked; the gradient is not overwritten; `ns_dtype: float32` rounds nothing.
Made for the full matrices of a model: a LoRA factor is orthogonalized as well, which its authors do not study.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..modeling.arithmetic import product_dtype
from ..registry import register
from .base import Betas, OptimizerConfig, Slots, kept_dtype
from .plain import PlainOptimizer
from .rules import adamw_any_

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_LEAST_NORM = 1e-7


class Muon(OptimizerConfig):
    """Options of Muon; names of torch.optim.Muon. betas and eps are AdamW's, for what is no matrix of a block."""

    lr: float = Field(0.02, ge=0, description="learning rate of the matrices")
    momentum: float = Field(0.95, ge=0, lt=1, description="decay of the momentum")
    nesterov: bool = Field(True, description="look ahead along the momentum")
    ns_steps: int = Field(5, ge=1, le=99, description="Newton-Schulz iterations")
    ns_dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="arithmetic of the iterations")
    adjust_lr_fn: Literal["original", "match_rms_adamw"] = Field(
        "original", description="factor on lr by shape: sqrt(max(1, m / n)), or 0.2 sqrt(max(m, n)) for AdamW's rates")
    other_lr_scale: float = Field(0.015, ge=0, description="AdamW's learning rate over lr")
    betas: Betas = Field((0.9, 0.95), description="of AdamW")
    eps: float = Field(1e-10, ge=0, description="of AdamW")


@register("optimizer", "muon", config=Muon, title="Muon",
          summary="orthogonalized momentum for the matrices of the blocks, AdamW for the rest; one buffer per weight",
          bibtex="@misc{jordan2024muon, title={Muon: An Optimizer for Hidden Layers in Neural Networks}, author={Jordan, Keller "
                 "and Jin, Yuchen and Boza, Vlado and You, Jiacheng and Cesista, Franz and Newhouse, Laker and Bernstein, "
                 "Jeremy}, year={2024}, url={https://kellerjordan.github.io/posts/muon/}}",
          projects=False, fused_capable=True, reads="gradient")
class MuonOptimizer(PlainOptimizer):
    """Muon for matrices of role linear with both dimensions above 1, AdamW for the others."""

    @classmethod
    def slots(cls, config: Muon, shape: tuple[int, ...], dtype: torch.dtype, role: str) -> Slots:
        kept = kept_dtype(dtype, config)
        if _is_matrix(shape, role):
            return {"momentum_buffer": (shape, kept)}
        return {"exp_avg": (shape, kept), "exp_avg_sq": (shape, kept)}

    @classmethod
    def elementwise(cls, config: Muon, shape: tuple[int, ...], role: str) -> bool:
        return not _is_matrix(shape, role)

    def update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        others, states = [], []
        for p in params:
            if _is_matrix(tuple(p.shape), group["role"]):
                self.update_one(group, p, p.grad)
                continue
            state, clock = self.prepare(group, p)
            clock.step += 1
            others.append(p)
            states.append(state)
        if others:
            adamw_any_(others, [p.grad for p in others], *([s[k] for s in states] for k in ("exp_avg", "exp_avg_sq", "step")),
                       lr=group["lr"] * self.config.other_lr_scale, betas=self.config.betas, eps=self.config.eps,
                       weight_decay=group["weight_decay"])

    def move(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any], step: int) -> None:
        config, (m, n) = self.config, weight.shape
        momentum = state["momentum_buffer"].lerp_(grad, 1.0 - config.momentum)
        update = torch.lerp(grad, momentum, config.momentum) if config.nesterov else momentum
        factor = math.sqrt(max(1.0, m / n)) if config.adjust_lr_fn == "original" else 0.2 * math.sqrt(max(m, n))
        update = orthogonalized(update.to(getattr(torch, config.ns_dtype), copy=True), config.ns_steps)
        weight.add_(update, alpha=-group["lr"] * factor)


def _is_matrix(shape: tuple[int, ...], role: str) -> bool:
    return role == "linear" and len(shape) == 2 and min(shape) > 1


def orthogonalized(x: Tensor, steps: int) -> Tensor:
    """NS of a matrix, in its dtype; x is overwritten.

    Where the processor has no products in this dtype, they are computed in float32 and each result is rounded to it."""
    a, b, c = _COEFFICIENTS
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x  # so that X X^T is the smaller of the two products
    dtype, wide = x.dtype, product_dtype(x.dtype, x.device)
    x = x.div_(x.norm().clamp(min=_LEAST_NORM)).to(wide)
    for _ in range(steps):
        gram = _rounded(x @ x.T, dtype)
        x = _rounded(torch.addmm(x, _rounded(torch.addmm(gram, gram, gram, beta=b, alpha=c), dtype), x, beta=a), dtype)
    return (x.T if tall else x).to(dtype)


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x with numbers of `dtype`, itself of its own."""
    return x if x.dtype == dtype else x.copy_(x.to(dtype))
