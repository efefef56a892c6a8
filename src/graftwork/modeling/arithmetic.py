"""Products of half-precision tensors on processors without instructions for them.

There PyTorch's bf16 and fp16 matmul is a scalar loop: 10x (y = x W^T) to 26x (g W) slower than fp32 at 400 rows (measured on
AVX2). Such products are computed in fp32 and rounded once, which is at least as exact: both accumulate in fp32. Up to 3 rows
the scalar loop is the cheaper one, since converting W costs more than the product.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: rows from which converting the weight pays
ROWS = 4


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which products of `dtype` tensors are quickest on `device`: their own, or fp32."""
    return torch.float32 if device.type == "cpu" and slow_on_cpu(dtype) else dtype


@cache
def slow_on_cpu(dtype: torch.dtype) -> bool:
    """True where this processor has no products in this half-precision type."""
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    check = getattr(torch.ops.mkldnn, name, None) if name else None
    return check is not None and not check()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, (..., in) -> (..., out) in x's dtype; as F.linear, but wide where that is quicker."""
    if x.device.type != "cpu" or not slow_on_cpu(x.dtype) or x.numel() < ROWS * weight.shape[1]:
        return F.linear(x, weight, bias)
    return _Wide.apply(x, weight, bias)


class _Wide(torch.autograd.Function):
    """x W^T + b in fp32; W is converted in each pass, so no wide copy outlives one. x is saved only for W's gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        y = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        wide = grad.float()
        dx = (wide @ weight.float()).to(grad.dtype) if ctx.needs_input_grad[0] else None
        rows = wide.reshape(-1, wide.shape[-1])
        dw = (rows.T @ x.reshape(-1, x.shape[-1]).float()).to(weight.dtype) if ctx.needs_input_grad[1] else None
        db = rows.sum(0).to(grad.dtype) if ctx.needs_input_grad[2] else None
        return dx, dw, db


class WideLinear:
    """Mixed into the class of an nn.Linear or Conv1D (see `widen`)."""

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
        if module.weight.device.type == "cpu" and slow_on_cpu(module.weight.dtype):
            if kind not in _WIDE:
                _WIDE[kind] = type(kind.__name__, (WideLinear, kind), {"plain_linear": kind})
            module.__class__ = _WIDE[kind]
