"""Loops over codes that numba compiles for this processor (`_loops`): on a CPU, where it is installed (`pip install 'graftwork[cpu]'`).

    decode_pairs    values of 4-bit codes, D = table[code] * scale of its block, each multiplied and rounded once: as PyTorch's, bit for bit
    decode_whole    values of 8-bit codes, D = (code - zero) * scale of their group, bit for bit
    few_product     y = x D(W)^T for a few rows x and D(W) = (code - zero) * scale, codes of 8, 4 or 2 bits

PyTorch's operations go through memory once for each step (codes to indices, to values, times scales), a loop once for all. Of a product
two rows of W at a time lie in the nearest cache, and four rows of x meet both before the next element is read. Sums are fp32, in another
order than PyTorch's. What numba compiles stays in the process: its files on disk are pickles, of which graftwork reads none.

Without numba, under transforms of PyTorch, with other devices and dtypes callers take PyTorch's operations (`serves`).
"""

from __future__ import annotations

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..modeling.protocols import has_values

#: of an x that is multiplied in fp32
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: rows of x up to which `few_product` is quicker than a tile of floats and a product of PyTorch
FEW = 16
#: codes for which handing a part to another thread pays
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
    """Whether tensors are decoded here, or a plan goes through it: as `serves`, but for values, and with one thread. More of them are
    PyTorch's (or bitsandbytes'), which wait actively between products: a thread of ours beside them comes late."""
    return torch.get_num_threads() == 1 and _may(tensors)


def serves(*tensors: Tensor) -> bool:
    """Whether loops may read these tensors: values on a CPU that nothing differentiates, transforms or traces."""
    return _may(tensors) and all(map(has_values, tensors))


def _may(tensors: tuple[Tensor, ...]) -> bool:
    if not available() or getattr(forward_ad, "_current_level", -1) >= 0 or torch.compiler.is_compiling():
        return False
    for tensor in tensors:  # a loop in calls that a small product feels
        if not tensor.is_cpu or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return False
    return True


def decode_pairs(codes: Tensor, scale: Tensor, block: int, pairs: Tensor, out: Tensor) -> Tensor:
    """Fills out (n,) fp32 with the values of codes (ceil(n/2),) uint8, two a byte, and returns it; fake tensors it leaves as they are.

    pairs (256, 2) fp32: both values of every byte; scale (ceil(n/block),) fp32; block: even. All contiguous."""
    if has_values(codes):
        _loops().decode(codes.detach().numpy(), scale.detach().numpy(), pairs.numpy(), out.numpy(), block)
    return out


def decode_whole(codes: Tensor, scale: Tensor, zero: Tensor, group: int, out: Tensor) -> Tensor:
    """Fills out (rows, columns) fp32 with (code - zero) * scale of its codes (n,) uint8 in groups, of which scale and zero are
    (ceil(n/group),) fp32, and returns it; fake tensors it leaves as they are. All contiguous."""
    if has_values(codes):
        _loops().whole()(codes.detach().numpy(), scale.numpy(), zero.numpy(), out.numpy().reshape(-1), group)
    return out


def suits(x: Tensor, bits: int, run: int) -> bool:
    """Whether x (..., in) is multiplied by `few_product` rather than by tiles: few rows, in fp32, and runs of whole vectors."""
    if x.numel() > FEW * x.shape[-1] or x.dtype not in _DTYPES or 8 % bits or not serves(x):
        return False
    return run % (_loops().lanes(bits) * 8 // bits) == 0


def few_product(x: Tensor, codes: Tensor, bits: int, scale: Tensor, zero: Tensor | int, group: int, run: int) -> Tensor:
    """x (..., in) -> x D(W)^T (..., out) fp32, without gradient.

    codes (out * in * bits / 8,) uint8, packed row by row, the first code of a byte in its lowest bits. Weights, read row by row, are in
    groups of `group`, of which scale and zero are (groups,), scale fp32 and zero fp32 or uint8, or one int for all; run: columns that never
    lie in two groups, a divisor of `in`. Codes and numbers are contiguous, and ask for no gradient."""
    columns = x.shape[-1]
    out, flat = codes.shape[0] * 8 // (bits * columns), x.detach().reshape(-1, columns).float()
    if isinstance(zero, int):
        zero = torch.full_like(scale, zero)
    y = torch.empty(flat.shape[0], out, device=x.device)
    one, few = _loops().products(bits)
    _shared(one if flat.shape[0] == 1 else few, out, out * columns, flat.contiguous().numpy(), codes.numpy(), scale.numpy(),
            zero.numpy(), y.numpy(), group, run)
    return y.view(*x.shape[:-1], out)


@cache
def _loops() -> ModuleType:
    from . import _loops  # a fifth of a second, for those who need it

    return _loops


def _shared(loop, parts: int, codes: int, *arguments) -> None:
    """loop(first, last, ...) over all parts, spread over as many threads as PyTorch uses where the codes are worth it."""
    threads = min(torch.get_num_threads(), codes // SHARE, parts)
    if threads < 2:
        loop(0, parts, *arguments)
        return
    edges = [parts * i // threads // 2 * 2 for i in range(threads)] + [parts]
    others = [_pool().submit(loop, low, high, *arguments) for low, high in zip(edges[1:], edges[2:])]
    loop(edges[0], edges[1], *arguments)
    for other in others:
        other.result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, "graftwork-codes")


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has the pool, but none of its threads
