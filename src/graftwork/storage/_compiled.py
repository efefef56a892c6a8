"""Loops over codes that numba compiles for this processor (`_loops`): on a CPU, where it is installed (`pip install 'graftwork[cpu]'`).

    decode_table    values of 4-bit codes, D = table[code] * scale of its block, each multiplied and rounded once: as PyTorch's, bit for bit
    decode_whole    values of 8-bit codes, D = (code - zero) * scale of their group, bit for bit
    few_product     y = x D(W)^T for a few rows x, D(W) = (code - zero) * scale (codes of 8, 4 or 2 bits) or table[code] * scale (4 bits)

PyTorch's operations go through memory once for each step (codes to indices, to values, times scales), a loop once for all. Of a product
two rows of W at a time lie in the nearest cache, and four rows of x meet both before the next element is read. Sums are fp32, in another
order than PyTorch's. The loops run in PyTorch's own threads (`_team`). What numba compiles stays in the process: its files on disk are
pickles, of which graftwork reads none.

Without numba, under transforms of PyTorch, with other devices and dtypes callers take PyTorch's operations (`serves`).
"""

from __future__ import annotations

import math
import warnings
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.autograd import forward_ad

from ..modeling import arithmetic
from ..modeling.arithmetic import product_dtype
from ..modeling.protocols import has_values
from . import _team

#: of an x that is multiplied in fp32
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: rows of x up to which `few_product` is quicker than a tile of floats and a product of PyTorch, of 16 bits where the processor has such
FEW = 16
#: columns of a part of x
PART = 1536
#: codes for which calling other threads pays; then all, as a team of another size would be a new one
SHARE = 1 << 17


@cache
def available() -> bool:
    """Whether numba is installed and can be imported: a version of it takes certain versions of NumPy."""
    try:
        _loops()
    except ImportError as error:
        if find_spec("numba") is not None:
            warnings.warn(f"products by quantized weights do without numba, which cannot be imported: {error}", stacklevel=2)
        return False
    return True


def decodes(*tensors: Tensor) -> bool:
    """Whether tensors are decoded here, or a plan goes through it: as `serves`, but for values."""
    return available() and _team.has_all() and _plain(tensors)


def serves(*tensors: Tensor) -> bool:
    """Whether loops may read these tensors: values on a CPU that nothing differentiates, transforms or traces."""
    return all(map(has_values, tensors)) and decodes(*tensors)


def _plain(tensors: tuple[Tensor, ...]) -> bool:
    if getattr(forward_ad, "_current_level", -1) >= 0 or torch.compiler.is_compiling() or arithmetic.planned_for not in (None, "cpu"):
        return False
    for tensor in tensors:  # a loop in calls that a small product feels
        if not tensor.is_cpu or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return False
    return True


def decode_table(codes: Tensor, scale: Tensor, block: int, table: tuple[float, ...], out: Tensor, *, high_first: bool = False) -> Tensor:
    """Fills out (n,) fp32 with the values of codes (ceil(n/2),) uint8, two a byte, and returns it; fake tensors it leaves as they are.

    scale (ceil(n/block),) fp32; block: even; table: 16 numbers; high_first: the first code of a byte is in its highest bits. All
    contiguous."""
    if has_values(codes):
        loop = _loops().decoder(_loops().vectors.code(4, block, True, high_first))
        _run(loop, out.numel(), scale.numel(), block, codes, scale, _table(table), out)
    return out


def decode_whole(codes: Tensor, scale: Tensor, zero: Tensor, group: int, out: Tensor) -> Tensor:
    """Fills out (rows, columns) fp32 with (code - zero) * scale of its codes (n,) uint8 in groups, of which scale and zero are
    (ceil(n/group),) fp32, and returns it; fake tensors it leaves as they are. All contiguous."""
    if has_values(codes):
        _run(_loops().whole(_loops().vectors.code(8, group)), out.numel(), scale.numel(), group, codes, scale, zero, out)
    return out


def suits(x: Tensor, bits: int, run: int) -> bool:
    """Whether x (..., in) is multiplied by `few_product` rather than by tiles: few rows, and runs of whole vectors."""
    return 8 % bits == 0 and run % 16 == 0 and few(x)


