"""Hadamard rotations of any width that has one: x -> x H with H / sqrt(k) orthonormal, in O(n (K + log n)) a row.

    order K 2^p:   H = H_K (x) H_2 (x) ... (x) H_2, K = 1, or the order of a Paley matrix over a prime q:
        I    q = 3 mod 4, K = q + 1:      I + [[0, 1], [-1, Q]]                        Q_ij = (i - j is a square mod q ? 1 : -1), Q_ii = 0
        II   q = 1 mod 4, K = 2 (q + 1):  C (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]],  C = [[0, 1], [1, Q]]
    a width n without: blocks of the largest divisor of n that has one, on the diagonal

That gives K = 12, 20, 28, 36, 44, 60, 76, 84, 108, 140 and others up to 512, and with their doublings nearly all widths in use. Orders
known only from other constructions (172, of width 11008) are rotated in blocks (of 256 there): outliers spread over the block instead of
the row.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

#: the largest Paley matrix used, and the largest power of two that is applied as one matrix
LARGEST, PIECE = 512, 64


def _prime(q: int) -> bool:
    return q > 2 and all(q % d for d in range(2, int(q**0.5) + 1))


def _paley(order: int) -> int | None:
    """The prime of a Paley matrix of this order, negative for construction II; None where there is none."""
    if order % 4 == 0 and (order - 1) % 4 == 3 and _prime(order - 1):
        return order - 1
    half = order // 2 - 1
    return -half if order % 4 == 0 and half % 4 == 1 and _prime(half) else None


@cache
def matrix(order: int) -> np.ndarray:
    """A Hadamard matrix of a power of two or of a Paley order, entries +-1, fp32."""
    if order & (order - 1) == 0:
        made = np.ones((1, 1))
        while len(made) < order:
            made = np.kron(made, [[1, 1], [1, -1]])
        return made.astype(np.float32)
    found = _paley(order)
    if found is None:
        raise ValueError(f"no Paley matrix of order {order}")
    q = abs(found)
    squares = {i * i % q for i in range(1, q)}
    chi = np.array([0, *(1 if i in squares else -1 for i in range(1, q))])
    C = np.zeros((q + 1, q + 1))
    C[1:, 1:] = chi[np.subtract.outer(np.arange(q), np.arange(q)) % q]
    C[0, 1:], C[1:, 0] = 1, -1 if found > 0 else 1
    if found > 0:
        return (np.eye(q + 1) + C).astype(np.float32)
    return (np.kron(C, [[1, 1], [1, -1]]) + np.kron(np.eye(q + 1), [[1, -1], [-1, -1]])).astype(np.float32)


@cache
def factors(width: int) -> tuple[int, ...]:
    """Orders whose Kronecker product is the Hadamard matrix of the largest block that divides the width."""
    for block in (d for d in range(width, 0, -1) if width % d == 0):
        twos = (block & -block).bit_length() - 1
        odd = block >> twos
        for j in range(0 if odd == 1 else 2, twos + 1):
            order = odd << j
            if odd == 1 or (order <= LARGEST and _paley(order)):
                left, found = (twos, []) if odd == 1 else (twos - j, [order])
                while left > 0:
                    found.append(min(1 << left, PIECE))
                    left -= PIECE.bit_length() - 1
                return tuple(found) or (1,)
    return (1,)


def block_of(width: int) -> int:
    """The size of the blocks in which a width is rotated: itself where it has a Hadamard matrix, 1 where it is odd."""
    return int(np.prod(factors(width)))


@cache
def padded(count: int) -> int:
    """The smallest number >= count that has a Hadamard matrix."""
    while block_of(count) != count:
        count += 1
    return count


def rotate(x: Tensor, *, transpose: bool = False) -> Tensor:
    """x (rows, n) H, or x H^T, in x's dtype, orthonormal. In blocks where n has no Hadamard matrix."""
    orders, shape = factors(x.shape[-1]), x.shape
    block = block_of(x.shape[-1])
    y = x.reshape(-1, block)
    for order in orders:  # each turn moves the first axis of the block to the end, so the last one restores the order
        H = torch.from_numpy(matrix(order)).to(y.device, y.dtype) * order**-0.5
        y = y.reshape(-1, order, block // order).transpose(1, 2).reshape(-1, order) @ (H.T if transpose else H)
    return y.reshape(shape)
