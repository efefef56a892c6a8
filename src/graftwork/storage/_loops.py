"""The loops of `_compiled`, for numba; to be imported where it is installed.

A loop is a function of C of one argument, a job: int64 numbers, and for every array its address and its length. Each thread of a team takes
its part of the work (`_share`), all of it without one.

Loops are plain Python for numba around vector code (`_vectors`). Indices are unsigned in innermost loops: one that may be negative counts
from the end in Python, and the test for it keeps a loop from vector code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numba
import numpy as np
import torch
from numba.core import types
from numba.extending import intrinsic

from . import _team
from . import _vectors as vectors

_compiled = numba.njit(nogil=True, error_model="numpy")
_summing = numba.njit(nogil=True, error_model="numpy", fastmath=set(vectors.ANY_ORDER))


def _entry(loop: Callable) -> _team.Loop:
    compiled = numba.cfunc(types.void(types.CPointer(types.int64)), nopython=True, error_model="numpy")(loop)
    return _team.Loop(compiled.address, compiled)


# -- jobs ---------------------------------------------------------------------------------------------------------------
_, _number, _size = _team.openmp() or (None, _compiled(lambda: 0), _compiled(lambda: 1))


@_compiled
def _share(parts, together):
    """The parts of this thread: first, last; a multiple of `together`, but for the end of all."""
    me, size = _number(), _size()
    last = parts if me + 1 == size else parts * (me + 1) // size // together * together
    return parts * me // size // together * together, last


@intrinsic
def _pointer(typing, address):
    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


@_compiled
def _floats(job, at):
    return numba.carray(_pointer(job[at]), (job[at + 1],), np.float32)


@_compiled
def _bytes(job, at):
    return numba.carray(_pointer(job[at]), (job[at + 1],), np.uint8)


@_compiled
def _shorts(job, at):
    return numba.carray(_pointer(job[at]), (job[at + 1],), np.uint16)


@cache
def numbers_of(dtype: torch.dtype | None) -> tuple[Callable, Callable]:
    """(array of a job, number of it as fp32), of a dtype in which scales and zeros are kept; None: one fp32 number for all."""

    @intrinsic
    def number(typing, array, index):
        def generate(context, builder, signature, arguments):
            data = vectors.data_of(context, builder, signature.args[0], arguments[0])
            return vectors.widened(builder, dtype, builder.load(data if dtype is None else builder.gep(data, [arguments[1]])))

        return types.float32(array, index), generate

    return {None: _floats, torch.float32: _floats, torch.uint8: _bytes}.get(dtype, _shorts), number


@_compiled
def _aligned(size):
    """fp32 zeros (size,), of which no vector lies in two lines of the cache."""
    found = np.zeros(size + 16, np.float32)
    return found[-found.ctypes.data % 64 // 4:][:size]


# -- values -------------------------------------------------------------------------------------------------------------
@cache
def decoder(code: vectors.Code) -> _team.Loop:
    """job (blocks, block, codes, scale, table, out): out (n,) <- table[code] * scale of its block; 4 bits; block: even."""
    spread, wide, shifts = vectors.spread(code), code.lanes, (4, 0) if code.high_first else (0, 4)
    first_shift, second_shift = shifts
    two, one, low, f32 = np.uint64(2), np.uint64(1), np.uint8(15), np.float32

    @_compiled
    def decode(first, last, block, codes, scale, table, out):
        size = out.shape[0]
        for b in range(first, last):
            start, by = np.uint64(b * block), scale[b]
            stop = np.uint64(min(size, b * block + block))
            vectors = (stop - start) // two // np.uint64(wide) * np.uint64(wide)
            spread(codes, start // two, table, f32(0), by, out, start, vectors)
            for byte in range(start // two + vectors, stop // two):
                own = codes[byte]
                out[two * byte] = table[(own >> first_shift) & low] * by
                out[two * byte + one] = table[(own >> second_shift) & low] * by
            if stop % two:
                out[stop - one] = table[(codes[stop // two] >> first_shift) & low] * by

    def loop(job):
        first, last = _share(job[0], 1)
        decode(first, last, job[1], _bytes(job, 2), _floats(job, 4), _floats(job, 6), _floats(job, 8))

    return _entry(loop)


@cache
def whole(code: vectors.Code) -> _team.Loop:
    """job (groups, group, codes, scale, zero, out): out (n,) <- (code - zero) * scale, codes of 8 bits."""
    spread, wide, f32 = vectors.spread(code), code.lanes, np.float32

    @_compiled
    def decode(first, last, group, codes, scale, zero, out):
        for g in range(first, last):
            start, stop = g * group, min(out.shape[0], g * group + group)
            vectors = (stop - start) // wide * wide
            spread(codes, start, zero, zero[g], scale[g], out, start, vectors)
            for k in range(start + vectors, stop):
                out[k] = (f32(codes[k]) - zero[g]) * scale[g]

    def loop(job):
        first, last = _share(job[0], 1)
        decode(first, last, job[1], _bytes(job, 2), _floats(job, 4), _floats(job, 6), _floats(job, 8))

    return _entry(loop)


# -- products -----------------------------------------------------------------------------------------------------------
@cache
def product(code: vectors.Code, once: bool, scales: torch.dtype, zeros: torch.dtype | None, one_row: bool) -> _team.Loop:
    """job (out, group, run, parts, x, codes, scale, zero, table, y), for one row of x or for more; once: a run is one unit of code.

    x (m * in,), the first of so many parts of all rows first, y (m * out,), zeros where there are more rows; group, run: see
    `_compiled.few_product`; scale, zero: in dtypes of `numbers_of`."""
    each, f32, index, from_table = 8 // code.bits, np.float32, np.uint64, code.looked_up
    spread, dot, (rows_of, outs_of) = vectors.spread(code, once), vectors.dot(code, once, scales), vectors.block_sizes()
    (scales_at, scale_of), (zeros_at, zero_of) = numbers_of(scales), numbers_of(zeros)
    many, single = vectors.block(rows_of, outs_of), vectors.block(1, outs_of)

    @_summing
    def one(first, last, x, codes, scale, zero, table, y, group, run):
        columns = x.shape[1]
        width, span, runs = columns // each, run // each, columns // run
        vector, totals, sums = _aligned(columns), np.zeros(runs, f32), np.zeros(1, f32)
        for i in range(index(each)):
            for k in range(index(width)):
                vector[i * index(width) + k] = x[0, k * index(each) + i]
        if not from_table:
            for j in range(runs):
                for i in range(each):
                    for k in range(index(i * width + j * span), index(i * width + j * span + span)):
                        totals[j] += vector[k]
        for o in range(first, last):
            g, within = o * columns // group, o * columns % group
            dot(vector, width, codes, o * width, span, runs, table, scale, g, within, run, group, sums)
            found = sums[0]
            if not from_table and run == group:
                for j in range(index(runs)):
                    found -= scale_of(scale, index(g) + j) * zero_of(zero, index(g) + j) * totals[j]
            elif not from_table:
                for j in range(index(runs)):
                    found -= scale_of(scale, g) * zero_of(zero, g) * totals[j]
                    within += run
                    if within == group:  # a division would take as long as a group
                        g, within = g + 1, 0
            y[0, o] = found

    @_compiled
    def decoded(start, codes, scale, zero, table, tile, to, columns, group, run):
        """tile[to:] = the weights start ... start + columns, read row by row."""
        g, within = index(start // group), start % group
        for j in range(index(columns // run)):
            own = f32(0) if from_table else zero_of(zero, g)
            at = index(start) + j * index(run)
            spread(codes, at // index(each), table, own, scale_of(scale, g), tile, index(to) + j * index(run), run // each)
            within += run
            if within == group:
                g, within = g + index(1), 0

    @_compiled
    def few(first, last, x, codes, scale, zero, table, y, parts, group, run):
        rows, flat = x.shape[0], x.reshape(x.size)
        columns = x.shape[1] // parts
        tile, sums = _aligned(outs_of * columns), np.zeros(rows_of * outs_of, f32)
        for part in range(parts):
            for o in range(first, last, outs_of):
                outs = min(outs_of, last - o)
                for j in range(outs):
                    decoded(((o + j) * parts + part) * columns, codes, scale, zero, table, tile, j * columns, columns, group, run)
                r = 0
                while r < rows:
                    at, taken = (part * rows + r) * columns, rows_of if rows - r >= rows_of else 1
                    if taken == 1:
                        single(flat, at, tile, columns, sums)
                    else:
                        many(flat, at, tile, columns, sums)
                    for i in range(taken):
                        for j in range(outs):
                            y[r + i, o + j] += sums[i * outs_of + j]
                    r += taken

    def loop(job):
        out = job[0]
        first, last = _share(out, outs_of)
        y = _floats(job, 14)
        x, y = _floats(job, 4).reshape((y.shape[0] // out, -1)), y.reshape((y.shape[0] // out, out))
        codes, scale, zero, table = _bytes(job, 6), scales_at(job, 8), zeros_at(job, 10), _floats(job, 12)
        if one_row:
            one(first, last, x, codes, scale, zero, table, y, job[1], job[2])
        else:
            few(first, last, x, codes, scale, zero, table, y, job[3], job[1], job[2])

    return _entry(loop)