def few(x: Tensor) -> bool:
    """Whether x (..., in) has so few rows, in fp32 or less."""
    if x.dtype not in _DTYPES or not decodes(x):
        return False
    most = FEW if product_dtype(x.dtype, x.device) != torch.float32 else _loops().vectors.most_rows()
    return x.numel() <= most * x.shape[-1]


def few_product(x: Tensor, codes: Tensor, bits: int, scale: Tensor, zero: Tensor | int, group: int, run: int, *,
                table: tuple[float, ...] = (), high_first: bool = False) -> Tensor:
    """x (..., in) -> x D(W)^T (..., out) fp32, without gradient.

    codes (out * in * bits / 8,) uint8, packed row by row, the first code of a byte in its lowest bits unless high_first. Weights, read row
    by row, are in groups of `group`, of which scale and zero are (groups,), scale of a float dtype, zero of one or uint8, or one int for
    all; run: columns that never lie in two groups, a divisor of `in`. table: 16 numbers of which codes of 4 bits are indices; zero does
    not matter then. Codes and numbers are contiguous, and ask for no gradient."""
    columns = x.shape[-1]
    out, flat = codes.numel() * 8 // (bits * columns), x.float().reshape(-1, columns).contiguous()
    rows, kept = flat.shape[0], _loops().vectors.kept_as()
    if not has_values(x):  # a plan: the same bytes and operations
        flat = flat if rows == 1 or _parts(columns, run) == 1 else flat.clone()
        return (flat @ flat.new_empty(1, 1).expand(columns, out)).view(*x.shape[:-1], out)
    scale = scale if scale.dtype in kept else scale.float()
    zeros = None
    if isinstance(zero, int):
        zero = _table((float(zero),))
    else:
        zero = zero if zero.dtype in kept else zero.float()
        zeros = zero.dtype
    parts, run, loop = _product(rows == 1, columns, bits, run, bool(table), high_first, scale.dtype, zeros)
    if parts > 1:  # rows that lie a power of two apart would share places in the cache
        flat = flat.view(rows, parts, -1).transpose(0, 1).contiguous()
    y = (torch.empty if rows == 1 else torch.zeros)(rows, out)
    _run(loop, out * columns, out, group, run, parts, flat, codes, scale, zero, _table(table or (0.0,)), y)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], out)


@cache
def _product(one_row: bool, columns: int, bits: int, run: int, looked_up: bool, high_first: bool, scales: torch.dtype,
             zeros: torch.dtype | None) -> tuple[int, int, _team.Loop]:
    """(parts of a row, columns of a run in one, the loop)."""
    parts = 1 if one_row else _parts(columns, run)
    run = math.gcd(run, columns // parts)
    code = _loops().vectors.code(bits, run, looked_up, high_first)
    return parts, run, _loops().product(code, run == code.unit, scales, zeros, one_row)


@cache
def _parts(columns: int, run: int) -> int:
    """Into how many equal parts a row is cut, so that few rows of W lie in the nearest cache and many of x in the next: the fewest of at
    most PART columns, each whole runs or a part of one, and whole vectors; where there are none, those nearest to it."""
    spans = [span for span in range(16, columns + 1, 16) if columns % span == 0 and (span % run == 0 or run % span == 0)]
    return columns // max((span for span in spans if span <= PART), default=min(spans))


@cache
def _loops() -> ModuleType:
    from . import _loops  # a fifth of a second, for those who need it

    return _loops


@cache
@torch.inference_mode(False)
def _table(values: tuple[float, ...]) -> Tensor:
    with unset_fake_temporarily():  # nothing fake may be remembered
        return torch.tensor(values, dtype=torch.float32)


def _run(loop, codes: int, *arguments: Tensor | int) -> None:
    """A loop over so many codes: its job is these numbers and tensors."""
    numbers = []
    for argument in arguments:
        if isinstance(argument, int):
            numbers.append(argument)
        else:
            numbers += argument.data_ptr(), argument.numel()
    _team.run(loop, numbers, torch.get_num_threads() if codes >= SHARE else 1)
