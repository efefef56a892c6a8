"""The product y = x W^T + b with 8-bit operands, and its two gradients, as one autograd function (see halo.py for the levels).

X (B, n), W (m, n), E = dL/dY (B, m); codes and one fp32 scale a tensor; sums in int32 (INT8) or fp32 (FP8), which are scaled and rounded
once to the dtype of x. Between forward and backward only codes live: B n bytes of X where W wants a gradient, m n bytes of W where x
wants one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._hadamard import padded, rotate


class Int8:
    """Round to nearest in [-127, 127]; products are exact in int32."""

    dtype, top = torch.int8, 127.0
    #: 127^2 times so many is below 2^24: partial sums that fp32 holds exactly
    EXACT = 1040

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(codes, scale ()) of x, symmetric, by its largest magnitude."""
        scale = self.scale(x)
        return self.codes(x / scale), scale

    def scale(self, x: Tensor) -> Tensor:
        if x.numel() == 0:  # an expert that got no token
            return x.new_ones(())
        return x.abs().amax().clamp_min(torch.finfo(torch.float32).tiny * 2 * self.top) / self.top

    def codes(self, x: Tensor) -> Tensor:
        return x.round().clamp_(-self.top, self.top).to(torch.int8)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a (p, k) b (k, q) of codes: the integers. PyTorch's int8 product on a CPU is a scalar loop, 20x slower than fp32 in pieces
        whose sums fp32 holds."""
        if a.device.type == "cuda" and a.shape[0] > 16 and not (a.shape[1] % 8 or b.shape[1] % 8):
            return torch._int_mm(a, b)
        if a.shape[1] <= self.EXACT:
            return a.float() @ b.float()
        total = torch.zeros(a.shape[0], b.shape[1], dtype=torch.int32, device=a.device)
        for start in range(0, a.shape[1], self.EXACT):
            k = slice(start, start + self.EXACT)
            total += (a[:, k].float() @ b[k].float()).to(torch.int32)
        return total


class Fp8(Int8):
    """e4m3: 4 bits of exponent, 3 of mantissa, largest 448. Products of two codes are exact in fp32, sums are rounded there."""

    dtype, top = torch.float8_e4m3fn, 448.0

    def codes(self, x: Tensor) -> Tensor:
        return x.clamp(-self.top, self.top).to(torch.float8_e4m3fn)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return a.float() @ b.float()


FORMATS = {"int8": Int8(), "fp8": Fp8()}


@dataclass(frozen=True)
class Mode:
    """How a product is computed. reuse: keep the codes of W for the backward pass, or make them again there."""

    format: Any
    level: int
    reuse: bool = True

    def turned(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scale of X H or W H (rows, n); of X and W at level 0."""
        x = wide(x)
        return self.format.quantize(rotate(x) if self.level else x)

    def back(self, product: Tensor, scale: Tensor) -> Tensor:
        """A product with codes of a rotated operand, scaled and turned back."""
        product = product.to(scale.dtype) * scale
        return rotate(product, transpose=True) if self.level else product

    def input_gradient(self, E: Tensor, E_codes: tuple[Tensor, Tensor] | None, W_codes: tuple[Tensor, Tensor]) -> Tensor:
        """dX (B, n) from E (B, m). E_codes: those of E itself where they are known already."""
        count = E.shape[0]
        if self.level == 2 and count:
            size = padded(count)
            E = torch.nn.functional.pad(E, (0, 0, 0, size - count))
            E_codes = self.format.quantize(rotate(E.T.contiguous(), transpose=True).T.contiguous())  # H_B E
        codes, scale = E_codes or self.format.quantize(E)
        dX = self.back(self.format.product(codes, W_codes[0]), scale * W_codes[1])
        return rotate(dX.T.contiguous()).T[:count] if self.level == 2 and count else dX


def wide(x: Tensor) -> Tensor:
    """At least fp32: rotations and scales of 16-bit tensors are not rounded on the way."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Rotated(torch.autograd.Function):
    """x (..., n), W (m, n), bias (m,) or None -> (..., m). product: where W can be had again (for reuse = false)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, product: Any, mode: Mode) -> Tensor:
        (X, sx), (W, sw) = mode.turned(x.reshape(-1, x.shape[-1])), mode.turned(weight)
        y = mode.format.product(X, W.T).to(sx.dtype) * (sx * sw)
        if bias is not None:
            y += bias
        for_x, for_w = ctx.needs_input_grad[:2]
        keeps = for_x and mode.reuse
        ctx.save_for_backward(X if for_w else None, sx if for_w else None, W if keeps else None, sw if keeps else None)
        ctx.product, ctx.mode, ctx.kinds = product, mode, (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        X, sx, W, sw = ctx.saved_tensors
        mode, dx, dw, db = ctx.mode, None, None, None
        E = wide(grad.reshape(-1, grad.shape[-1]))
        codes = mode.format.quantize(E) if ctx.needs_input_grad[1] or mode.level < 2 else None
        if ctx.needs_input_grad[0]:
            kept = (W, sw) if W is not None else mode.turned(ctx.product.dense().detach())
            dx = mode.input_gradient(E, codes, kept).to(ctx.kinds[0]).reshape(*grad.shape[:-1], -1)
        if ctx.needs_input_grad[1]:
            dw = mode.back(mode.format.product(codes[0].T, X), codes[1] * sx).to(ctx.kinds[1])
        if ctx.needs_input_grad[2]:
            db = E.sum(0).to(ctx.kinds[2])
        return dx, dw, db, None, None
