"""Inputs of a layer rounded before the product, token by token: symmetric, by the largest magnitude of the token.

    scale = max|x_t| / top,   q = round(x_t / scale),   x_t ~ q scale,   top = 127 (int8), 7 (int4), 448 (fp8: q is an E4M3 number)

`product` is the two-step dequantisation of MixLLM (arXiv 2412.14590) where the weights of a group are whole numbers times a scale: the
sum over a group is of whole numbers, exact, and becomes a float when it is multiplied by the scales of group and token. Sums of
whole numbers in fp32 are exact below 2^24; groups that could go beyond are summed in float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ._coded import _TransposedProduct

if TYPE_CHECKING:
    from ._groups import GroupStorage

TOP = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}


def rounded(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """x (..., in) fp32 or float64 -> q (..., in), scale (..., 1), in the same dtype; a token of zeros has scale 1."""
    top = TOP[kind]
    scale = x.abs().amax(-1, keepdim=True) / top
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    unit = x / scale
    if kind == "fp8":
        return unit.clamp(-top, top).to(torch.float8_e4m3fn).to(x.dtype), scale
    return unit.round().clamp(-top, top), scale


def near(x: Tensor, kind: str) -> Tensor:
    """x (..., in) fp32 or float64 as it is rounded; kind none: as it is."""
    if kind == "none":
        return x
    units, scale = rounded(x, kind)
    return units * scale


def straight_through(x: Tensor, kind: str) -> Tensor:
    """x as it is rounded; the gradient is that of x."""
    wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    return x + (near(wide, kind) - wide).to(x.dtype).detach()


class RoundedProduct(torch.autograd.Function):
    """y = Q(x) D(W)^T; the gradient goes straight through Q, and nothing is saved for it."""

    @staticmethod
    def forward(ctx, x: Tensor, storage: GroupStorage) -> Tensor:
        ctx.storage = storage
        with torch.no_grad():
            return product(x, storage)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return (_TransposedProduct.apply(grad, ctx.storage) if ctx.needs_input_grad[0] else None), None

    @staticmethod
    def jvp(ctx, tangent: Tensor, _):
        return ctx.storage.forward_product(tangent)


def product(x: Tensor, storage: GroupStorage) -> Tensor:
    """Q(x) D(W)^T, (..., in) -> (..., out) in x's dtype, tile by tile of W."""
    kind, leaves = storage.options.activations, storage.leaves()
    wide = storage.inputs(x.to(torch.promote_types(x.dtype, torch.float32)), leaves)
    units, scale = rounded(wide, kind)
    y = torch.empty(*x.shape[:-1], storage.out_features, dtype=x.dtype, device=x.device)
    offset = storage.offset(leaves, units.dtype)
    for rows in storage._tiles():
        whole = None if kind == "fp8" else storage.integers(leaves, rows)
        if whole is None:
            part = F.linear(units, storage.values(leaves, rows).to(units.dtype))
        else:
            part = group_sums(units, *whole)
        part = part * scale
        if offset is not None:
            part += storage.values(leaves, rows).to(units.dtype) @ offset
        y[..., rows] = part
    return y


def group_sums(units: Tensor, integers: Tensor, scales: Tensor) -> Tensor:
    """units (..., in), integers (n, groups, g) whole numbers, scales (n, groups) -> sum over groups of scale times the exact sum
    within the group, (..., n)."""
    group, largest = integers.shape[-1], TOP["int8"] * 15
    exact = torch.float64 if largest * group >= 2**24 else units.dtype
    found = None
    for index in range(integers.shape[1]):
        part = units[..., index * group: (index + 1) * group].to(exact)
        sums = (part @ integers[:, index, : part.shape[-1]].to(exact).T).to(units.dtype) * scales[:, index].to(units.dtype)
        found = sums if found is None else found.add_(sums)
    return found
