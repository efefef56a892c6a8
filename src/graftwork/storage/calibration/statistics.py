"""How the inputs of a linear map are distributed: sums over all tokens that a calibration run feeds to it."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

#: what may be asked for
NAMES = frozenset({"hessian", "mean_abs", "max_abs", "low", "high", "samples"})


class InputStatistics:
    """Of inputs x (tokens, in). Only what `needs` names is kept, the rest is None.

    hessian (in, in) fp32: mean of x x^T (the usual factor 2 is left out); mean_abs, max_abs, low, high (in,) fp32: of |x| the mean and the
    largest, of x the least and the largest; samples (at most `keep`, in) fp32: rows spread evenly over what came; count: tokens seen. Of
    the matrix, not of its inputs: wide_rows (out,) bool and choice (1,) int64, what `Storage.prepare` of mixllm and mixed found; fisher
    (out, in), the sum of squared gradients of the loss by the weight, where someone who has gradients set it; never collected here; found,
    the codes that a window of blocks gave it (windows.py)."""

    wide_rows: Tensor | None = None
    choice: Tensor | None = None
    found: Any = None

    def __init__(self, features: int, needs: Collection[str] = NAMES, keep: int = 512, device: torch.device | str = "cpu"):
        self.features, self.needs, self.keep, self.count = features, frozenset(needs), keep, 0
        self._outer = torch.zeros(features, features, device=device) if "hessian" in needs else None
        self._abs = torch.zeros(features, dtype=torch.float64, device=device) if "mean_abs" in needs else None
        self._max = torch.zeros(features, device=device) if "max_abs" in needs else None
        self._ends = {name: torch.full((features,), end, device=device) for name, end in (("low", torch.inf), ("high", -torch.inf))
                      if name in needs}
        self._rows, self._every = [], 1
        self.fisher: Tensor | None = None

    def add(self, x: Tensor, real: Tensor | None = None) -> None:
        """x (..., in); real (...) bool: the tokens that count (others are padding)."""
        rows = x.detach().reshape(-1, self.features)
        if real is not None:
            rows = rows[real.reshape(-1)]
        rows = rows.float()
        if self._outer is not None:
            self._outer += rows.T @ rows
        if self._abs is not None:
            self._abs += rows.abs().sum(0, dtype=torch.float64)
        if self._max is not None and len(rows):
            self._max = torch.maximum(self._max, rows.abs().amax(0))
        for name, value in self._ends.items():
            if len(rows):
                self._ends[name] = torch.minimum(value, rows.amin(0)) if name == "low" else torch.maximum(value, rows.amax(0))
        if "samples" in self.needs:
            # every n-th token; n doubles when there are twice as many as are kept
            self._rows.append(rows[-self.count % self._every:: self._every].clone())
            if sum(map(len, self._rows)) >= 2 * self.keep:
                self._rows, self._every = [torch.cat(self._rows)[::2]], 2 * self._every
        self.count += len(rows)

    @property
    def hessian(self) -> Tensor | None:
        return None if self._outer is None or not self.count else self._outer / self.count

    @property
    def mean_abs(self) -> Tensor | None:
        return None if self._abs is None or not self.count else (self._abs / self.count).float()

    @property
    def max_abs(self) -> Tensor | None:
        return self._max if self.count else None

    @property
    def low(self) -> Tensor | None:
        return self._ends.get("low") if self.count else None

    @property
    def high(self) -> Tensor | None:
        return self._ends.get("high") if self.count else None

    @property
    def samples(self) -> Tensor | None:
        if not self._rows or not self.count:
            return None
        rows = torch.cat(self._rows)
        return rows[torch.linspace(0, len(rows) - 1, min(self.keep, len(rows))).long()]


def with_attributes(statistics: InputStatistics | None, more: Mapping[str, Any] | None) -> InputStatistics | None:
    """Statistics with further attributes, of nothing where there are none; a copy, since maps share them."""
    if not more:
        return statistics
    found = InputStatistics(0, ()) if statistics is None else copy.copy(statistics)
    for name, value in more.items():
        setattr(found, name, value)
    return found
