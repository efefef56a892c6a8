"""k-means with weights, and the nearest entry of a code book, in bounded memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: distances at a time: they stay in a processor's cache
CHUNK = 1 << 18


def nearest(x: Tensor, book: Tensor) -> Tensor:
    """x (n, v), book (k, v) fp32 -> (n,) int64: the nearest entry of each, CHUNK distances at a time."""
    half = book.square().sum(1) / 2
    return torch.cat([(half - part @ book.T).argmin(1) for part in x.split(max(1, CHUNK // len(book)))])


def kmeans(x: Tensor, weights: Tensor, k: int, iterations: int, generator: torch.Generator) -> Tensor:
    """x (n, v), weights (n,) >= 0 -> centroids (k, v) fp32 of least weighted squared distance, found from random vectors."""
    if not weights.sum() > 0:
        weights = torch.ones_like(weights)
    weights = weights / weights.mean()
    picked = torch.randperm(len(x), generator=generator, device=generator.device)[:k].to(x.device)
    book = F.pad(x[picked], (0, 0, 0, k - len(picked)))
    before = float("inf")
    for _ in range(iterations):
        found = nearest(x, book)
        cost = weights * (x - book[found]).square().sum(1)
        mass = torch.zeros(k, device=x.device).index_add_(0, found, weights)
        sums = torch.zeros_like(book).index_add_(0, found, weights[:, None] * x)
        book = torch.where(mass[:, None] > 0, sums / mass.clamp(min=1e-30)[:, None], book)
        empty = (mass == 0).nonzero()[:, 0]
        worst = cost.topk(min(len(empty), len(x))).indices
        book[empty[: len(worst)]] = x[worst]
        now = float(cost.sum())
        if now >= before * (1 - 1e-5):
            break
        before = now
    return book
