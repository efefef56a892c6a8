"""Factors L1 L2 of rank r nearest to a matrix, under several measures of nearness, and the alternation with a quantizer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: up to this smaller side the factors are exact; beyond, a randomised range is projected on (10 more than r, 4 power steps)
EXACT = 1536


def top(matrix: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """(m, n) -> L1 = U sqrt(S) (m, r) and L2 = sqrt(S) V^T (r, n) of its r largest singular values, fp64."""
    if matrix.shape[0] > matrix.shape[1]:
        right, left = top(matrix.T, r)
        return left.T, right.T
    wide, basis = matrix.double(), None
    if wide.shape[0] > EXACT:
        generator = torch.Generator(device=wide.device).manual_seed(0)
        width = min(r + 10, wide.shape[0])
        basis = wide @ torch.randn(wide.shape[1], width, generator=generator, dtype=wide.dtype, device=wide.device)
        for _ in range(4):
            basis = wide @ (wide.T @ torch.linalg.qr(basis)[0])
        basis = torch.linalg.qr(basis)[0]
        wide = basis.T @ wide
    values, vectors = torch.linalg.eigh(wide @ wide.T)
    left = vectors[:, -r:].flip(1)
    root = values[-r:].flip(0).clamp(min=0) ** 0.25
    right = left.T @ wide  # S V^T as a projection, so that the product is right whatever the error of S
    real = root > 1e-8 * root[0]
    left = left if basis is None else basis @ left
    return torch.where(real, left * root, 0), torch.where(real, 1 / root, 0)[:, None] * right


class Measure:
    """What an error E (out, in) counts: |diag(rows) E diag(columns) root|^2; and the factors that are best by it. root: (in, in)."""

    def __init__(self, rows: Tensor | None = None, columns: Tensor | None = None, root: Tensor | None = None):
        self.rows, self.columns, self.root = rows, columns, root

    def _apply(self, matrix: Tensor) -> Tensor:
        matrix = matrix.double()
        matrix = matrix if self.rows is None else matrix * self.rows[:, None]
        matrix = matrix if self.columns is None else matrix * self.columns
        return matrix if self.root is None else matrix @ self.root

    def error(self, difference: Tensor) -> float:
        return float((self._apply(difference) ** 2).sum())

    def factors(self, matrix: Tensor, r: int) -> tuple[Tensor, Tensor]:
        up, down = top(self._apply(matrix), r)
        up = up if self.rows is None else up / self.rows[:, None]
        down = down if self.columns is None else down / self.columns
        if self.root is not None:
            down = torch.linalg.solve_triangular(self.root.T, down.T, upper=True).T
        return up, down


def floor(weights: Tensor) -> Tensor:
    """Square roots of weights >= 0, held above a thousandth of the largest: they are divided by."""
    root = weights.double().clamp(min=0).sqrt()
    return root.clamp(min=1e-3 * float(root.max()) or 1.0)


def of_hessian(hessian: Tensor, diagonal: bool, damp: float = 1e-4) -> Measure:
    """|E X^T|^2 by the second moments of inputs, or by their diagonal alone."""
    if diagonal:
        return Measure(columns=floor(hessian.diagonal()))
    wide = hessian.double()
    mean = float(wide.diagonal().mean()) or 1.0
    return Measure(root=torch.linalg.cholesky(wide + damp * mean * torch.eye(len(wide), dtype=wide.dtype, device=wide.device)))


def of_fisher(fisher: Tensor) -> Measure:
    """The rank-one stand-in of F (out, in) for the factors; errors are counted by F itself."""

    class Exact(Measure):
        def error(self, difference):
            return float((fisher.double() * difference.double() ** 2).sum())

    return Exact(rows=floor(fisher.double().mean(1)), columns=floor(fisher.double().mean(0)))


def alternate(weight: Tensor, split: Callable, quantize: Callable, error: Callable, iterations: int) -> tuple[object, object, float]:
    """L <- split(W - Q), Q <- quantize(W - L), from Q = 0, until error(Q, L) grows: the best (Q, L) seen and its error.
    split and quantize return (what is kept, its values (out, in) fp32)."""
    best, dense = None, torch.zeros_like(weight)
    for _ in range(iterations):
        low, product = split(weight - dense)
        stored, dense = quantize(weight - product)
        now = error(dense, product)
        if best is not None and now >= best[2]:
            break
        best = (stored, low, now)
    return best
