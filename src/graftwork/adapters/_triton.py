"""When the Triton kernels (`_triton_kernels.py`) compute the change of rows, and what happens where they cannot.

Inference on a GPU takes them (CUDA, and ROCm, which PyTorch calls cuda too), where the package triton is installed; a CPU never does.
A site then adds the change of its adapters to the frozen product in place, whatever order the rows have, if all that their class
does is in the bank; a class that calls `change_of_rows` gets the change by itself. They have **not run on a GPU** yet: one that the
device's compiler refuses is given up with a warning, and the other kernels go on.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

#: types of devices that take them; emptied when one of them fails
DEVICES = {"cuda"}
log = logging.getLogger("graftwork")


def takes_triton(x: Tensor, bank: Any) -> bool:
    """Whether x is on one of their devices, the bank is a Bank that adds to all outputs, and nothing learns."""
    return (x.device.type in DEVICES and getattr(bank, "kind", None) in ("factors", "columns") and bank.dropout is None
            and not (torch.is_grad_enabled() and (bank.learns or x.requires_grad)) and _installed())


def add_in_place(y: Tensor, x: Tensor, index: Tensor, bank: Any, *, outputs: slice | None = None, factors: Tensor | None = None) -> bool:
    """y[n] += factors[n] (B_k A_k x_n + b_k), k = index[n], for what `takes_triton`; rows with index -1 stay. False where the kernels
    failed: then y is as it was. y (N, ..., all outputs) contiguous, of which `outputs` are the adapters'; x (N, ..., in), index (N,)
    int64, factors (N,) or None for 1."""
    y = y.view(x.shape[0], math.prod(x.shape[1:-1]), y.shape[-1])
    try:
        from ._triton_kernels import add_change

        add_change(y if outputs is None else y[..., outputs], x.reshape(*y.shape[:2], x.shape[-1]), index, bank, factors)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        log.warning("the Triton kernels do not work here (%s: %s); others are used from now on", type(error).__name__, error)
        DEVICES.clear()
        return False
    return True


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
