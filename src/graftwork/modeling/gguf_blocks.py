"""The block types of GGML that GGUF files keep weights in, decoded.

A row of weights is a run of blocks of L weights in a fixed number of bytes. Per block (d, m fp16; all products in fp32, in this order,
so that the values are those of llama.cpp and of the `gguf` package bit for bit):

    q4_0 q5_0 q8_0    d (q - offset)                         one scale for 32 weights
    q4_1 q5_1         d q + m                                scale and minimum for 32
    q2_k              (d s_j) q - (m t_j)                    256 weights, 16 parts, 4-bit s and t
    q4_k q5_k         (d s_j) q - (m t_j)                    256 weights, 8 parts, 6-bit s and t
    q3_k q6_k         (d s_j) (q - offset)                   256 weights, 16 parts, signed 6-bit / 8-bit s
    iq4_nl            d book[q]                              32 weights, 16 uneven levels
    iq4_xs            (d s_j) book[q]                        256 weights, 8 parts, signed 6-bit s
    mxfp4             2^(e - 127) fp4[q]                     32 weights, one byte of exponent, E2M1 values
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: levels of iq4_nl and iq4_xs, and of mxfp4 (the E2M1 values times 2)
UNEVEN = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
FP4_TWICE = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The fp16 number at a byte of every block: (..., 1) fp32."""
    return blocks[..., at:at + 2].clone(memory_format=torch.contiguous_format).view(torch.float16).float()


def _fields(packed: Tensor, shifts: Sequence[int], mask: int, run: int = 0) -> Tensor:
    """Fields of bits of bytes (..., n): for every run of `run` bytes (0: all) all its fields of the first shift, then of the next, ..."""
    packed = packed.unflatten(-1, (-1, run or packed.shape[-1]))
    return torch.stack([(packed >> s) & mask for s in shifts], -2).flatten(-3)


def _bits(packed: Tensor) -> Tensor:
    """Bits of bytes (..., n), the lowest of a byte first: (..., 8 n)."""
    return torch.stack([(packed >> s) & 1 for s in range(8)], -1).flatten(-2)


def _parts(scales: Tensor, values: Tensor) -> Tensor:
    """One scale for every part of a block: (..., parts) times values (..., L)."""
    return (scales.unsqueeze(-1) * values.unflatten(-1, (scales.shape[-1], -1))).flatten(-2)


def _six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """12 bytes of q4_k and q5_k: eight 6-bit scales and eight 6-bit minima, (..., 8) fp32 each. The last four of each are split: low
    halves in bytes 8 to 11, high ones in the top bits of the first four's bytes."""
    first, second, low = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = torch.cat([first & 63, (low & 15) | (first >> 6 << 4)], -1)
    minima = torch.cat([second & 63, (low >> 4) | (second >> 6 << 4)], -1)
    return scales.float(), minima.float()


def _levels(codes: Tensor, levels: tuple[int, ...]) -> Tensor:
    return torch.tensor(levels, dtype=torch.float32, device=codes.device)[codes.int()]


def _q4_0(b):
    return _half(b, 0) * (_fields(b[..., 2:], (0, 4), 15).float() - 8)


def _q4_1(b):
    return _half(b, 0) * _fields(b[..., 4:], (0, 4), 15).float() + _half(b, 2)


def _q5_0(b):
    return _half(b, 0) * ((_fields(b[..., 6:], (0, 4), 15) | (_bits(b[..., 2:6]) << 4)).float() - 16)


def _q5_1(b):
    return _half(b, 0) * (_fields(b[..., 8:], (0, 4), 15) | (_bits(b[..., 4:8]) << 4)).float() + _half(b, 2)


def _q8_0(b):
    return _half(b, 0) * b[..., 2:].clone(memory_format=torch.contiguous_format).view(torch.int8).float()


def _q2_k(b):
    scales, q = b[..., :16], _fields(b[..., 16:80], (0, 2, 4, 6), 3, 32).float()
    return _less(_parts(_half(b, 80) * (scales & 15).float(), q), _half(b, 82) * (scales >> 4).float())


