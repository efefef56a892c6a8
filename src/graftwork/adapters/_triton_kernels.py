"""Triton kernels for rows of different adapters: the change of the output, added to the frozen product in place.

    y_n += f_n (B_k A_k x_n + b_k),   k = index[n], nothing where it is -1;   x (N, T, in), A_k (r_k, in), B_k (r_k, out), y (N, T, out)

**Not run on a GPU.** `make test-triton` runs them in Triton's interpreter (TRITON_INTERPRET=1, CPU tensors) and compiles them for
sm_80, sm_90 and gfx942. That shows what they compute and that compilers take them, and nothing of their speed: block sizes are guesses.

The factors are those of a `Bank`: all lines of A, and of B, one below the other, and where each adapter's begin. So an adapter has its
own rank, whatever the others have, and nothing is padded or copied in global memory. A may be positions (PaCA, S2FT): the columns of x.

    rows    one program an entry (a token) and block of lines or outputs: each entry reads the factors of its adapter. For decodes.
    tiles   entries sorted by adapter, one program a tile of BLOCK_M entries of one adapter: the factors are read once a tile. For
            prefills. The tiles are found on the device; there are as many programs as the worst case of the index needs.

Both are two launches: shrink writes A_k x_n in fp32, (M, largest rank), expand reads it. Sums are fp32 throughout, and y is rounded
once. An entry's sum is taken in an order that no other entry changes, within one of the two kernels.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..modeling.protocols import has_values
from .batched import Bank

#: entries of one adapter in a tile; what tl.dot takes is 16 or more
BLOCK_M = 32
#: the interpreter multiplies bf16 matrices as if they were whole numbers, so they are widened there; products and sums are the same
INTERPRETED = triton.knobs.runtime.interpret
#: entries an adapter, on average, from which tiles are taken
TILES_FROM = 8


# -- one entry a program ------------------------------------------------------------------------------------------------------
@triton.jit
def _shrink_rows(x, A, hidden, index, starts, tokens, in_features, x_stride, hidden_stride,
                 POSITIONS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    entry = tl.program_id(0).to(tl.int64)
    k = tl.load(index + entry // tokens)
    start = tl.load(starts + tl.maximum(k, 0))
    end = tl.where(k >= 0, tl.load(starts + tl.maximum(k, 0) + 1), start)
    first = start + tl.program_id(1) * BLOCK_R
    lines = first + tl.arange(0, BLOCK_R)
    mine = lines < end
    if POSITIONS:
        columns = tl.load(A + lines, mask=mine, other=0)
        total = tl.load(x + entry * x_stride + columns, mask=mine, other=0.0).to(tl.float32)
    else:
        total = tl.zeros((BLOCK_R,), dtype=tl.float32)
        for at in range(0, tl.where(first < end, in_features, 0), BLOCK_K):
            columns = at + tl.arange(0, BLOCK_K)
            there = columns < in_features
            values = tl.load(x + entry * x_stride + columns, mask=there, other=0.0).to(tl.float32)
            factor = tl.load(A + lines[:, None] * in_features + columns[None, :], mask=mine[:, None] & there[None, :], other=0.0)
            total += tl.sum(factor.to(tl.float32) * values[None, :], axis=1)
    tl.store(hidden + entry * hidden_stride + (lines - start), total, mask=mine)


@triton.jit
def _expand_rows(hidden, B, y, bias, factors, index, starts, tokens, out_features, hidden_stride, y_stride,
                 BIAS: tl.constexpr, FACTORS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr):
    entry = tl.program_id(0).to(tl.int64)
    k = tl.load(index + entry // tokens)
    known = tl.maximum(k, 0)
    start = tl.load(starts + known)
    rank = tl.where(k >= 0, tl.load(starts + known + 1) - start, 0)
    outputs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = (outputs < out_features) & (k >= 0)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for at in range(0, rank, BLOCK_R):
        lines = at + tl.arange(0, BLOCK_R)
        mine = lines < rank
        values = tl.load(hidden + entry * hidden_stride + lines, mask=mine, other=0.0)
        factor = tl.load(B + (start + lines)[:, None] * out_features + outputs[None, :], mask=mine[:, None] & there[None, :], other=0.0)
        total += tl.sum(factor.to(tl.float32) * values[:, None], axis=0)
    if BIAS:
        total += tl.load(bias + known * out_features + outputs, mask=there, other=0.0).to(tl.float32)
    if FACTORS:
        total *= tl.load(factors + entry // tokens)
    place = y + entry * y_stride + outputs
    before = tl.load(place, mask=there, other=0.0).to(tl.float32)
    tl.store(place, (before + total).to(y.dtype.element_ty), mask=there)


# -- a tile of entries of one adapter a program -------------------------------------------------------------------------------
@triton.jit
def _shrink_tiles(x, A, hidden, order, tiles, starts, in_features, x_stride, hidden_stride,
                  POSITIONS: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    tile = tiles + 3 * tl.program_id(0)
    k, begin, stop = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    start = tl.load(starts + k)
    end = tl.where(begin < stop, tl.load(starts + k + 1), start)
    places = begin + tl.arange(0, BLOCK_M)
    ours = places < stop
    entries = tl.load(order + places, mask=ours, other=0)
    first = start + tl.program_id(1) * BLOCK_R
    lines = first + tl.arange(0, BLOCK_R)
    mine = lines < end
    if POSITIONS:
        columns = tl.load(A + lines, mask=mine, other=0)
        total = tl.load(x + entries[:, None] * x_stride + columns[None, :], mask=ours[:, None] & mine[None, :], other=0.0).to(tl.float32)
    else:
        total = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        for at in range(0, tl.where(first < end, in_features, 0), BLOCK_K):
            columns = at + tl.arange(0, BLOCK_K)
            there = columns < in_features
            values = tl.load(x + entries[:, None] * x_stride + columns[None, :], mask=ours[:, None] & there[None, :], other=0.0)
            factor = tl.load(A + lines[None, :] * in_features + columns[:, None], mask=mine[None, :] & there[:, None], other=0.0)
            if WIDE:
                values, factor = values.to(tl.float32), factor.to(tl.float32)
            total = tl.dot(values, factor, total, input_precision="ieee")
    tl.store(hidden + entries[:, None] * hidden_stride + (lines - start)[None, :], total, mask=ours[:, None] & mine[None, :])


@triton.jit
def _expand_tiles(hidden, B, y, bias, factors, order, tiles, starts, tokens, out_features, hidden_stride, y_stride,
                  BIAS: tl.constexpr, FACTORS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr):
    tile = tiles + 3 * tl.program_id(0)
    k, begin, stop = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    start = tl.load(starts + k)
    rank = tl.where(begin < stop, tl.load(starts + k + 1) - start, 0)
    places = begin + tl.arange(0, BLOCK_M)
    ours = places < stop
    entries = tl.load(order + places, mask=ours, other=0)
    outputs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = outputs < out_features
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for at in range(0, rank, BLOCK_R):
        lines = at + tl.arange(0, BLOCK_R)
        mine = lines < rank
        values = tl.load(hidden + entries[:, None] * hidden_stride + lines[None, :], mask=ours[:, None] & mine[None, :], other=0.0)
        factor = tl.load(B + (start + lines)[:, None] * out_features + outputs[None, :], mask=mine[:, None] & there[None, :], other=0.0)
        # the hidden values stay fp32: in fp16 they could overflow
        total = tl.dot(values, factor.to(tl.float32), total, input_precision="ieee")
    if BIAS:
        total += tl.load(bias + k * out_features + outputs, mask=there, other=0.0).to(tl.float32)[None, :]
    if FACTORS:
        total *= tl.load(factors + entries // tokens, mask=ours, other=0.0)[:, None]
    place, write = y + entries[:, None] * y_stride + outputs[None, :], ours[:, None] & there[None, :]
    before = tl.load(place, mask=write, other=0.0).to(tl.float32)
    tl.store(place, (before + total).to(y.dtype.element_ty), mask=write)


# -- launching them -----------------------------------------------------------------------------------------------------------
def add_change(y: Tensor, x: Tensor, index: Tensor, bank: Bank, factors: Tensor | None = None) -> None:
    """Add the change, the adapters' bias included, to y in place, by the kernel that suits. y (N, T, out) and x (N, T, in), entries one
    stride apart; index (N,) int64, -1 for rows without adapter; factors (N,), None for 1. Without values (planning) it only takes its
    memory. No gradients. Raises ValueError for a bank whose B is positions, RuntimeError where y has no view (N T, out)."""
    many = x.shape[0] * x.shape[1] >= TILES_FROM * len(bank.ranks)
    (add_by_tiles if many else add_by_rows)(y, x, index, bank, factors)


def add_by_rows(y: Tensor, x: Tensor, index: Tensor, bank: Bank, factors: Tensor | None = None) -> None:
    """`add_change`, one entry a program."""
    x, y, hidden, starts, tokens, entries, on = _prepared(y, x, bank)
    if not on:
        return
    block = min(64, triton.next_power_of_2(hidden.shape[1]))
    with _on(x):
        if bank.starts[-1]:
            _shrink_rows[entries, triton.cdiv(hidden.shape[1], block)](
                x, bank.A, hidden, index, starts, tokens, bank.in_features, x.stride(0), hidden.stride(0),
                POSITIONS=bank.A.dim() == 1, BLOCK_R=block, BLOCK_K=128)
        _expand_rows[entries, triton.cdiv(bank.out_features, 128)](
            hidden, bank.B, y, *_extras(bank, factors), index, starts, tokens, bank.out_features, hidden.stride(0), y.stride(0),
            BIAS=bank.bias is not None, FACTORS=factors is not None, BLOCK_R=min(32, block), BLOCK_N=128)


def add_by_tiles(y: Tensor, x: Tensor, index: Tensor, bank: Bank, factors: Tensor | None = None) -> None:
    """`add_change`, a tile of entries of one adapter a program."""
    x, y, hidden, starts, tokens, entries, on = _prepared(y, x, bank)
    if not on:
        return
    plans = bank.made_of(index, _no_plans)
    if tokens not in plans:
        plans[tokens] = _tiles(index, len(bank.ranks), tokens)
    order, tiles = plans[tokens]
    block = max(16, min(64, triton.next_power_of_2(hidden.shape[1])))
    with _on(x):
        if bank.starts[-1]:
            _shrink_tiles[tiles.shape[0], triton.cdiv(hidden.shape[1], block)](
                x, bank.A, hidden, order, tiles, starts, bank.in_features, x.stride(0), hidden.stride(0),
                POSITIONS=bank.A.dim() == 1, WIDE=INTERPRETED or x.dtype != bank.A.dtype, BLOCK_M=BLOCK_M, BLOCK_R=block, BLOCK_K=64)
        _expand_tiles[tiles.shape[0], triton.cdiv(bank.out_features, 64)](
            hidden, bank.B, y, *_extras(bank, factors), order, tiles, starts, tokens, bank.out_features, hidden.stride(0), y.stride(0),
            BIAS=bank.bias is not None, FACTORS=factors is not None, BLOCK_M=BLOCK_M, BLOCK_R=min(32, block), BLOCK_N=64)


def _prepared(y: Tensor, x: Tensor, bank: Bank) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, bool]:
    """(x (M, in), y (M, out), room for A x (M, largest rank) fp32, the first line of each adapter (K + 1,), T, M, whether there is
    anything to compute)."""
    if bank.kind == "outputs":
        raise ValueError("these kernels add to all outputs, not to positions")
    if y.stride(-1) != 1:
        raise ValueError("the outputs of an entry must lie side by side")
    tokens, entries = x.shape[1], x.shape[0] * x.shape[1]
    x, y = x.contiguous().view(entries, bank.in_features), y.view(entries, bank.out_features)
    hidden = torch.empty(entries, max(1, *bank.ranks), dtype=torch.float32, device=x.device)
    starts = bank.__dict__.get("_lines")
    if starts is None:
        starts = bank._lines = torch.tensor(bank.starts, dtype=torch.int64, device=x.device)
    return x, y, hidden, starts, tokens, entries, entries > 0 and has_values(x)


def _extras(bank: Bank, factors: Tensor | None) -> tuple[Tensor, Tensor]:
    """Bias and factors; any tensor stands for one that is not there."""
    return bank.B if bank.bias is None else bank.bias, bank.B if factors is None else factors


def _on(x: Tensor):
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _no_plans(bank: Bank, index: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    return {}


def _tiles(index: Tensor, adapters: int, tokens: int) -> tuple[Tensor, Tensor]:
    """(entries sorted by adapter (M,), tiles (n, 3): adapter, first place in that order, the place behind the last). n is what the worst
    index of this size needs, so that the device is not asked; tiles that are not needed have no places."""
    owner = torch.where(index < 0, adapters, index).repeat_interleave(tokens)
    count = torch.zeros(adapters + 1, dtype=torch.int64, device=index.device).index_add_(0, owner, torch.ones_like(owner))[:adapters]
    ends, tiles = count.cumsum(0), (count + BLOCK_M - 1) // BLOCK_M
    tile_ends = tiles.cumsum(0)
    number = torch.arange(owner.shape[0] // BLOCK_M + min(adapters, owner.shape[0]), device=index.device)
    k = torch.searchsorted(tile_ends, number, right=True)
    used, k = k < adapters, k.clamp(max=adapters - 1)
    begin = (ends - count)[k] + (number - (tile_ends - tiles)[k]) * BLOCK_M
    stop = torch.minimum(begin + BLOCK_M, ends[k])
    return owner.argsort(stable=True), torch.stack([k, torch.where(used, begin, 0), torch.where(used, stop, 0)], 1)
