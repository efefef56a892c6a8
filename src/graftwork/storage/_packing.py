"""Codes of 1 to 8 bits in bytes, row by row: a stream of bits, the first code in the lowest bits of the first byte.

Eight codes of b bits fill b bytes, so a row of n codes takes ceil(n b / 8) bytes and every row starts at a byte: any rows of a
matrix can be read alone.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..modeling.protocols import has_values


def packed_width(count: int, bits: int) -> int:
    """Bytes of a row of `count` codes."""
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """(rows, n) uint8, each below 2**bits -> (rows, ceil(n bits / 8)) uint8."""
    if bits == 8:
        return codes
    rows, count = codes.shape
    each = 8 if 8 % bits else 8 // bits  # codes that fill whole bytes
    codes = F.pad(codes, (0, -count % each)).unflatten(1, (-1, each))
    if 8 % bits == 0:
        packed = codes[..., 0].clone()
        for i in range(1, each):
            packed |= codes[..., i] << (bits * i)
        return packed[:, : packed_width(count, bits)].contiguous()
    word = torch.zeros(codes.shape[:2], dtype=torch.int64, device=codes.device)
    for i in range(8):
        word |= codes[..., i].long() << (bits * i)
    found = torch.stack([(word >> 8 * k) & 255 for k in range(bits)], -1).to(torch.uint8)
    return found.flatten(1)[:, : packed_width(count, bits)].contiguous()


def unpack(packed: Tensor, count: int, bits: int) -> Tensor:
    """The inverse: (rows, count) uint8."""
    if bits == 8:
        return packed
    low = 2**bits - 1
    if 8 % bits == 0:
        codes = torch.stack([(packed >> shift) & low for shift in range(0, 8, bits)], -1)
        return codes.flatten(1)[:, :count]
    wide = torch.int32 if bits < 4 else torch.int64  # eight codes in one number
    packed = F.pad(packed, (0, -packed.shape[1] % bits)).unflatten(1, (-1, bits)).to(wide)
    word = (packed << torch.arange(0, 8 * bits, 8, dtype=wide, device=packed.device)).sum(-1, keepdim=True, dtype=wide)
    codes = (word >> torch.arange(0, 8 * bits, bits, dtype=wide, device=packed.device)).bitwise_and_(low).to(torch.uint8)
    return codes.flatten(1)[:, :count]


#: where whole codes fill a byte: a type as wide as the fp32 values of its codes together
_TOGETHER = {4: torch.int64, 2: torch.complex128}


def look_up(packed: Tensor, count: int, bits: int, table: tuple[float, ...], choice: Tensor | None = None) -> Tensor:
    """table[unpack(packed, count, bits)]: (rows, count) fp32, new. table: 2**bits numbers (fewer if no code is higher).

    choice (rows, k) uint8: table is several tables one after the other, and the k-th part of a row, of whole bytes, has its own.
    Where whole codes fill a byte, all values of a byte are fetched at once, as one number as wide as they are."""
    rows, span = packed.shape[0], 8
    if bits not in _TOGETHER:
        packed, span, bits = unpack(packed, count, bits), bits, 8
    index = packed.int()
    if choice is not None:
        index = index.view(*choice.shape, -1) + (choice.int() << span).unsqueeze(-1)
    if has_values(packed):
        found = entries(table, bits, packed.device)
    else:  # nothing fake may be remembered
        size = len(table) if bits == 8 else 256 * max(1, len(table) >> bits)
        found = packed.new_empty(size, dtype=_TOGETHER.get(bits, torch.float32))
    found = found.index_select(0, index.reshape(-1)).view(torch.float32).view(rows, -1)
    return found if found.shape[1] == count else found[:, :count]


@lru_cache(64)
@torch.inference_mode(False)
def entries(table: tuple[float, ...], bits: int, device: torch.device) -> Tensor:
    """The values of every byte of codes, as numbers as wide as they are together: (256 a table,); of codes of 8 bits `table` itself."""
    values = torch.tensor(table, dtype=torch.float32, device=device)
    if bits == 8:
        return values
    each = unpack(torch.arange(256, dtype=torch.uint8, device=device)[:, None], 8 // bits, bits)
    return values.view(-1, min(len(table), 2**bits))[:, each.long()].view(_TOGETHER[bits]).view(-1)


def wide_width(count: int, bits: int) -> int:
    """Bytes of a row of `count` codes of any number of bits, in planes."""
    return sum(packed_width(count, min(8, bits - low)) for low in range(0, bits, 8))


def pack_wide(codes: Tensor, bits: int) -> Tensor:
    """(rows, n) int64, each below 2**bits -> (rows, wide_width(n, bits)) uint8: all lowest bytes, then the next, ..., each plane packed."""
    planes = [pack(((codes >> low) & 255).to(torch.uint8), min(8, bits - low)) for low in range(0, bits, 8)]
    return torch.cat(planes, 1)


def unpack_wide(packed: Tensor, count: int, bits: int) -> Tensor:
    """The inverse: (rows, count) int64."""
    codes, start = None, 0
    for low in range(0, bits, 8):
        width = packed_width(count, min(8, bits - low))
        plane = unpack(packed[:, start: start + width], count, min(8, bits - low)).long() << low
        codes, start = plane if codes is None else codes | plane, start + width
    return codes
