"""The vector code of `_loops`, written out for LLVM: what a vector of codes means, its sums with x, and blocks of sums.

Left to LLVM, a group of 64 weights would be a loop with a sum across lanes and a test of overlapping memory, which take as long as its
products. Codes that share a byte, b bits each, are taken out plane by plane: plane i has codes i, i + each, ... (each = 8 / b). `spread`
weaves them; for `dot` the row of x lies in planes as well: `width` = columns / each numbers of plane 0, then those of plane 1, ...
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import llvmlite.binding
import numba
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

#: sums may be taken in any order; nothing is said of NaN and infinity, which come through
ANY_ORDER = ("reassoc", "contract", "nsz")


class Code(NamedTuple):
    """What codes of `bits` bits mean: (code - zero) * scale, or table[code] * scale with 16 numbers (4 bits)."""

    bits: int
    unit: int
    """Codes that are taken at a time, of which runs with one scale are multiples: 64, 32 or 16."""
    looked_up: bool = False
    high_first: bool = False
    """Whether the first code of a byte is in its highest bits."""

    @property
    def lanes(self) -> int:
        """Bytes of codes, and floats of a plane."""
        return self.unit * self.bits // 8


def code(bits: int, run: int, looked_up: bool = False, high_first: bool = False) -> Code:
    """Of runs of a multiple of 16 codes: as many at a time as make four sums side by side, where they are that long."""
    largest = 64 if _has("avx512f") else 32
    unit = next((size for size in (64, 32) if size <= largest and run % size == 0), 16)
    return Code(bits, unit, looked_up, high_first)


@cache
def kept_as() -> tuple[torch.dtype, ...]:
    """Dtypes in which scales and zeros may be kept: fp16 where a processor converts it."""
    return (torch.float32, torch.bfloat16, torch.uint8, *([torch.float16] if _has("f16c") else []))


def widened(builder, dtype, value):
    if dtype == torch.float16:
        return builder.fpext(builder.bitcast(value, ir.HalfType()), ir.FloatType())
    if dtype == torch.bfloat16:
        wide = builder.shl(builder.zext(value, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(wide, ir.FloatType())
    return builder.uitofp(value, ir.FloatType()) if dtype == torch.uint8 else value


@cache
def spread(code: Code, once: bool = False) -> Callable:
    """spread(codes, at, table, zero, scale, out, to, many): (code - zero) * scale, or table[code] * scale, of the codes of `many` bytes
    (whole vectors; one, if once) from codes[at] on, in their order, in out[to:]."""
    vectors, each = _Vectors(code, once), 8 // code.bits

    @intrinsic
    def spread(typing, codes, at, table, zero, scale, out, to, many):
        def generate(context, builder, signature, arguments):
            codes, at, table, zero, scale, out, to, many = arguments
            codes, table, out = (data_of(context, builder, signature.args[i], value) for i, value in ((0, codes), (2, table), (5, out)))
            zero, scale, table = vectors.splat(builder, zero), vectors.splat(builder, scale), vectors.table(builder, table)

            def woven(planes):
                if len(planes) == 1:
                    return planes
                pairs = zip(woven(planes[::2]), woven(planes[1::2]))
                return [vectors.alternating(builder, pair, upper) for pair in pairs for upper in (0, 1)]

            with vectors.loop(builder, many) as k:
                planes = [values if code.looked_up else builder.fsub(values, zero)
                          for values in vectors.planes(builder, codes, at, k, table)]
                start = builder.add(to, builder.mul(k, ir.Constant(k.type, each)))
                for i, values in enumerate(woven([builder.fmul(values, scale) for values in planes])):
                    here = builder.add(start, ir.Constant(k.type, i * code.lanes))
                    builder.store(values, vectors.at(builder, out, here, vectors.floats), align=4)
            return context.get_dummy_value()

        long, real = types.int64, types.float32
        return types.void(codes, long, table, real, real, out, long, long), generate

    return spread


def dot(code: Code, once: bool, scales: torch.dtype) -> Callable:
    """dot(x, width, codes, at, span, runs, table, scale, g, within, run, group, sums): sums[0] = the sum of code * scale * x, or
    table[code] * scale * x, over so many runs of `span` bytes (whole vectors; one, if once) from codes[at] on; x: `width` numbers of every
    plane. The first run is `within` weights from the start of group g; a group is `group` weights, a run `run`."""
    vectors, each = _Vectors(code, once), 8 // code.bits

    @intrinsic
    def dot(typing, x, width, codes, at, span, runs, table, scale, g, within, run, group, sums):
        def generate(context, builder, signature, arguments):
            x, width, codes, at, span, runs, table, scale, g, within, run, group, sums = arguments
            arrays = ((0, x), (2, codes), (6, table), (7, scale), (12, sums))
            x, codes, table, scale, sums = (data_of(context, builder, signature.args[i], value) for i, value in arrays)
            number, nothing = g.type, vectors.constant(vectors.floats, 0.0)
            total, *own = (cgutils.alloca_once(builder, vectors.floats) for _ in range(1 + each))
            at_group, at_weight = (cgutils.alloca_once_value(builder, value) for value in (g, within))
            builder.store(nothing, total)
            table = vectors.table(builder, table)

            def add(here, value):
                builder.store(builder.fadd(builder.load(here), value, flags=ANY_ORDER), here)

            with cgutils.for_range(builder, runs) as over:
                start = builder.mul(over.index, span)
                for here in own:
                    builder.store(nothing, here)
                with vectors.loop(builder, span) as k:
                    offset = builder.add(start, k)
                    planes = vectors.planes(builder, codes, builder.add(at, start), k, table)
                    for i, (here, values) in enumerate(zip(own, planes)):
                        place = builder.add(offset, builder.mul(width, ir.Constant(number, i)))
                        met = builder.load(vectors.at(builder, x, place, vectors.floats), align=4)
                        add(here, builder.fmul(met, values, flags=ANY_ORDER))
                found = builder.load(own[0])
                for here in own[1:]:
                    found = builder.fadd(found, builder.load(here), flags=ANY_ORDER)
                now = builder.load(at_group)
                by = vectors.splat(builder, widened(builder, scales, builder.load(builder.gep(scale, [now]))))
                add(total, builder.fmul(found, by, flags=ANY_ORDER))
                after = builder.add(builder.load(at_weight), run)
                ends = builder.icmp_signed("==", after, group)
                builder.store(builder.add(now, builder.zext(ends, number)), at_group)
                builder.store(builder.select(ends, ir.Constant(number, 0), after), at_weight)
            builder.store(vectors.sum(builder, builder.load(total)), sums)
            return context.get_dummy_value()

        long = types.int64
        return types.void(x, long, codes, long, long, long, table, scale, long, long, long, long, sums), generate

    return dot


def most_rows() -> int:
    """Rows of x up to which `product` is quicker than a tile of floats and an fp32 product of PyTorch."""
    return 128 if _has("avx512f") else 32


def block_sizes() -> tuple[int, int]:
    """(rows of x, rows of W) whose products are summed side by side: as many sums as a vector has lanes, which leaves registers."""
    return (4, 4) if _has("avx512f") else (4, 2)


@cache
def block(rows: int, outs: int) -> Callable:
    """block(x, at, w, columns, sums): sums[i outs + j] = x[at + i columns:] . w[j columns:], i below rows, j below outs; columns: whole
    vectors."""
    lanes = math.prod(block_sizes())
    floats, number, long = ir.VectorType(ir.FloatType(), lanes), ir.IntType(32), types.int64

    def mixed(builder, both, width, upper):
        """Of two vectors the lower (upper) halves of runs of `width` lanes, one after the other."""
        runs = [range(start + upper * width // 2, start + upper * width // 2 + width // 2) for start in range(0, 2 * lanes, width)]
        return builder.shuffle_vector(*both, ir.Constant(ir.VectorType(number, lanes), [lane for run in runs for lane in run]))

    def total(builder, vectors):
        """The sum of every vector, in the first lanes of one."""
        width = lanes
        while width > 1:
            pairs = list(zip(vectors[::2], vectors[1::2])) if len(vectors) > 1 else [(vectors[0], vectors[0])]
            vectors = [builder.fadd(*(mixed(builder, pair, width, upper) for upper in (0, 1)), flags=ANY_ORDER) for pair in pairs]
            width //= 2
        return vectors[0]

    @intrinsic
    def block(typing, x, at, w, columns, sums):
        def generate(context, builder, signature, arguments):
            x, at, w, columns, sums = arguments
            x, w, sums = (data_of(context, builder, signature.args[i], value) for i, value in ((0, x), (2, w), (4, sums)))
            own = [cgutils.alloca_once(builder, floats) for _ in range(rows * outs)]
            for each in own:
                builder.store(ir.Constant(floats, [0.0] * lanes), each)

            def row(data, start, i, k):
                offset = builder.add(builder.add(start, builder.mul(columns, ir.Constant(columns.type, i))), k)
                return builder.load(builder.bitcast(builder.gep(data, [offset]), floats.as_pointer()), align=4)

            step = ir.Constant(columns.type, lanes)
            with cgutils.for_range(builder, builder.udiv(columns, step)) as loop:
                k, zero = builder.mul(loop.index, step), ir.Constant(columns.type, 0)
                right = [row(w, zero, j, k) for j in range(outs)]
                for i in range(rows):
                    left = row(x, at, i, k)
                    for j in range(outs):
                        product = builder.fmul(left, right[j], flags=ANY_ORDER)
                        here = own[i * outs + j]
                        builder.store(builder.fadd(builder.load(here), product, flags=ANY_ORDER), here)
            found = total(builder, [builder.load(each) for each in own])
            kept = ir.VectorType(ir.FloatType(), rows * outs)
            found = builder.shuffle_vector(found, found, ir.Constant(ir.VectorType(number, rows * outs), list(range(rows * outs))))
            builder.store(found, builder.bitcast(sums, kept.as_pointer()), align=4)
            return context.get_dummy_value()

        return types.void(x, long, w, long, sums), generate

    return block


def data_of(context, builder, kind, array):
    return context.make_array(kind)(context, builder, array).data


class _Vectors:
    """Instructions on vectors of `lanes` bytes of codes, or as many floats."""

    def __init__(self, code: Code, once: bool):
        self.code, self.once, self.lanes, self.int = code, once, code.lanes, ir.IntType(32)
        self.floats, self.ints, self.bytes = (ir.VectorType(kind, self.lanes) for kind in (ir.FloatType(), self.int, ir.IntType(8)))

    def constant(self, kind, value):
        return ir.Constant(kind, [value] * self.lanes)

    def splat(self, builder, value):
        empty = ir.Constant(self.floats, ir.Undefined)
        return builder.shuffle_vector(builder.insert_element(empty, value, ir.Constant(self.int, 0)), empty, self.constant(self.ints, 0))

    def at(self, builder, data, offset, kind):
        """Where the vector is that begins with an element of an array."""
        return builder.bitcast(data if offset is None else builder.gep(data, [offset]), kind.as_pointer())

    def alternating(self, builder, pair, upper):
        """The lower (upper) halves of two vectors, an element of each in turn."""
        taken = [upper * self.lanes // 2 + i // 2 + i % 2 * self.lanes for i in range(self.lanes)]
        return builder.shuffle_vector(*pair, ir.Constant(self.ints, taken))

    def sum(self, builder, value):
        lanes = self.lanes
        while lanes > 1:
            lanes //= 2
            halves = (ir.Constant(ir.VectorType(self.int, lanes), list(range(start, start + lanes))) for start in (0, lanes))
            value = builder.fadd(*(builder.shuffle_vector(value, value, half) for half in halves), flags=ANY_ORDER)
        return builder.extract_element(value, ir.Constant(self.int, 0))

    @contextmanager
    def loop(self, builder, many):
        """Over k = 0, lanes, ... below many."""
        if self.once:
            yield ir.Constant(many.type, 0)
            return
        step = ir.Constant(many.type, self.lanes)
        with cgutils.for_range(builder, builder.udiv(many, step)) as loop:
            yield builder.mul(loop.index, step)

    def planes(self, builder, codes, at, k, table):
        """For every plane what the codes of the bytes from codes[at + k] on mean but for zero and scale, as floats."""
        wide = builder.zext(builder.load(self.at(builder, codes, builder.add(at, k), self.bytes), align=1), self.ints)
        bits, permuted = self.code.bits, isinstance(table, list)
        for low in sorted(range(0, 8, bits), reverse=self.code.high_first):
            own = builder.lshr(wide, self.constant(self.ints, low))
            if not (permuted and len(table) == 1):  # a permutation of 16 numbers takes the lowest four bits alone
                own = builder.and_(own, self.constant(self.ints, 2**bits - 1))
            yield self._looked_up(builder, own, table) if self.code.looked_up or permuted else builder.sitofp(own, self.floats)

    def table(self, builder, data):
        """The table as `planes` wants it: in registers if a processor can look up there, which beats converting codes if one is enough."""
        width = self._registers()
        if not self.code.looked_up and self.code.bits == 4 and width == 16:
            return [ir.Constant(ir.VectorType(ir.FloatType(), 16), [float(code) for code in range(16)])]
        if not self.code.looked_up or not width:
            return data
        kind = ir.VectorType(ir.FloatType(), width)
        starts = (ir.Constant(ir.IntType(64), start) for start in range(0, 16, width))
        return [builder.load(self.at(builder, data, start, kind), align=4) for start in starts]

    def _registers(self) -> int:
        """Numbers of a register that this processor can permute by indices; 0: it cannot, or codes are fewer."""
        return 16 if self.lanes % 16 == 0 and _has("avx512f") else 8 if _has("avx2") else 0

    def _looked_up(self, builder, own, table):
        if not isinstance(table, list):
            found = ir.Constant(self.floats, ir.Undefined)
            for lane in range(self.lanes):
                lane = ir.Constant(self.int, lane)
                found = builder.insert_element(found, builder.load(builder.gep(table, [builder.extract_element(own, lane)])), lane)
            return found
        width = self._registers()
        floats, ints = (ir.VectorType(kind, width) for kind in (ir.FloatType(), self.int))
        name = {16: "llvm.x86.avx512.permvar.sf.512", 8: "llvm.x86.avx2.permps"}[width]
        permute = cgutils.get_or_insert_function(builder.module, ir.FunctionType(floats, [floats, ints]), name)
        parts = []
        for start in range(0, self.lanes, width):
            index = builder.shuffle_vector(own, own, ir.Constant(ints, list(range(start, start + width))))
            found, *above = (builder.call(permute, [numbers, index]) for numbers in table)  # the lowest bits of an index count
            if above:
                found = builder.select(builder.icmp_unsigned("<", index, ir.Constant(ints, [8] * width)), found, *above)
            parts.append(found)
        while len(parts) > 1:
            both = ir.Constant(ir.VectorType(self.int, 2 * parts[0].type.count), list(range(2 * parts[0].type.count)))
            parts = [builder.shuffle_vector(*pair, both) for pair in zip(parts[::2], parts[1::2])]
        return parts[0]


@cache
def _has(feature: str) -> bool:
    """Whether numba compiles for a processor with it. (AVX2 looks 8 numbers up in a register.)"""
    named = numba.config.CPU_NAME or numba.config.CPU_FEATURES
    return not named and bool(llvmlite.binding.get_host_cpu_features().get(feature))
