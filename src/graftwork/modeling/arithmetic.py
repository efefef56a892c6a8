"""Products of half-precision tensors on processors without instructions for them; and stochastic rounding to bfloat16.

There PyTorch's bf16 and fp16 matmul is a scalar loop: 10x (y = x W^T) to 26x (g W) slower than fp32 at 400 rows (measured on
AVX2). Such products are computed in fp32 and rounded once, which is at least as exact: both accumulate in fp32. Up to 3 rows
the scalar loop is the cheaper one, since converting W costs more than the product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import repeated

#: rows from which converting the weight pays
ROWS = 4
#: elements of W that are widened at a time
PIECE = 2**20


#: the kind of device that a plan is made for, while it is: its tensors without values lie on the CPU all the same
planned_for: str | None = None


def kind_of(device: torch.device) -> str:
    """The kind of device that computes with tensors on `device`."""
    return planned_for or device.type


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which products of `dtype` tensors are quickest on `device`: their own, or fp32."""
    return torch.float32 if kind_of(device) == "cpu" and slow_on_cpu(dtype) else dtype


@cache
def slow_on_cpu(dtype: torch.dtype) -> bool:
    """True where this processor has no instructions for products in this half-precision type. With AVX-512 oneDNN calls bf16 supported
    without them, too: it emulates them, five times as slow as fp32 (2048x2048 by 128 rows, 35 and 7.7 ms)."""
    if dtype == torch.bfloat16 and torch.cpu._is_avx512_supported() and not torch.cpu._is_avx512_bf16_supported():
        return True
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    check = getattr(torch.ops.mkldnn, name, None) if name else None
    return check is not None and not check()


def dtype_for(x: Tensor) -> torch.dtype:
    """The dtype in which W x is quickest for this x (..., in)."""
    return x.dtype if x.numel() < ROWS * x.shape[-1] else product_dtype(x.dtype, x.device)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, (..., in) -> (..., out) in x's dtype; as F.linear, but wide where that is quicker, and from the packed form of a
    weight that has one (see packed.py)."""
    packed = weight.__dict__.get("graft_packed")
    if packed is not None and packed.serves(x, weight):
        return packed(x, bias)
    return F.linear(x, weight, bias) if dtype_for(x) == x.dtype else _Wide.apply(x, weight, bias)


def pieces(weight: Tensor, dtype: torch.dtype, size: int = PIECE) -> Iterator[tuple[slice, Tensor]]:
    """(rows, weight[rows] in dtype) of W (out, in), about `size` elements at a time through one buffer: no converted copy of a
    large matrix. All at once where nothing has to be converted. A piece is valid until the next."""
    if weight.dtype == dtype:
        yield slice(0, weight.shape[0]), weight
        return
    step = max(1, size // weight.shape[1])
    buffer = torch.empty(min(step, weight.shape[0]), weight.shape[1], dtype=dtype, device=weight.device)
    for start in repeated.each(range(0, weight.shape[0], step)):
        rows = slice(start, min(start + step, weight.shape[0]))
        yield rows, buffer[: rows.stop - rows.start].copy_(weight[rows])


class _Wide(torch.autograd.Function):
    """x W^T + b in fp32; W is converted piece by piece in each pass. x is saved only for W's gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        wide = x.reshape(-1, x.shape[-1]).float()
        y = x.new_empty(wide.shape[0], weight.shape[0])
        for rows, piece in pieces(weight, torch.float32):
            product = wide @ piece.T
            y[:, rows] = product if bias is None else product.add_(bias[rows])
        return y.reshape(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            wide = torch.zeros(g.shape[0], weight.shape[1], device=g.device)
            for rows, piece in pieces(weight, torch.float32):
                wide.addmm_(g[:, rows].float(), piece)
            dx = wide.to(grad.dtype).reshape(*grad.shape[:-1], -1)
        if ctx.needs_input_grad[1]:
            dw = (g.float().T @ x.reshape(-1, x.shape[-1]).float()).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            db = g.float().sum(0).to(grad.dtype)
        return dx, dw, db


class WideLinear:
    """Mixed into the class of an nn.Linear or Conv1D (see `widen`): its product is `linear`."""

    plain_linear: type

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if isinstance(self, nn.Linear) else self.weight.T
        return linear(x, weight, self.bias)


_WIDE: dict[type, type] = {}


def widen(model: nn.Module) -> None:
    """Let every dense half-precision linear map of a model use `linear`, by changing the class of the module instance in
    place. Nothing happens where the processor has the instructions (or the model is elsewhere)."""
    from .protocols import is_conv1d

    for module in model.modules():
        kind = type(module)
        if not (kind is nn.Linear or is_conv1d(module)) or isinstance(module, WideLinear):
            continue
        if kind_of(module.weight.device) == "cpu" and slow_on_cpu(module.weight.dtype):
            use_linear(module)


def use_linear(module: nn.Module) -> None:
    """Let a plain nn.Linear or Conv1D multiply by `linear`."""
    kind = type(module)
    if kind not in _WIDE:
        _WIDE[kind] = type(kind.__name__, (WideLinear, kind), {"plain_linear": kind})
    module.__class__ = _WIDE[kind]


def round_stochastic(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """float32 -> one of its two bfloat16 neighbors, so that the expected value is x. Exact values, infinities and NaN stay; other
    types are rounded to the nearest."""
    if dtype != torch.bfloat16:
        return x.to(dtype)
    bits = torch.randint(0, 1 << 16, x.shape, generator=generator, dtype=torch.int32, device=x.device)
    bits.add_(x.contiguous().view(torch.int32)).bitwise_and_(-(1 << 16))  # the upper half is a bfloat16 number already
    return bits.view(torch.float32).bfloat16().masked_fill_(x.isnan(), math.nan)  # whose payload may have overflowed
