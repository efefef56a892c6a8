"""How the scale of a group is kept: as a float, or in 8 bits as E4M3 or as a power of two (E8M0).

The two 8-bit kinds are bytes (uint8), as checkpoints of NVFP4 and MXFP4 have them.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
#: largest and smallest positive E4M3 numbers
E4M3_MAX, E4M3_MIN = 448.0, 2.0**-9


def positive(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A scale as it is kept; 1 where it would be kept as 0, the largest number where it would overflow."""
    kept = scale.clamp(max=torch.finfo(dtype).max).to(dtype)
    return torch.where(kept == 0, torch.ones_like(kept), kept)


def scale_dtype(kind: str) -> torch.dtype:
    return SCALES.get(kind, torch.uint8)


def keep_scale(largest: Tensor, top: float, kind: str) -> Tensor:
    """The scale under which `largest`, the greatest magnitude of a group (...) fp32, is about `top`, the greatest grid value.

    e8m0: 2^(floor(log2 largest) - floor(log2 top)), the rule of the OCP MX specification: what lies above `top` is cut to it."""
    if kind == "e8m0":
        exponent = torch.frexp(largest).exponent - torch.frexp(torch.tensor(top, device=largest.device)).exponent
        return (exponent + 127).clamp(1, 254).to(torch.uint8)
    if kind == "e4m3":
        return (largest / top).clamp(E4M3_MIN, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    return positive(largest / top, SCALES[kind])


def read_scale(kept: Tensor, kind: str) -> Tensor:
    """The inverse: fp32, differentiable in a float scale."""
    if kind == "e8m0":
        return (kept.int() << 23).view(torch.float32)
    return (kept.view(torch.float8_e4m3fn) if kind == "e4m3" else kept).float()
