"""Numbers in 8 or 4 bits: groups that share a scale and a zero point.

x, read row by row, is cut into groups of g (the last may be short). With L = 2^bits - 1, per group:

    scale = (max - min) / L,   zero = -round(min / scale),   code = clamp(round(x / scale) + zero, 0, L),   D = (code - zero) scale

`round` is to the nearest, or, with a generator, stochastic: floor(x / scale + u), u uniform in [0, 1), whose mean is x / scale. The
zero point is a whole number in float32 and not bounded to the codes: a group whose values are all of one sign keeps its range.
A constant group has scale |x| (1 for zeros) and is exact. bits + 64 / g bits a number. Codes of 4 bits share a byte, the even index
in the high half.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .protocols import has_values

#: numbers in float32 at a time, so that the temporaries of a large matrix stay small
CHUNK = 1 << 20


def quantize_affine(x: Tensor, bits: int = 8, group: int = 256, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """x (any shape, finite) -> codes (ceil(n bits / 8),) uint8, scale and zero (ceil(n / group),) fp32."""
    top, each, flat = 2**bits - 1, 8 // bits, x.detach().reshape(-1)
    size, device = flat.numel(), x.device
    codes = torch.empty(-(-size // each), dtype=torch.uint8, device=device)
    scales, zeros = (torch.empty(-(-size // group), device=device) for _ in range(2))
    for start, stop in _pieces(flat, size, group):
        part = flat[start:stop].float()
        if short := -part.numel() % group:
            part = torch.cat([part, part[-1:].expand(short)])
        part = part.view(-1, group)
        low, high = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
        scale = (high - low) / top
        scale = torch.where(scale == 0, torch.where(low == 0, torch.ones_like(low), low.abs()), scale)
        zero = -torch.round(low / scale)
        unit = part / scale
        if generator is None:
            unit = unit.round_()
        else:
            unit = unit.add_(torch.rand(unit.shape, generator=generator, device=device)).floor_()
        own = unit.add_(zero).clamp_(0, top).to(torch.uint8).view(-1)[: stop - start]
        codes[start // each: -(-stop // each)] = own if bits == 8 else _pack(own)
        groups = slice(start // group, -(-stop // group))
        scales[groups], zeros[groups] = scale.view(-1), zero.view(-1)
    return codes, scales, zeros


def dequantize_affine(codes: Tensor, scale: Tensor, zero: Tensor, size: int, bits: int = 8, group: int = 256,
                      dtype: torch.dtype = torch.float32) -> Tensor:
    """The inverse, (size,) in dtype: fp32 values rounded once. Without gradient."""
    out, each = torch.empty(size, dtype=dtype, device=codes.device), 8 // bits
    for start, stop in _pieces(codes, size, group):
        part = codes[start // each: -(-stop // each)]
        values = (part if bits == 8 else _unpack(part))[: stop - start].float()
        own = slice(start // group, -(-stop // group))
        out[start:stop] = (values - per_number(zero[own], values, group)) * per_number(scale[own], values, group)
    return out


def _pieces(values: Tensor, size: int, group: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of whole groups of about CHUNK numbers; in a plan the first alone, since all have its shapes."""
    step = group * max(1, CHUNK // group)
    for start in range(0, size if has_values(values) else min(size, step), step):
        yield start, min(start + step, size)


def per_number(metadata: Tensor, values: Tensor, group: int) -> Tensor:
    """(groups,) -> one for each of `values` (n,)."""
    return metadata.repeat_interleave(group, output_size=metadata.numel() * group)[: values.numel()]


def _pack(codes: Tensor) -> Tensor:
    if codes.numel() % 2:
        codes = torch.cat([codes, codes.new_zeros(1)])
    return codes[0::2] << 4 | codes[1::2]


def _unpack(packed: Tensor) -> Tensor:
    return torch.stack([packed >> 4, packed & 15], dim=1).view(-1)
