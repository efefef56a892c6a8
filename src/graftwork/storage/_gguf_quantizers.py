"""Weights into GGML's block types: blocks (n, L) fp32 -> (n, bytes) uint8.

q4_0 ... q8_0 and mxfp4: the same bytes as the `gguf` package. The others have no single answer, and the package none; here each part
of a block gets the scale (and minimum) of least squares among a few trials: the codes of a trial scale are taken, scale and minimum
are fitted to those codes in closed form, and the best fit is kept. Then the parts' scales are coded by the block's fp16 numbers and
the codes are taken once more, to what is really kept. All weights count the same (llama.cpp weighs them by magnitude or by an
importance matrix).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..modeling.gguf_blocks import FP4_TWICE, UNEVEN

#: trial scales per part
TRIALS = 16


def _fp16(*numbers: Tensor) -> Tensor:
    """(n, 1) fp32 each -> their fp16 bytes side by side, (n, 2 each)."""
    return torch.cat(numbers, -1).half().contiguous().view(torch.uint8)


def _inverse(d: Tensor) -> Tensor:
    return torch.where(d == 0, torch.zeros_like(d), 1 / d).nan_to_num(posinf=0.0, neginf=0.0)


def _nibbles(codes: Tensor, run: int = 16) -> Tensor:
    """Runs of 2 `run` codes (n, m): the first half of a run in the low nibbles, the second in the high ones."""
    low, high = codes.unflatten(-1, (-1, 2, run)).unbind(-2)
    return (low | (high << 4)).flatten(-2)


def _pairs(codes: Tensor) -> Tensor:
    """2-bit codes (n, 256) -> (n, 64), in runs of four times 32."""
    four = codes.unflatten(-1, (-1, 4, 32))
    return (four[..., 0, :] | (four[..., 1, :] << 2) | (four[..., 2, :] << 4) | (four[..., 3, :] << 6)).flatten(-2)


def _bitmask(bits: Tensor, run: int) -> Tensor:
    """One bit a weight (n, 8 run) -> (n, run): bit k of byte i is weight k run + i; run 1: eight neighbours share a byte."""
    eight = bits.unflatten(-1, (-1, 8, run))
    found = eight[..., 0, :].clone()
    for k in range(1, 8):
        found |= eight[..., k, :] << k
    return found.flatten(-2)


# -- one scale or scale and minimum a block, as the gguf package has them ------------------------------------------------------
def _centred(bits: int) -> Callable[[Tensor], Tensor]:
    """q4_0, q5_0: the largest weight becomes the lowest code."""
    offset = 2 ** (bits - 1)

    def quantize(x: Tensor) -> Tensor:
        d = x.gather(-1, x.abs().argmax(-1, keepdim=True)) / -offset
        q = (x * _inverse(d) + (offset + 0.5)).trunc().clamp(0, 2 * offset - 1).to(torch.uint8)
        return torch.cat([_fp16(d), *([_bitmask(q >> 4, 1)] if bits == 5 else []), _nibbles(q & 15)], -1)

    return quantize


def _ranged(bits: int) -> Callable[[Tensor], Tensor]:
    """q4_1, q5_1: from the smallest weight to the largest."""
    top = 2**bits - 1

    def quantize(x: Tensor) -> Tensor:
        low = x.amin(-1, keepdim=True)
        d = (x.amax(-1, keepdim=True) - low) / top
        q = ((x - low) * _inverse(d) + 0.5).trunc().clamp(0, top).to(torch.uint8)
        return torch.cat([_fp16(d, low), *([_bitmask(q >> 4, 1)] if bits == 5 else []), _nibbles(q & 15)], -1)

    return quantize


def _q8_0(x: Tensor) -> Tensor:
    d = x.abs().amax(-1, keepdim=True) / 127
    unit = x * _inverse(d)
    size = unit.abs()
    q = unit.sign() * (size.floor() + (2 * (size - size.floor())).floor())  # halves away from zero
    return torch.cat([_fp16(d), q.to(torch.int8).view(torch.uint8)], -1)


def _mxfp4(x: Tensor) -> Tensor:
    largest = x.abs().amax(-1, keepdim=True)
    e = torch.where(largest > 0, largest.log2().floor() + 125, 0).clamp(0, 254).int()
    half = torch.where(e < 2, 0x00200000 << e.clamp(max=1), (e - 1).clamp(min=0) << 23).view(torch.float32)
    best, codes = torch.full_like(x, float("inf")), torch.zeros_like(x, dtype=torch.uint8)
    for code, level in enumerate(FP4_TWICE):  # the first of equally near levels
        error = (half * level - x).abs()
        codes, best = torch.where(error < best, code, codes).to(torch.uint8), torch.minimum(error, best)
    return torch.cat([e.to(torch.uint8), _nibbles(codes)], -1)


# -- searched ---------------------------------------------------------------------------------------------------------------------
def _fit_range(x: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """x (n, parts, k) -> (scale, minimum >= 0), (n, parts) each: x ~ scale q - minimum with codes 0 ... top."""
    count, low = x.shape[-1], x.amin(-1).clamp(max=0)
    spread, total = x.amax(-1).clamp(min=0) - low, x.sum(-1)
    scale, minimum = spread / top, -low
    best = ((x - low[..., None]) * _inverse(scale)[..., None]).round().mul(scale[..., None]).sub(minimum[..., None]).sub(x).square().sum(-1)
    for trial in range(TRIALS):
        unit = (top - 1.5 + 2.5 * trial / (TRIALS - 1)) * _inverse(spread)
        q = ((x - low[..., None]) * unit[..., None]).round().clamp(0, top)
        qq, q1, xq = q.square().sum(-1), q.sum(-1), (x * q).sum(-1)
        both = (count * xq - total * q1) * _inverse(count * qq - q1.square())
        floor = (both * q1 - total) / count
        free = floor > 0  # otherwise the minimum is held at 0
        s, m = torch.where(free, both, xq * _inverse(qq)), floor.clamp(min=0)
        error = (q * s[..., None] - m[..., None] - x).square().sum(-1)
        better = (error < best) & (s > 0)
        scale, minimum, best = torch.where(better, s, scale), torch.where(better, m, minimum), torch.where(better, error, best)
    return scale, minimum


def _fit_levels(x: Tensor, nearest: Callable[[Tensor], Tensor], extremes: Sequence[float]) -> Tensor:
    """x (n, parts, k) -> scale (n, parts), of either sign: x ~ scale * nearest(x / scale). extremes: where the largest weight may fall."""
    largest = x.gather(-1, x.abs().argmax(-1, keepdim=True)).squeeze(-1)
    scale, best = torch.zeros_like(largest), x.square().sum(-1)
    for place in extremes:
        q = nearest(x * (place * _inverse(largest))[..., None])
        s = (x * q).sum(-1) * _inverse(q.square().sum(-1))
        error = (q * s[..., None] - x).square().sum(-1)
        scale, best = torch.where(error < best, s, scale), torch.minimum(error, best)
    return scale


def _around(center: float, reach: float) -> list[float]:
    return [center + reach * (2 * trial / (TRIALS - 1) - 1) for trial in range(TRIALS)]


def _coded(scales: Tensor, low: int) -> tuple[Tensor, Tensor]:
    """Signed scales (n, parts) -> (d (n, 1) as kept, whole numbers (n, parts) from low to -low - 1): the largest becomes `low`."""
    d = (scales.gather(-1, scales.abs().argmax(-1, keepdim=True)) / low).half().float()
    return d, (scales * _inverse(d)).round().clamp(low, -low - 1)


def _ranged_parts(parts: int, top: int, scale_top: int, write: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    """q2_k, q4_k, q5_k: parts of a scale and a minimum, both coded 0 ... scale_top."""

    def quantize(x: Tensor) -> Tensor:
        x = x.unflatten(-1, (parts, -1))
        scale, minimum = _fit_range(x, top)
        d, dmin = ((v.amax(-1, keepdim=True) / scale_top).half().float() for v in (scale, minimum))
        s, m = ((v * _inverse(u)).round().clamp(0, scale_top) for v, u in ((scale, d), (minimum, dmin)))
        q = ((x + (dmin * m)[..., None]) * _inverse(d * s)[..., None]).round().clamp(0, top)
        return write(d, dmin, s.to(torch.uint8), m.to(torch.uint8), q.to(torch.uint8).flatten(-2))

    return quantize


def _write_q2_k(d, dmin, s, m, q):
    return torch.cat([s | (m << 4), _pairs(q), _fp16(d, dmin)], -1)


def _six_bits(s: Tensor, m: Tensor) -> Tensor:
    first, second = s[:, :4] | (s[:, 4:] >> 4 << 6), m[:, :4] | (m[:, 4:] >> 4 << 6)
    return torch.cat([first, second, (s[:, 4:] & 15) | ((m[:, 4:] & 15) << 4)], -1)


def _write_q4_k(d, dmin, s, m, q):
    return torch.cat([_fp16(d, dmin), _six_bits(s, m), _nibbles(q, 32)], -1)


def _write_q5_k(d, dmin, s, m, q):
    return torch.cat([_fp16(d, dmin), _six_bits(s, m), _bitmask(q >> 4, 32), _nibbles(q & 15, 32)], -1)


def _signed_parts(bits: int, low: int, write: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    """q3_k, q6_k: 16 parts of a signed scale, codes around zero."""
    half = 2 ** (bits - 1)

    def quantize(x: Tensor) -> Tensor:
        x = x.unflatten(-1, (16, -1))
        scale = _fit_levels(x, lambda u: u.round().clamp(-half, half - 1), [*_around(-half, 0.8), *_around(half - 1, 0.4)])
        d, s = _coded(scale, low)
        q = (x * _inverse(d * s)[..., None]).round().clamp(-half, half - 1) + half
        return write(d, s, q.to(torch.uint8).flatten(-2))

    return quantize


def _write_q3_k(d, s, q):
    s = (s + 32).to(torch.uint8)
    four = s.unflatten(-1, (4, 4)) >> 4
    high = four[:, 0] | (four[:, 1] << 2) | (four[:, 2] << 4) | (four[:, 3] << 6)
    return torch.cat([_bitmask(q >> 2, 32), _pairs(q & 3), (s[:, :8] & 15) | ((s[:, 8:] & 15) << 4), high, _fp16(d)], -1)


def _write_q6_k(d, s, q):
    return torch.cat([_nibbles(q & 15, 64), _pairs(q >> 4), s.to(torch.int8).view(torch.uint8), _fp16(d)], -1)


def _uneven(u: Tensor, values: bool = False) -> Tensor:
    """Codes of the nearest uneven levels, or those levels. They meet at halves of whole numbers, so half steps tell."""
    levels = torch.tensor(UNEVEN, dtype=torch.float32, device=u.device)
    steps = torch.arange(2 * (UNEVEN[-1] - UNEVEN[0]) + 1, device=u.device) / 2 + (UNEVEN[0] + 0.25)
    nearest = torch.bucketize(steps, (levels[1:] + levels[:-1]) / 2)
    place = ((u.clamp(UNEVEN[0], UNEVEN[-1]) - UNEVEN[0]) * 2).int()
    return (levels[nearest] if values else nearest.to(torch.uint8)).index_select(0, place.reshape(-1)).view(u.shape)


def _uneven_values(u: Tensor) -> Tensor:
    return _uneven(u, values=True)


_UNEVEN_ENDS = [*_around(-127, 16), *_around(113, 16)]


def _iq4_nl(x: Tensor) -> Tensor:
    d = _fit_levels(x[:, None], _uneven_values, _UNEVEN_ENDS).half().float()
    return torch.cat([_fp16(d), _nibbles(_uneven(x * _inverse(d)))], -1)


def _iq4_xs(x: Tensor) -> Tensor:
    parts = x.unflatten(-1, (8, -1))
    d, s = _coded(_fit_levels(parts, _uneven_values, _UNEVEN_ENDS), -32)
    codes = _uneven(parts * _inverse(d * s)[..., None]).flatten(-2)
    s = (s + 32).to(torch.uint8)
    low, high = s & 15, (s >> 4).unflatten(-1, (2, 4))
    high = high[..., 0] | (high[..., 1] << 2) | (high[..., 2] << 4) | (high[..., 3] << 6)
    return torch.cat([_fp16(d), high, low[:, ::2] | (low[:, 1::2] << 4), _nibbles(codes)], -1)


QUANTIZERS: dict[str, Callable[[Tensor], Tensor]] = {
    "q4_0": _centred(4), "q4_1": _ranged(4), "q5_0": _centred(5), "q5_1": _ranged(5), "q8_0": _q8_0, "mxfp4": _mxfp4,
    "q2_k": _ranged_parts(16, 3, 15, _write_q2_k), "q3_k": _signed_parts(3, -32, _write_q3_k),
    "q4_k": _ranged_parts(8, 15, 63, _write_q4_k), "q5_k": _ranged_parts(8, 31, 63, _write_q5_k),
    "q6_k": _signed_parts(6, -128, _write_q6_k), "iq4_nl": _iq4_nl, "iq4_xs": _iq4_xs,
}
