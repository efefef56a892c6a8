"""The second-order column solver (GPTQ's loop, arXiv 2210.17323) with a quantizer that is handed to it.

With H (in, in) the mean of x x^T over inputs and U the upper Cholesky factor of H^-1 (H^-1 = U^T U), the columns of W (out, in) are
quantised one after the other; what a column loses is made up for by the columns after it:

    q_j = quantize(w_j),   e = (w_j - q_j) / U_jj,   w_k -= e U_jk   for k > j

which minimises tr((W - Q) H (W - Q)^T) greedily. Columns are taken in pieces of at most 128, within which the correction is applied
column by column and after which to all the rest at once; a piece never runs over the start of a group, so the parameters of a
group are fitted to weights that are corrected up to there. Dead inputs (H_jj = 0) get weight 0 and H_jj = 1. H is damped by
`damp` times its mean diagonal; where that does not make it positive definite, by ten times as much, and so on.
"""

from __future__ import annotations

import warnings
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import UsageError

PIECE = 128
#: above this many inputs the inverse is done in fp32
DOUBLE = 4096


class ColumnQuantizer(Protocol):
    group: int
    """Columns between two calls of `start`."""

    def start(self, j: int, columns: Tensor, diagonal: Tensor) -> None:
        """Column j begins a group. columns (out, m): the group's, corrected so far; diagonal (m,): its U_jj. m <= group."""

    def quantize(self, j: int, column: Tensor, u: Tensor) -> Tensor:
        """Column j, (out,) corrected -> its quantised values (out,); what differs is handed on. u: U_jj."""


def inverse_factor(hessian: Tensor, damp: float) -> Tensor:
    """H (in, in), symmetric -> U upper triangular with (H + damping)^-1 = U^T U, fp32.
    Raises UsageError for a matrix with NaN or infinite entries."""
    if not torch.isfinite(hessian).all():
        raise UsageError("the inputs of a layer are NaN or infinite", remedy="calibrate in fp32, or with other data")
    wide = hessian.to(torch.float64 if len(hessian) <= DOUBLE else torch.float32)
    diagonal = wide.diagonal()
    wide = wide + torch.diag(torch.where(diagonal == 0, 1.0, 0.0).to(wide.dtype))
    extra = damp * float(wide.diagonal().mean())
    for _ in range(8):
        damped = wide + extra * torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper.float()
        extra = 10 * extra or 1e-8 * float(wide.diagonal().mean())
    raise UsageError("the statistics of a layer's inputs are no covariance matrix", remedy="calibrate with more data, or a larger damp")


@torch.no_grad()
def solve(weight: Tensor, hessian: Tensor, quantizer: ColumnQuantizer, *, damp: float = 0.01, factor: Tensor | None = None) -> Tensor:
    """weight (out, in) -> its quantised values (out, in) fp32; codes and parameters are what the quantizer noted.
    hessian (in, in): in the order of the columns. factor: its U, where that was needed before. Raises UsageError (see
    inverse_factor)."""
    work = weight.detach().float().clone()
    work[:, hessian.diagonal() == 0] = 0
    upper = inverse_factor(hessian.to(work.device), damp) if factor is None else factor
    columns, found = work.shape[1], torch.empty_like(work)
    diagonal = upper.diagonal()
    for start, stop in _pieces(columns, quantizer.group):
        errors = torch.empty(work.shape[0], stop - start, device=work.device)
        for j in range(start, stop):
            if j % quantizer.group == 0:
                end = min(j + quantizer.group, columns)
                quantizer.start(j, work[:, j:end], diagonal[j:end])
            column = work[:, j]
            found[:, j] = quantizer.quantize(j, column, diagonal[j])
            errors[:, j - start] = (column - found[:, j]) / diagonal[j]
            work[:, j + 1: stop] -= errors[:, j - start, None] * upper[j, j + 1: stop]
        work[:, stop:] -= errors @ upper[start:stop, stop:]
    return found


def _pieces(columns: int, group: int) -> list[tuple[int, int]]:
    """(start, stop): several whole groups, or a part of one, at most PIECE columns each."""
    if group <= PIECE:
        step = PIECE // group * group
        return [(start, min(start + step, columns)) for start in range(0, columns, step)]
    pieces = []
    for first in range(0, columns, group):
        end = min(first + group, columns)
        pieces += [(start, min(start + PIECE, end)) for start in range(first, end, PIECE)]
    return pieces


def hessian_or_identity(statistics: Any, weight: Tensor, method: str) -> Tensor:
    """H (in, in) of the statistics; without them the identity, and a warning: inputs count alike and nothing is made up for."""
    found = None if statistics is None else statistics.hessian
    if found is None:
        warnings.warn(f"storage '{method}' had no calibration data: all inputs count alike, which costs quality", stacklevel=3)
        return torch.eye(weight.shape[1], device=weight.device)
    return found.float().to(weight.device)


def proxy_loss(difference: Tensor, hessian: Tensor) -> Tensor:
    """tr(E H E^T) of E = W - Q (out, in): the mean squared error of the outputs, summed over them."""
    wide = difference.double()
    return ((wide @ hessian.double()) * wide).sum()
