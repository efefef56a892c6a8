"""Products by a weight of whole codes, D(W) = scale (code - zero), that never build D(W).

With codes c (out, in), groups j of inputs that share scale and zero, and x_j the part of x that meets group j:

    y_n = sum_j s_nj (c_nj . x_j)  -  sum_j s_nj z_nj sum(x_j)

The second sum is a product as narrow as there are groups. For the first, `_tiles.TILE` codes at a time become floats in one buffer,
which stays in the processor's cache; it is multiplied by the scales in place (a scale of a whole row is applied to y instead) and by x.

Codes of b = 2 or 4 bits that share a byte B = sum_i c_i 2^(b i) are not taken apart either. With the planes P_i = B mod 2^(b (i+1)),
of which the last is the byte as it is,

    sum_i c_i x_i = sum_i P_i u_i,     u_i = x_i / 2^(b i) - x_(i+1) / 2^(b (i+1))  (the last without its second term)

so a tile costs a conversion from bytes, and a mask for every plane but the last, where a table of values costs several times as much.
Nothing here depends on the number of rows of x: the conversion is a part of the cost for one row, and small for many.

Numbers are fp32, those of D(W) before they are rounded to a compute dtype of 16 bits; sums are in another order than a product by D(W) has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..modeling import repeated
from ..modeling.arithmetic import kind_of, product_dtype
from . import _tiles

#: columns of scales are spread over at least so many codes, or they would be half of the work
NARROWEST = 16


def serves(x: Tensor, bits: int, group: int, columns: int) -> bool:
    """Whether x is multiplied here: in fp32 on a CPU (other processors, and 16-bit types on those with products of them, multiply
    decoded tiles), by codes that fill bytes, in groups of whole bytes."""
    if kind_of(x.device) != "cpu" or 8 % bits or x.dtype != torch.float32 and product_dtype(x.dtype, x.device) != torch.float32:
        return False
    return group >= columns or (group >= NARROWEST and group * bits % 8 == 0)


def row_product(x: Tensor, codes: Tensor, bits: int, scale: Tensor, zero: Tensor | int) -> Tensor:
    """x (..., in) times D(W)^T where every row of W has one scale and zero, (out,) fp32 (or one int for all zeros): (..., out) fp32,
    without gradient. codes (out, ceil(in bits / 8)) uint8, packed."""
    wide = x if x.dtype == torch.float32 else x.float()
    # A call takes as long as thousands of codes, which one row of x by a small matrix feels: this is what the smallest need, no more.
    if bits == 8 and codes.numel() <= _tiles.TILE:
        y = F.linear(wide, codes.float())
    else:
        planes = _planes(wide.reshape(-1, wide.shape[-1]), bits)
        y = planes.new_empty(planes.shape[0], codes.shape[0])
        for rows, tile in _float_tiles(codes, bits, _tiles.row_tiles(codes.shape[0], wide.shape[-1])):
            torch.mm(planes, tile.flatten(1).T, out=y[:, rows])
        y = y.view(*x.shape[:-1], codes.shape[0])
    sums = wide.sum(-1, keepdim=True)
    y = y.sub_(sums, alpha=zero) if isinstance(zero, int) else y.addcmul_(sums, zero, value=-1)
    return y.mul_(scale)


def group_product(x: Tensor, codes: Tensor, bits: int, group: int, numbers: Callable[[slice], tuple[Tensor, Tensor | int]]) -> Tensor:
    """As `row_product`, with a scale for every `group` columns, of which the last of a row may be short.

    numbers(rows) -> fp32 scale of these rows, (n, groups), and zero, (n, groups) or one int for all."""
    wide = x.reshape(-1, x.shape[-1]).float()
    planes, sums, span = _planes(wide, bits), _group_sums(wide, group), group * bits // 8
    y = planes.new_empty(planes.shape[0], codes.shape[0])
    for rows, tile in _float_tiles(codes, bits, _tiles.row_tiles(codes.shape[0], wide.shape[1])):
        scale, zero = numbers(rows)
        _multiply(tile, scale, span)
        torch.addmm(torch.mm(sums, (scale * zero).T), planes, tile.flatten(1).T, beta=-1, out=y[:, rows])
    return y.view(*x.shape[:-1], codes.shape[0])


def _float_tiles(codes: Tensor, bits: int, tiles: list[slice]) -> Iterator[tuple[slice, Tensor]]:
    """(rows, the planes of their bytes (n, planes, bytes) fp32, which the next tile overwrites)."""
    width, each, step = codes.shape[1], 8 // bits, tiles[0].stop
    if len(tiles) == each == 1:
        yield tiles[0], codes.float().unsqueeze(1)
        return
    floats = torch.empty(step, each, width, device=codes.device)
    masked = torch.empty(step, width, dtype=torch.uint8, device=codes.device) if each > 1 else None
    for rows in repeated.each(tiles):
        own, tile = codes[rows], floats[: rows.stop - rows.start]
        for i in range(each - 1):
            tile[:, i].copy_(torch.bitwise_and(own, 2 ** (bits * (i + 1)) - 1, out=masked[: own.shape[0]]))
        tile[:, -1].copy_(own)
        yield rows, tile


def _planes(x: Tensor, bits: int) -> Tensor:
    """x (m, in) -> the u_i of all bytes, plane after plane: (m, bytes * codes of a byte)."""
    each = 8 // bits
    if each == 1:
        return x
    if short := -x.shape[1] % each:
        x = F.pad(x, (0, short))
    parts = [x[:, ::each]] + [x[:, i::each] * 2.0 ** (-bits * i) for i in range(1, each)]
    return torch.cat([own - above for own, above in zip(parts, parts[1:])] + parts[-1:], 1)


def _group_sums(x: Tensor, group: int) -> Tensor:
    """x (m, in) -> (m, groups)."""
    if short := -x.shape[1] % group:
        x = F.pad(x, (0, short))
    return x.unflatten(1, (x.shape[1] // group, group)).sum(-1)


def _multiply(tile: Tensor, scale: Tensor, span: int) -> None:
    """tile (n, planes, bytes) *= scale (n, groups), of `span` bytes each, in place; the last may be short."""
    (rows, planes, width), groups = tile.shape, scale.shape[1]
    if width == groups * span:
        tile.view(rows, planes, groups, span).mul_(scale.view(rows, 1, groups, 1))
    else:
        whole = width // span
        tile[:, :, : whole * span].unflatten(2, (whole, span)).mul_(scale[:, None, :whole, None])
        tile[:, :, whole * span:].mul_(scale[:, None, whole:])
