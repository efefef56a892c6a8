"""Numbers in 8 bits: blocks of 256 that share a maximum, coded against the dynamic map (arXiv 2110.02861).

x, read row by row, is cut into blocks of 256 (the last may be short). With s_b = max |x| over block b:

    code = number of midpoints of the map strictly below x / s_b,      D(x) = map[code] * s_b

A float of 8 bits whose exponent takes as many bits as it needs: the relative error is about 1 % near s_b and grows as x falls
to the smallest entry, 5.5e-7 s_b (3.3e-7 s_b unsigned). 8 + 32/256 bits a number. Exact zeros stay.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from .protocols import has_values

BLOCK = 256


def dynamic_map(signed: bool = True) -> Tensor:
    """The map, (256,) fp32, sorted: for i in 0..6 the 2**i interval centers of [0.1, 1] times 10**(i - 6), with both signs; and
    0 and 1. Unsigned: 2**(i + 1) centers, without the negative ones."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1)
        centers = ((edges[:-1] + edges[1:]) / 2 * 10 ** (i - 6)).tolist()
        values += centers + ([-c for c in centers] if signed else [])
    return torch.tensor(sorted(values))


def quantize_blockwise(x: Tensor, signed: bool = True, *, grid: bool = False) -> tuple[Tensor, Tensor]:
    """x (any shape, finite) -> codes of x's shape, uint8, and block maxima (ceil(n / 256),) fp32.

    grid: first round x / s_b to one of 65536 steps between -1 and 1, none of them 0, as bitsandbytes does on a CPU. What is
    below 1.5e-5 s_b is then raised to that: fine for NF4's scales, no choice for an optimizer's moments.
    """
    size = x.numel()
    blocks = -(-size // BLOCK)
    padded = x.reshape(-1).float()
    if size < blocks * BLOCK:
        padded = nn.functional.pad(padded, (0, blocks * BLOCK - size))
    padded = padded.view(blocks, BLOCK)
    scale = padded.abs().amax(1)
    unit = (padded * (1 / scale.clamp(min=1e-38))[:, None]).clamp_(-1, 1)
    del padded
    if grid:
        unit = -1 + ((unit + 1) * 0.5 * 65535 + 0.5).to(torch.int32) * 2.0 / 65535
    codes = _midpoints_below(unit.view(-1)[:size], signed)
    if grid:
        codes.masked_fill_((scale == 0).repeat_interleave(BLOCK)[:size], 0)  # 0 times any entry is 0
    return codes.view(x.shape), scale


def dequantize_blockwise(codes: Tensor, scale: Tensor, signed: bool = True) -> Tensor:
    """The inverse: fp32 of the shape of `codes`, differentiable in `scale`."""
    book = map_on(codes.device, signed) if has_values(codes) else scale.new_empty(256)
    values = book.index_select(0, codes.reshape(-1).int())
    if values.numel() % BLOCK == 0:
        values = (values.view(-1, BLOCK) * scale[:, None]).view(-1)
    else:
        values = values * scale.repeat_interleave(BLOCK)[: values.numel()]
    return values.view(codes.shape)


@cache
@torch.inference_mode(False)
def map_on(device: torch.device, signed: bool = True) -> Tensor:
    """`dynamic_map` there; not to be written to."""
    return dynamic_map(signed).to(device)


def _midpoints_below(unit: Tensor, signed: bool) -> Tensor:
    """Number of midpoints strictly below each entry of a vector in [-1, 1], uint8; a search of the 255 takes six times as long.

    The upper half of a float32 leaves it an interval that holds one midpoint at most: a table gives the count at the interval's
    lower end, and one comparison the rest."""
    if has_values(unit):
        below, midpoints = _intervals(unit.device, signed)
    else:  # a cached table would mix real tensors with fake ones
        below, midpoints = unit.new_empty(1 << 16, dtype=torch.uint8), unit.new_empty(256)
    count = below.index_select(0, (unit.view(torch.int32) >> 16).add_(1 << 15))
    return count.add_(unit > midpoints.index_select(0, count.int()))


@cache
@torch.inference_mode(False)
def _intervals(device: torch.device, signed: bool) -> tuple[Tensor, Tensor]:
    """(counts (65536,) uint8, by the upper half as a signed number from its least on; midpoints (256,), the last infinite)"""
    book = dynamic_map(signed)
    midpoints = (book[:-1] + book[1:]) * 0.5
    upper = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32) << 16
    least = torch.minimum(upper.view(torch.float32), (upper | 0xFFFF).view(torch.float32))
    below = torch.bucketize(least, midpoints).to(torch.uint8)
    return below.to(device), torch.cat([midpoints, torch.tensor([torch.inf])]).to(device)
