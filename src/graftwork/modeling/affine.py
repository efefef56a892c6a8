"""Numbers in 8 or 4 bits: groups that share a scale and a zero point.

x, read row by row, is cut into groups of g (the last may be short). With L = 2^bits - 1, per group:

    scale = (max - min) / L,   zero = -round(min / scale),   code = clamp(round(x / scale) + zero, 0, L),   D = (code - zero) scale

`round` is to the nearest, or, with a generator, stochastic: floor(x / scale + u), u uniform in [0, 1), whose mean is x / scale. The
zero point is a whole number in float32 and not bounded to the codes: a group whose values are all of one sign keeps its range.
A constant group has scale |x| (1 for zeros) and is exact. bits + 64 / g bits a number. Codes of 4 bits share a byte, the even index
in the high half.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: numbers in float32 at a time, so that the temporaries of a large matrix stay small
CHUNK = 1 << 20


def quantize_affine(x: Tensor, bits: int = 8, group: int = 256, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """x (any shape, finite) -> codes (ceil(n bits / 8),) uint8, scale and zero (ceil(n / group),) fp32."""
    top, found = 2**bits - 1, []
    for part in x.detach().reshape(-1).split(group * max(1, CHUNK // group)):
        part, size = part.float(), part.numel()
        if short := -size % group:
            part = torch.cat([part, part[-1:].expand(short)])
        part = part.view(-1, group)
        low, high = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
        scale = (high - low) / top
        flat = scale == 0
        scale = torch.where(flat, torch.where(low == 0, torch.ones_like(low), low.abs()), scale)
        zero = -torch.round(low / scale)
        unit = part / scale
        if generator is None:
            unit = unit.round_()
        else:
            unit = unit.add_(torch.rand(unit.shape, generator=generator, device=unit.device)).floor_()
        codes = unit.add_(zero).clamp_(0, top).to(torch.uint8).view(-1)[:size]
        found.append((codes if bits == 8 else _pack(codes), scale.view(-1), zero.view(-1)))
    codes, scale, zero = (torch.cat(each) for each in zip(*found))
    return codes, scale, zero


def dequantize_affine(codes: Tensor, scale: Tensor, zero: Tensor, size: int, bits: int = 8, group: int = 256,
                      dtype: torch.dtype = torch.float32) -> Tensor:
    """The inverse, (size,) in dtype: fp32 values rounded once. Without gradient."""
    out = torch.empty(size, dtype=dtype, device=codes.device)
    step, each = group * max(1, CHUNK // group), 8 // bits
    for start in range(0, size, step):
        stop = min(start + step, size)
        part = codes[start // each: -(-stop // each)]
        values = (part if bits == 8 else _unpack(part))[: stop - start].float()
        own = slice(start // group, -(-stop // group))
        out[start:stop] = (values - per_number(zero[own], values, group)) * per_number(scale[own], values, group)
    return out


def per_number(metadata: Tensor, values: Tensor, group: int) -> Tensor:
    """(groups,) -> one for each of `values` (n,)."""
    return metadata.repeat_interleave(group, output_size=metadata.numel() * group)[: values.numel()]


def _pack(codes: Tensor) -> Tensor:
    if codes.numel() % 2:
        codes = torch.cat([codes, codes.new_zeros(1)])
    return codes[0::2] << 4 | codes[1::2]


def _unpack(packed: Tensor) -> Tensor:
    return torch.stack([packed >> 4, packed & 15], dim=1).view(-1)
