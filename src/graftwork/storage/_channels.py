"""Input channels of a linear map in another composition of the same width (channel reassembly of QLLM, arXiv 2310.08041).

A table (2, in) of whole numbers: old channel i is added into channel `into[i]`, where m_c channels come together and are averaged;
new channel k is one of T_c copies of c = `copy_of[k]`, each a T_c-th of it:

    z_k = (1 / (m_c T_c)) sum_{into[i] = c} x_i,   c = copy_of[k]:      z = M x
    W'[:, k] = sum_{into[i] = c} W[:, i]                                (out, in)

W' z = W x where channels that come together are equal, copies or not. Of two that are not, i and j,

    |W' z - W x|^2 = 1/4 (x_i - x_j)^2 |w_i - w_j|^2

What the new weight is worth to the old inputs: W' M = `restored(W')`. A table costs 32 / out bits a weight, 64 / out from 32,768 inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kind(width: int) -> torch.dtype:
    """Of the table's numbers."""
    return torch.int16 if width < 2**15 else torch.int32


def identity(width: int, device: torch.device | str = "cpu") -> Tensor:
    """The table that leaves every channel as it is."""
    return torch.arange(width, device=device).to(kind(width)).repeat(2, 1)


def _read(channels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(into, copy_of, m, T), the last two as divisors."""
    into, copy_of = channels.long().unbind()
    zero, one = (torch.full((channels.shape[1],), value, dtype=dtype, device=channels.device) for value in (0.0, 1.0))
    return into, copy_of, zero.index_add(0, into, one).clamp(min=1), zero.index_add(0, copy_of, one).clamp(min=1)


def reassembled(x: Tensor, channels: Tensor) -> Tensor:
    """x (..., in) -> z (..., in)."""
    into, copy_of, members, copies = _read(channels, x.dtype)
    return (torch.zeros_like(x).index_add(-1, into, x) / (members * copies)).index_select(-1, copy_of)


def columns(weight: Tensor, channels: Tensor) -> Tensor:
    """W (n, in) -> W' (n, in)."""
    into, copy_of = channels.long().unbind()
    return torch.zeros_like(weight).index_add(1, into, weight).index_select(1, copy_of)


def restored(weight: Tensor, channels: Tensor) -> Tensor:
    """W' (n, in) -> W' M (n, in)."""
    into, copy_of, members, copies = _read(channels, weight.dtype)
    return (torch.zeros_like(weight).index_add(1, copy_of, weight) / (members * copies)).index_select(1, into)