def _less(values: Tensor, minima: Tensor) -> Tensor:
    return (values.unflatten(-1, (minima.shape[-1], -1)) - minima.unsqueeze(-1)).flatten(-2)


def _q3_k(b):
    # A set bit of the mask means that nothing is taken off.
    q = _fields(b[..., 32:96], (0, 2, 4, 6), 3, 32).float() - 4 * (1 - _fields(b[..., :32], range(8), 1).float())
    scales = _fields(b[..., 96:104], (0, 4), 15) | (_fields(b[..., 104:108], (0, 2, 4, 6), 3) << 4)
    return _parts(_half(b, 108) * (scales.float() - 32), q)


def _q4_k(b):
    scales, minima = _six_bits(b[..., 4:16])
    return _less(_parts(_half(b, 0) * scales, _fields(b[..., 16:], (0, 4), 15, 32).float()), _half(b, 2) * minima)


def _q5_k(b):
    scales, minima = _six_bits(b[..., 4:16])
    q = _fields(b[..., 48:], (0, 4), 15, 32) | (_fields(b[..., 16:48], range(8), 1) << 4)
    return _less(_parts(_half(b, 0) * scales, q.float()), _half(b, 2) * minima)


def _q6_k(b):
    q = _fields(b[..., :128], (0, 4), 15, 64) | (_fields(b[..., 128:192], (0, 2, 4, 6), 3, 32) << 4)
    scales = b[..., 192:208].clone(memory_format=torch.contiguous_format).view(torch.int8).float()
    return _parts(_half(b, 208) * scales, q.float() - 32)


def _iq4_nl(b):
    return _half(b, 0) * _levels(_fields(b[..., 2:], (0, 4), 15), UNEVEN)


def _iq4_xs(b):
    low = torch.stack([b[..., 4:8] & 15, b[..., 4:8] >> 4], -1).flatten(-2)
    high = torch.stack([(b[..., 2:4] >> s) & 3 for s in (0, 2, 4, 6)], -1).flatten(-2)
    return _parts(_half(b, 0) * ((low | (high << 4)).float() - 32), _levels(_fields(b[..., 8:], (0, 4), 15, 16), UNEVEN))


def _mxfp4(b):
    # Half of 2^(e - 127), since the levels are doubled: exponents 0 and 1 are subnormal numbers of fp32.
    e = b[..., :1].int()
    half = torch.where(e < 2, 0x00200000 << e.clamp(max=1), (e - 1).clamp(min=0) << 23).view(torch.float32)
    return half * _levels(_fields(b[..., 1:], (0, 4), 15), FP4_TWICE)


@dataclass(frozen=True)
class BlockType:
    """`length` weights in `size` bytes; decode: (..., size) uint8 -> (..., length) fp32."""

    length: int
    size: int
    decode: Callable[[Tensor], Tensor]

    def width(self, columns: int) -> int:
        """Bytes of a row of `columns` weights, its last block filled up."""
        return -(-columns // self.length) * self.size


BLOCK_TYPES = {
    "q4_0": BlockType(32, 18, _q4_0), "q4_1": BlockType(32, 20, _q4_1), "q5_0": BlockType(32, 22, _q5_0),
    "q5_1": BlockType(32, 24, _q5_1), "q8_0": BlockType(32, 34, _q8_0), "q2_k": BlockType(256, 84, _q2_k),
    "q3_k": BlockType(256, 110, _q3_k), "q4_k": BlockType(256, 144, _q4_k), "q5_k": BlockType(256, 176, _q5_k),
    "q6_k": BlockType(256, 210, _q6_k), "iq4_nl": BlockType(32, 18, _iq4_nl), "iq4_xs": BlockType(256, 136, _iq4_xs),
    "mxfp4": BlockType(32, 17, _mxfp4),
}


def decode_rows(blocks: Tensor, kind: str, columns: int) -> Tensor:
    """Rows of blocks (n, bytes) uint8 -> (n, columns) fp32."""
    found = BLOCK_TYPES[kind]
    return found.decode(blocks.unflatten(-1, (-1, found.size))).flatten(-2)[:, :columns]
