"""Threads for loops of our own (`_loops`): those that PyTorch computes with.

PyTorch's threads wait actively between its operations, so that a thread of another pool gets no processor until they sleep. The OpenMP
library that PyTorch is linked with runs a function of C in the very threads: GOMP_parallel, an entry of GNU's library that LLVM's and
Intel's have as well. Where it is not found (on Windows), and in a process forked from one whose threads it does not have, a loop runs in
the thread that calls it.
"""

from __future__ import annotations

import ctypes
import os
import sys
from array import array
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

_forked = False


@cache
def openmp() -> tuple[Callable[..., None], Any, Any] | None:
    """(GOMP_parallel, omp_get_thread_num, omp_get_num_threads) of PyTorch's OpenMP, or None."""
    library = Path(torch.__file__).parent / "lib" / ("libtorch_cpu.dylib" if sys.platform == "darwin" else "libtorch_cpu.so")
    try:
        loaded = ctypes.CDLL(str(library))
        parallel, number, size = loaded.GOMP_parallel, loaded.omp_get_thread_num, loaded.omp_get_num_threads
    except (OSError, AttributeError):
        return None
    parallel.argtypes, parallel.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    for each in (number, size):
        each.argtypes, each.restype = [], ctypes.c_int
    return parallel, number, size


def has_all() -> bool:
    """Whether `run` can use as many threads as PyTorch does."""
    return torch.get_num_threads() == 1 or openmp() is not None and not _forked


class Loop:
    """A function of C of one address; what else is to live as long."""

    def __init__(self, address: int, *kept: Any):
        self.address, self.kept, self.call = address, kept, ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)


def run(loop: Loop, job: list[int], threads: int) -> None:
    """The loop with the address of these numbers (int64), in each of so many threads (fewer if OpenMP says so: it asks which it is, and
    of how many)."""
    numbers = array("q", job)
    if threads < 2 or _forked or openmp() is None:
        loop.call(numbers.buffer_info()[0])
    else:
        openmp()[0](loop.address, numbers.buffer_info()[0], threads, 0)


def _in_child() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_in_child)
