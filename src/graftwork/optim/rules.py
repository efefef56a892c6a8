"""Rule stage: from a (projected) gradient R to a direction N of the same shape, with what moments.

Adam, as GaLore, APOLLO and Fira use it (the order of the old Transformers AdamW):

    M <- b1 M + (1 - b1) R,   V <- b2 V + (1 - b2) R^2,   N = M / (sqrt(V) + eps),   W <- W - lr c_t N,
    c_t = sqrt(1 - b2^t) / (1 - b1^t)

c_t stays a separate number because residual stages look at the uncorrected N. torch.optim.AdamW adds eps after the bias
correction instead: M / (1-b1^t) / (sqrt(V / (1-b2^t)) + eps'), which equals c_t N for eps' = eps / sqrt(1 - b2^t).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.optim.adamw import adamw as _functional_adamw
from torch.optim.sgd import sgd as _functional_sgd

Moments = Literal["keep", "reset", "rotate"]


def adamw_(params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
           steps: list[Tensor], *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """PyTorch's fused AdamW on lists of tensors of one dtype, in place; increments `steps`.

    Measured on one CPU thread, it takes 0.25 (420 LoRA factors) to 0.13 (16 weights) of the time of the per-tensor loop.
    """
    _functional_adamw(params, grads, exp_avgs, exp_avg_sqs, [], steps, foreach=False, fused=True, amsgrad=False,
                      beta1=betas[0], beta2=betas[1], lr=lr, weight_decay=weight_decay, eps=eps, maximize=False)


def adamw_any_(params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
               steps: list[Tensor], **options) -> None:
    """`adamw_` for any mixture of dtypes."""
    for p, g, m, v, step in in_one_dtype(params, grads, exp_avgs, exp_avg_sqs, beside=steps):
        adamw_(p, g, m, v, step, **options)


def sgd_any_(params: list[Tensor], grads: list[Tensor], momenta: list[Tensor] | None, steps: list[Tensor], *, lr: float,
             momentum: float, nesterov: bool, weight_decay: float, coupled: bool) -> None:
    """PyTorch's fused SGD for any mixture of dtypes, in place; `momenta` None: no momentum. Increments `steps`. `coupled`: decay goes
    through the momentum, else W <- (1 - lr weight_decay) W comes first."""
    for p, g, *m, step in in_one_dtype(params, grads, *([] if momenta is None else [momenta]), beside=steps):
        torch._foreach_add_(step, 1)
        if weight_decay and not coupled:
            torch._foreach_mul_(p, 1.0 - lr * weight_decay)
        _functional_sgd(p, g, m[0] if m else [None] * len(p), foreach=False, fused=True, momentum=momentum, lr=lr, dampening=0.0,
                        weight_decay=weight_decay if coupled else 0.0, nesterov=nesterov, maximize=False)


def in_one_dtype(params: list[Tensor], grads: list[Tensor], *states: list[Tensor], beside: list[Tensor]) -> Iterator[list[list[Tensor]]]:
    """Lists for a kernel that wants contiguous tensors of one dtype: those that fit together, then the others one at a time, in
    float32 (float64) and rounded once after the kernel. `beside` comes along as it is."""
    fitting: dict[torch.dtype, list[tuple[Tensor, ...]]] = {}
    for row in zip(params, grads, *states, beside):
        (p, grad, *rest), dtypes = row[:-1], {t.dtype for t in row[:-1]}
        if len(dtypes) == 1 and p.dtype.itemsize >= 4 and p.is_contiguous() and grad.is_contiguous():
            fitting.setdefault(p.dtype, []).append(row)
            continue
        work = torch.promote_types(p.dtype, torch.float32)
        wide = [t.to(work).contiguous() for t in row[:-1]]
        yield [[t] for t in [*wide, row[-1]]]
        for narrow, t in zip((p, *rest), (wide[0], *wide[2:])):
            if narrow is not t:
                narrow.copy_(t)
    yield from (list(map(list, zip(*rows))) for rows in fitting.values())


class Adam:
    """Two moments of the shape of R, in `dtype`; arithmetic in R's dtype."""

    names = ("exp_avg", "exp_avg_sq")

    def __init__(self, betas: tuple[float, float], eps: float):
        self.betas, self.eps = betas, eps

    def slots(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {name: (shape, dtype) for name in self.names}

    def direction(self, low: Tensor, state: dict[str, Tensor], age: int = 1) -> Tensor:
        """Update the moments with R = `low` and return N, uncorrected, same shape and dtype as R.

        `age` is this update's number since the moments were zero, for rules that correct N themselves.
        """
        b1, b2 = self.betas
        m, v = (state[name].to(low.dtype) for name in self.names)
        m.mul_(b1).add_(low, alpha=1.0 - b1)
        v.mul_(b2).addcmul_(low, low, value=1.0 - b2)
        for name, moment in zip(self.names, (m, v)):
            if moment is not state[name]:
                state[name].copy_(moment)
        return m / v.sqrt().add_(self.eps)

    def correction(self, step: int) -> float:
        """c_t for the `step`-th update, counted from 1."""
        return math.sqrt(1.0 - self.betas[1] ** step) / (1.0 - self.betas[0] ** step)

    def update_plain(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], lr: float, step: int) -> None:
        """W -= lr c_t N without projection, through the fused kernel; `step` counts from 1 and is written to the state."""
        adamw_any_([weight], [grad], [state["exp_avg"]], [state["exp_avg_sq"]], [state["step"]], lr=lr, betas=self.betas,
                   eps=self.eps / math.sqrt(1.0 - self.betas[1] ** step), weight_decay=0.0)

    def change_basis(self, state: dict[str, Tensor], moments: Moments, maps: tuple[Tensor | None, Tensor | None] | None) -> None:
        """Bring the moments along when the subspace changes.

        `maps = (L, R)` with C = Q_old Q_new^T of the left and of the right basis (None where there is none). `rotate` gives
        M <- L^T M R, exact for what the two subspaces share, and V <- (L*L)^T V (R*R): the second moment of a linear
        combination of uncorrelated coordinates. Both undo the arbitrary signs and order of singular vectors exactly.
        """
        if moments == "reset":
            for name in self.names:
                state[name].zero_()
        elif moments == "rotate":
            left, right = maps
            for name, power in zip(self.names, (1, 2)):
                moved = state[name]
                if left is not None:
                    moved = left.pow(power).T @ moved.to(left.dtype)
                if right is not None:
                    moved = moved.to(right.dtype) @ right.pow(power)
                state[name].copy_(moved)
