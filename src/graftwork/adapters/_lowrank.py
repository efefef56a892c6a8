"""A frozen product and a low-rank change of it as one node of the graph.

    y  = W x + b + B (A x) (+ c)        x (T, in), A (r, in), B (out, r), c (out,)
    dx = W^T g + A^T (B^T g)            dA = (B^T g)^T x      dB = g^T (A x)      dc = sum g

As separate nodes autograd would allocate the change beside y and dW's dx beside the adapter's, and add each pair in a pass of
its own; here both are added in place. Saved: x (the one tensor that q, k and v share), A x (T, r), A and B.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..modeling.arithmetic import linear, product_dtype
from ..modeling.protocols import Product


def frozen_plus_low_rank(x: Tensor, A: Tensor, B: Tensor, change: Tensor | None, frozen: Product) -> Tensor:
    """x (..., in) -> (..., out) in x's dtype. A (r, in), B (out, r) and change (out,) or None in any float dtype; gradients come
    in theirs. The frozen weight gets no gradient: the caller makes sure that none is wanted."""
    if torch.is_grad_enabled():
        return _FrozenPlusLowRank.apply(x, A, B, change, frozen)
    return _product_and_hidden(x, A, B, change, frozen)[0]  # plain operations: forward-mode tangents pass


def _add_product(target: Tensor, left: Tensor, right: Tensor) -> None:
    """target (T, n) += left (T, k) @ right (k, n), in place."""
    if product_dtype(target.dtype, target.device) == target.dtype:
        target.addmm_(left, right)
    else:
        target.add_(left.float() @ right.float())


def _product(left: Tensor, right: Tensor) -> Tensor:
    dtype = product_dtype(left.dtype, left.device)
    return left.to(dtype) @ right.to(dtype)


def _product_and_hidden(x: Tensor, A: Tensor, B: Tensor, change: Tensor | None, frozen: Product) -> tuple[Tensor, Tensor]:
    """(y (..., out), x A^T with the leading dimensions as one)."""
    rows = x.reshape(-1, x.shape[-1])
    a, b = A.to(x.dtype), B.to(x.dtype)
    y = frozen.product(rows)
    if frozen.bias is not None:
        y = y.add_(frozen.bias.to(y.dtype))
    hidden = linear(rows, a)
    _add_product(y, hidden, b.T)
    if change is not None:
        y.add_(change.to(y.dtype))
    return y.reshape(*x.shape[:-1], y.shape[-1]), hidden


class _FrozenPlusLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, A, B, change, frozen):
        y, hidden = _product_and_hidden(x, A, B, change, frozen)
        ctx.frozen, ctx.kinds, ctx.has_change = frozen, (A.dtype, B.dtype, None if change is None else change.dtype), change is not None
        ctx.save_for_backward(x, hidden, A, B)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, hidden, A, B = ctx.saved_tensors
        g, rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        inner = _product(g, B.to(g.dtype)).to(g.dtype)  # (T, r)
        dx = dA = dB = dc = None
        if ctx.needs_input_grad[0]:
            dx = ctx.frozen.transposed(g)
            _add_product(dx, inner, A.to(dx.dtype))
            dx = dx.reshape(x.shape)
        if ctx.needs_input_grad[1]:
            dA = _product(inner.T, rows).to(ctx.kinds[0])
        if ctx.needs_input_grad[2]:
            dB = _product(g.T, hidden).to(ctx.kinds[1])
        if ctx.has_change and ctx.needs_input_grad[3]:
            dc = g.sum(0).to(ctx.kinds[2])
        return dx, dA, dB, dc, None
