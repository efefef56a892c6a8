"""Additions that autograd's engine would do in place if no dispatch mode were active.

Where gradients meet at one tensor the engine adds them. Without a dispatch mode it writes the sum into the first when
it holds the last reference to it; with any dispatch mode, so also under a ledger, it always allocates a third tensor.
An observer that wants the memory of the unobserved run must tell the two cases apart. The engine decides by reference
counts, and so does this module: a probe (two gradients meeting in a graph of two numbers) shows which counts "the last
reference" has on the way into a dispatch mode in this version of PyTorch, and an addition that comes straight from the
engine with these counts is one that would have been in place.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: modules whose frames lie between the engine and a dispatch mode
_WRAPPERS = ("torch._dynamo", "torch._compile", "torch.utils._python_dispatch")


def _counts(args: tuple) -> tuple[int, int, int]:
    """References to the first argument: Python's to its object, C++'s to the tensor, and to its storage."""
    return (sys.getrefcount(args[0]), args[0]._use_count(),
            torch._C._storage_Use_Count(args[0].untyped_storage()._cdata))


class _Probe(TorchDispatchMode):
    """Records the counts of the engine's own addition when nobody else holds its operands."""

    counts: tuple[int, int, int] | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.add.Tensor:
            self.counts = _counts(args)
        return func(*args, **(kwargs or {}))


def last_reference() -> tuple[int, int, int] | None:
    """The counts under the modes that are active now; None if this PyTorch adds gradients in some other way."""
    with torch.inference_mode(False), torch.enable_grad():
        hidden = torch.ones(2, requires_grad=True) * 2
        loss = torch.dot(hidden, hidden.detach()) + (hidden * 3).sum()
        with _Probe() as probe:
            loss.backward()
    return probe.counts


def adds_in_place(func, args: tuple, last: tuple[int, int, int] | None) -> bool:
    """Whether the engine, without a dispatch mode, would have written this addition into `args[0]`.

    Call it directly from `__torch_dispatch__`, during a backward, before anything else refers to the arguments.
    """
    if (func is not torch.ops.aten.add.Tensor or torch.is_grad_enabled() or not isinstance(args[1], Tensor)
            or _counts(args) != last):
        return False
    caller = sys._getframe(1).f_back  # 0 here, 1 __torch_dispatch__; then PyTorch's wrappers of it, then who ran C++
    while caller is not None and caller.f_globals.get("__name__", "").startswith(_WRAPPERS):
        caller = caller.f_back
    old, new = args[0], args[1]
    return ((caller is None or caller.f_code.co_name == "_engine_run_backward")
            and old.shape == new.shape and old.dtype == new.dtype and old.untyped_storage().nbytes() == old.nbytes)
