"""COSMOS (arXiv 2502.17410): Adam in the leading eigenspace of E[G^T G], orthogonalized momentum (Muon) on all the rest.

W (m, n); U (n, r), S (r, r); c1 = (1 - b1^t) / (1 - b1), c2 = 1 - b2^t; the subspace takes one step of a power iteration a step:

    M <- b1 M + G;   g = (G + b1 M) / (1 + b1 c1)  (nesterov), or M / c1
    t = 1:  U = top r right singular vectors of G,  S = (1 - b2) U^T G^T G U
    t > 1:  U' = QR(b2 U S + (1 - b2) G^T G U),  S <- b2 (U^T U')^T S (U^T U') + (1 - b2) (G U')^T G U',  U <- U'
    V <- b2 V + (1 - b2) (G U)^2  (m, r);   A = [g U / (sqrt(V / c2) + eps)] U^T
    B = orthogonalized(g - g U U^T);   D = A + gamma sqrt(mn) B / ||B||
    W <- (1 - lr wd) W - lr lr_ratio sqrt(mn) D / ||D||

So each step has the root mean square lr * lr_ratio. State mn + mr + nr + r^2; tensors that are not matrices of linear maps get
AdamW at the full lr. Orthogonalization: 5 Newton-Schulz iterations, which bring singular values near 1 (0.7 to 1.2), in bfloat16
or float32 (`newton_schulz`).

Departures from the reference code: the decay of the momentum inside the Adam part is b1 as in the paper's equations, not 0.9
whatever b1 is; tall matrices (over 10 000 rows) are not silently left to Adam, roles decide instead; the gradient is not
overwritten; U is kept in float32 at least, since each step builds on the last. U is on the input side of a weight stored
(out, in); in GPT-2's Conv1D, stored (in, out), it is on the output side.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..registry import register
from .base import BaseOptimizer, OptimizerConfig, Slots, kept_dtype, work_dtype
from .muon import orthogonalized
from .rules import adamw_any_
from .subspace import Subspace, top_vectors

ITERATIONS = 5  # of Newton-Schulz


class EigenSubspace(Subspace):
    """U of the equations, kept transposed as the right basis (r, n), and its eigenvalue matrix S: moved on by every step."""

    def __init__(self, rank: int, decay: float):
        super().__init__(rank, 1, "right")
        self.decay = decay

    def slots(self, shape: tuple[int, ...], dtype: torch.dtype) -> Slots:
        exact, r = torch.promote_types(dtype, torch.float32), self.rank_for(shape)
        return {**self._basis_slots(shape, exact), "spectrum": ((r, r), exact)}

    def advance(self, grad: Tensor, state: dict[str, Tensor], first: bool) -> tuple[Tensor, Tensor]:
        """The new U (n, r) and G U (m, r)."""
        b2 = self.decay
        if first:
            u = top_vectors(grad, self.rank_for(grad.shape), None)[1].T
            seen = grad @ u
            s = (1.0 - b2) * seen.T @ seen
        else:
            old, s = state["projection_right"].to(grad.dtype).T, state["spectrum"].to(grad.dtype)
            u = torch.linalg.qr(b2 * old @ s + (1.0 - b2) * grad.T @ (grad @ old))[0]
            turn, seen = old.T @ u, grad @ u
            s = b2 * turn.T @ s @ turn + (1.0 - b2) * seen.T @ seen
        state["projection_right"].copy_(u.T)
        state["spectrum"].copy_(s)
        return u, seen


class Cosmos(OptimizerConfig):
    """Options of COSMOS; names of the reference code."""

    rank: int = Field(64, ge=1, description="size of the eigenspace with second moments, cut to min(m, n)")
    gamma: float = Field(0.2, ge=0, description="weight of the orthogonalized part")
    lr_ratio: float = Field(0.1, gt=0, description="rate of matrices over the rate of all else")
    nesterov: bool = Field(True, description="look one momentum step ahead")
    newton_schulz: Literal["bfloat16", "float32"] = Field("bfloat16", description="arithmetic of the orthogonalization")


@register("optimizer", "cosmos", config=Cosmos, title="COSMOS", paper="2502.17410",
          summary="Adam in the leading eigenspace of the gradient, Muon on the rest; half of AdamW's state and a little",
          bibtex="@article{liu2025cosmos, title={COSMOS: A Hybrid Adaptive Optimizer for Memory-Efficient Training of LLMs}, "
                 "author={Liu, Liming and Xu, Zhenghao and Zhang, Zixuan and Kang, Hao and Li, Zichong and Liang, Chen and "
                 "Chen, Weizhu and Zhao, Tuo}, journal={arXiv:2502.17410}, year={2025}}",
          projects=False, fused_capable=True, reads="gradient")
class CosmosOptimizer(BaseOptimizer):
    """Eigenspace, Adam inside, Newton-Schulz outside, one norm for both."""

    @classmethod
    def subspace(cls, config: Cosmos) -> EigenSubspace:
        return EigenSubspace(config.rank, config.betas[1])

    @classmethod
    def slots(cls, config: Cosmos, shape: tuple[int, ...], dtype: torch.dtype, role: str) -> Slots:
        subspace, kept = cls.subspace(config), kept_dtype(dtype, config)
        if not subspace.accepts(shape, role):
            return {"exp_avg": (shape, kept), "exp_avg_sq": (shape, kept)}
        return {"exp_avg": (shape, kept), "exp_avg_sq": (subspace.low_shape(shape), kept), **subspace.slots(shape, kept)}

    @classmethod
    def elementwise(cls, config: Cosmos, shape: tuple[int, ...], role: str) -> bool:
        return not cls.subspace(config).accepts(shape, role)

    def update_one(self, group: dict[str, Any], p: Tensor, grad: Tensor) -> None:
        config, subspace = self.config, self.subspace(self.config)
        state, clock = self.prepare(group, p)
        clock.step += 1
        if not subspace.accepts(tuple(p.shape), group["role"]):
            adamw_any_([p], [grad], [state["exp_avg"]], [state["exp_avg_sq"]], [state["step"]], lr=group["lr"],
                       betas=config.betas, eps=config.eps, weight_decay=group["weight_decay"])
            return
        state["step"].add_(1)
        work = work_dtype(p.dtype)
        direction = self._direction(grad.to(work), state, clock.step, subspace)
        weight = p.to(work)
        weight.mul_(1.0 - group["lr"] * group["weight_decay"])
        weight.add_(_to_norm(direction, math.sqrt(p.numel()), config.eps), alpha=-group["lr"] * config.lr_ratio)
        if weight is not p:
            p.copy_(weight)

    def _direction(self, grad: Tensor, state: dict[str, Tensor], step: int, subspace: EigenSubspace) -> Tensor:
        config, (b1, b2) = self.config, self.config.betas
        momentum = state["exp_avg"].to(grad.dtype).mul_(b1).add_(grad)
        if momentum is not state["exp_avg"]:
            state["exp_avg"].copy_(momentum)
        c1 = (1.0 - b1 ** step) / (1.0 - b1)
        ahead = (grad + b1 * momentum) / (1.0 + b1 * c1) if config.nesterov else momentum / c1
        u, seen = subspace.advance(grad, state, step == 1)
        second = state["exp_avg_sq"].to(grad.dtype)
        second.mul_(b2).addcmul_(seen, seen, value=1.0 - b2)
        if second is not state["exp_avg_sq"]:
            state["exp_avg_sq"].copy_(second)
        low = ahead @ u                                                              # (m, r)
        inside = (low / ((second / (1.0 - b2 ** step)).sqrt() + config.eps)) @ u.T   # A (m, n)
        if not config.gamma:
            return inside
        outside = torch.addmm(ahead, low, u.T, alpha=-1.0).to(getattr(torch, config.newton_schulz))
        outside = orthogonalized(outside, ITERATIONS).to(grad.dtype)
        return inside.add_(_to_norm(outside, math.sqrt(grad.numel()), config.eps), alpha=config.gamma)


def _to_norm(x: Tensor, norm: float, eps: float) -> Tensor:
    return x * (norm / (torch.linalg.vector_norm(x) + eps))
