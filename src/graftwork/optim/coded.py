"""Rule stage whose moments are 8-bit codes: Adam on blocks of 256 codes (arXiv 2110.02861), read and coded again at each step.

A moment x of at least `min_size` numbers is kept as `x_codes`, uint8 of its shape, and `x_absmax`, one float32 per block of 256:
n + 4 ceil(n / 256) bytes (graftwork.modeling.blockwise; signed map for M, unsigned for V). Smaller ones stay in floating point.
The direction is computed from the moments before they are coded, so one step from given codes is Adam's.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..modeling.blockwise import BLOCK, dequantize_blockwise, quantize_blockwise
from .base import Slots
from .rules import Adam, Moments

#: moment -> does it have a sign
MOMENTS = {"exp_avg": True, "exp_avg_sq": False}
State = Literal["dense", "8bit"]


def coded_slots(shape: tuple[int, ...], dtype: torch.dtype, min_size: int) -> Slots:
    """The slots of both moments: codes and block maxima, or `dtype` below `min_size` numbers."""
    size = torch.Size(shape).numel()
    if size < min_size:
        return {name: (shape, dtype) for name in MOMENTS}
    blocks = (-(-size // BLOCK),)
    return {f"{name}_{part}": slot for name in MOMENTS
            for part, slot in (("codes", (shape, torch.uint8)), ("absmax", (blocks, torch.float32)))}


def read_moments(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Both moments in `dtype`: new tensors where they are codes, else those of the state."""
    if "exp_avg_codes" not in state:
        return {name: state[name].to(dtype) for name in MOMENTS}
    return {name: dequantize_blockwise(state[f"{name}_codes"], state[f"{name}_absmax"], signed).to(dtype)
            for name, signed in MOMENTS.items()}


def write_moments(state: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
    """The inverse of `read_moments`."""
    for name, moment in moments.items():
        if "exp_avg_codes" in state:
            for part, value in zip(("codes", "absmax"), quantize_blockwise(moment, MOMENTS[name])):
                state[f"{name}_{part}"].copy_(value)
        elif moment is not state[name]:
            state[name].copy_(moment)


class Adam8bit(Adam):
    """Adam with coded moments. Its arithmetic is Adam's, on the moments read into a state of their own."""

    def __init__(self, betas: tuple[float, float], eps: float, min_size: int):
        super().__init__(betas, eps)
        self.min_size = min_size

    def slots(self, shape: tuple[int, ...], dtype: torch.dtype) -> Slots:
        return coded_slots(shape, dtype, self.min_size)

    def direction(self, low: Tensor, state: dict[str, Tensor], age: int = 1) -> Tensor:
        moments = read_moments(state, low.dtype)
        direction = super().direction(low, moments, age)
        write_moments(state, moments)
        return direction

    def update_plain(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], lr: float, step: int) -> None:
        moments = read_moments(state, weight.dtype)
        super().update_plain(weight, grad, {"step": state["step"], **moments}, lr, step)
        write_moments(state, moments)

    def change_basis(self, state: dict[str, Tensor], moments: Moments, maps: tuple[Tensor | None, Tensor | None] | None) -> None:
        wide = read_moments(state, torch.float32)
        super().change_basis(wide, moments, maps)
        write_moments(state, wide)


def adam(betas: tuple[float, float], eps: float, state: State, min_size: int) -> Adam:
    """The rule that a config's `state` names."""
    return Adam(betas, eps) if state == "dense" else Adam8bit(betas, eps, min_size)
