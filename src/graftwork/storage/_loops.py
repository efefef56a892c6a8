"""The loops of `_compiled`, for numba; to be imported where it is installed.

Codes that share a byte, b bits each, are taken out plane by plane: plane i has codes i, i + each, ... of a row (each = 8 / b), and so has
a row of floats here: `width` = columns / each numbers of plane 0, then those of plane 1, ... `place` and `dot` are vector code written
out: left to LLVM, a group of 64 weights would be a loop with a sum across lanes and a test of overlapping memory, which take as long as
its products. The others are plain Python for numba. Indices are unsigned in innermost loops: one that may be negative counts from the end
in Python, and the test for it keeps a loop from vector code.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from functools import cache

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

#: sums may be taken in any order; nothing is said of NaN and infinity, which come through
ANY_ORDER = ("reassoc", "contract", "nsz")

_compiled = numba.njit(nogil=True, error_model="numpy")
_summing = numba.njit(nogil=True, error_model="numpy", fastmath=set(ANY_ORDER))


def lanes(bits: int) -> int:
    """Bytes of codes, and floats, in a vector: two chains of sums at least."""
    return max(8, 2 * bits)


@_compiled
def decode(codes, scale, pairs, out, block):
    """out (n,) <- pairs[byte] * scale[block]."""
    size, two, one = out.shape[0], np.uint64(2), np.uint64(1)
    for b in range(scale.shape[0]):
        start, by = np.uint64(b * block), scale[b]
        stop = np.uint64(min(size, b * block + block))
        for byte in range(start // two, stop // two):
            own = codes[byte]
            out[two * byte] = pairs[own, 0] * by
            out[two * byte + one] = pairs[own, 1] * by
        if stop % two:
            out[stop - one] = pairs[codes[stop // two], 0] * by


@cache
def whole() -> Callable:
    """loop(codes, scale, zero, out, group): out (n,) <- (code - zero) * scale, codes of 8 bits."""
    place, wide, f32 = _place(8), lanes(8), np.float32

    @_compiled
    def decode_whole(codes, scale, zero, out, group):
        for g in range(scale.shape[0]):
            start, stop = g * group, min(out.shape[0], g * group + group)
            vectors = (stop - start) // wide * wide
            place(codes, start, zero[g], scale[g], out, start, 0, vectors)
            for k in range(start + vectors, stop):
                out[k] = (f32(codes[k]) - zero[g]) * scale[g]

    return decode_whole


@cache
def products(bits: int) -> tuple[Callable, Callable]:
    """(for one row of x, for more): loop(first, last, x, codes, scale, zero, y, group, run) fills columns first ... last of y (m, out).

    x (m, in); group, run: see `_compiled.few_product`."""
    each, f32, index = 8 // bits, np.float32, np.uint64
    place, dot, wide = _place(bits), _dot(bits), lanes(bits)

    @_compiled
    def planes(x):
        if each == 1:
            return x
        own, width = np.empty_like(x), index(x.shape[1] // each)
        for r in range(x.shape[0]):
            for i in range(index(each)):
                for k in range(width):
                    own[r, i * width + k] = x[r, k * index(each) + i]
        return own

    @_summing
    def one(first, last, x, codes, scale, zero, y, group, run):
        columns, vector = x.shape[1], planes(x)[0]
        width, span, parts = columns // each, run // each, columns // run
        totals, sums = np.zeros(parts, f32), np.zeros(wide, f32)
        for j in range(parts):
            for i in range(each):
                for k in range(index(i * width + j * span), index(i * width + j * span + span)):
                    totals[j] += vector[k]
        for o in range(first, last):
            g, within = index(o * columns // group), o * columns % group
            found = f32(0)
            sums[:] = 0
            for j in range(index(parts)):
                dot(vector, j * index(span), width, codes, index(o * width) + j * index(span), span, scale[g], sums)
                found -= scale[g] * f32(zero[g]) * totals[j]
                within += run
                if within == group:  # a division would take as long as a group
                    g, within = g + index(1), 0
            for lane in range(wide):
                found += sums[lane]
            y[0, o] = found

    @_compiled
    def decoded(o, codes, scale, zero, row, group, run):
        columns = row.shape[0]
        width, span = columns // each, run // each
        g, within = index(o * columns // group), o * columns % group
        for j in range(index(columns // run)):
            place(codes, index(o * width) + j * index(span), f32(zero[g]), scale[g], row, j * index(span), width, span)
            within += run
            if within == group:
                g, within = g + index(1), 0

    @_summing
    def few(first, last, x, codes, scale, zero, y, group, run):
        (rows, columns), x = x.shape, planes(x)
        p, q = np.zeros(columns, f32), np.zeros(columns, f32)
        for o in range(first, last, 2):
            both = min(o + 1, last - 1)  # an odd last row is computed twice
            decoded(o, codes, scale, zero, p, group, run)
            decoded(both, codes, scale, zero, q, group, run)
            r = 0
            while r < rows:
                if rows - r < 4 <= rows:  # the last four again, in the loop of four
                    r = rows - 4
                if rows >= 4:
                    a, b, c, d, e, f, g, h = f32(0), f32(0), f32(0), f32(0), f32(0), f32(0), f32(0), f32(0)
                    for k in range(columns):
                        u, v = p[k], q[k]
                        a += x[r, k] * u
                        b += x[r + 1, k] * u
                        c += x[r + 2, k] * u
                        d += x[r + 3, k] * u
                        e += x[r, k] * v
                        f += x[r + 1, k] * v
                        g += x[r + 2, k] * v
                        h += x[r + 3, k] * v
                    y[r, o], y[r + 1, o], y[r + 2, o], y[r + 3, o] = a, b, c, d
                    y[r, both], y[r + 1, both], y[r + 2, both], y[r + 3, both] = e, f, g, h
                    r += 4
                else:
                    a, e = f32(0), f32(0)
                    for k in range(columns):
                        a += x[r, k] * p[k]
                        e += x[r, k] * q[k]
                    y[r, o], y[r, both] = a, e
                    r += 1

    return one, few


# -- vector code ----------------------------------------------------------------------------------------------------------
@cache
def _place(bits: int) -> Callable:
    """place(codes, at, zero, scale, row, to, width, many): the codes of `many` bytes (whole vectors) from codes[at] on become
    (code - zero) * scale in row[to:], those of plane i in row[to + i width:]."""
    code = _Vectors(bits)

    @intrinsic
    def place(typing, codes, at, zero, scale, row, to, width, many):
        def generate(context, builder, signature, arguments):
            codes, at, zero, scale, row, to, width, many = arguments
            codes, row = (_data(context, builder, signature.args[i], value) for i, value in ((0, codes), (4, row)))
            zero, scale = code.splat(builder, zero), code.splat(builder, scale)
            with code.loop(builder, many) as k:
                for values, here in code.planes(builder, codes, at, row, to, width, k):
                    builder.store(builder.fmul(builder.fsub(values, zero), scale), here, align=4)
            return context.get_dummy_value()

        long, real = types.int64, types.float32
        return types.void(codes, long, real, real, row, long, long, long), generate

    return place


def _dot(bits: int) -> Callable:
    """dot(x, to, width, codes, at, many, scale, sums): adds scale * sum of code * x over the codes of `many` bytes (whole vectors) from
    codes[at] on to sums (lanes,) fp32, each lane its part; x as a row of `place`."""
    code = _Vectors(bits)

    @intrinsic
    def dot(typing, x, to, width, codes, at, many, scale, sums):
        def generate(context, builder, signature, arguments):
            x, to, width, codes, at, many, scale, sums = arguments
            x, codes, sums = (_data(context, builder, signature.args[i], value) for i, value in ((0, x), (3, codes), (7, sums)))
            own = [cgutils.alloca_once(builder, code.floats) for _ in range(8 // bits)]
            for each in own:
                builder.store(code.constant(code.floats, 0.0), each)
            with code.loop(builder, many) as k:
                for each, (values, here) in zip(own, code.planes(builder, codes, at, x, to, width, k)):
                    product = builder.fmul(builder.load(here, align=4), values, flags=ANY_ORDER)
                    builder.store(builder.fadd(builder.load(each), product, flags=ANY_ORDER), each)
            found = builder.load(own[0])
            for each in own[1:]:
                found = builder.fadd(found, builder.load(each), flags=ANY_ORDER)
            total, scaled = code.at(builder, sums, None, code.floats), builder.fmul(found, code.splat(builder, scale), flags=ANY_ORDER)
            builder.store(builder.fadd(builder.load(total, align=4), scaled, flags=ANY_ORDER), total, align=4)
            return context.get_dummy_value()

        long = types.int64
        return types.void(x, long, long, codes, long, long, types.float32, sums), generate

    return dot


def _data(context, builder, kind, array):
    return context.make_array(kind)(context, builder, array).data


class _Vectors:
    """Instructions on vectors of `lanes(bits)` bytes of codes, or as many floats."""

    def __init__(self, bits: int):
        self.bits, self.lanes, self.int = bits, lanes(bits), ir.IntType(32)
        self.floats, self.ints, self.bytes = (ir.VectorType(kind, self.lanes) for kind in (ir.FloatType(), self.int, ir.IntType(8)))

    def constant(self, kind, value):
        return ir.Constant(kind, [value] * self.lanes)

    def splat(self, builder, value):
        empty = ir.Constant(self.floats, ir.Undefined)
        return builder.shuffle_vector(builder.insert_element(empty, value, ir.Constant(self.int, 0)), empty, self.constant(self.ints, 0))

    def at(self, builder, data, offset, kind):
        """Where the vector is that begins with an element of an array."""
        return builder.bitcast(data if offset is None else builder.gep(data, [offset]), kind.as_pointer())

    @contextmanager
    def loop(self, builder, many):
        """Over k = 0, lanes, ... below many."""
        step = ir.Constant(many.type, self.lanes)
        with cgutils.for_range(builder, builder.udiv(many, step)) as loop:
            yield builder.mul(loop.index, step)

    def planes(self, builder, codes, at, row, to, width, k):
        """For every plane: (the codes of the bytes from codes[at + k] on, as floats; where those of row[to + k] are)."""
        wide = builder.zext(builder.load(self.at(builder, codes, builder.add(at, k), self.bytes), align=1), self.ints)
        start = builder.add(to, k)
        for low in range(0, 8, self.bits):
            own = builder.and_(builder.lshr(wide, self.constant(self.ints, low)), self.constant(self.ints, 2**self.bits - 1))
            yield builder.sitofp(own, self.floats), self.at(builder, row, start, self.floats)
            start = builder.add(start, width)
