"""How a scalar code book is fitted to numbers; equations in storage/codebook.py.

Lloyd's steps cost nothing once the numbers are sorted: with prefix sums of mass and of mass times value, a cell between two midpoints
is a difference of two of them. Numbers that occur more than once are kept once, with their summed mass (half-precision weights
have at most 65,536 of them).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

#: jlcm: the inverse temperature of the softmax over logits in squared gaps of the book, at the start and at the end
SOFT, HARD = 10, 100
#: numbers of an attention matrix, or logits, that are alive at a time
PIECE = 1 << 22
#: jlcm: logits that a step changes at a time on a processor, where they stay in its cache
TILE = 1 << 17
#: jlcm: chances and slopes below count as 0. Smaller ones have squares that are no normal fp32 numbers, on which processors are slow
TINY = 1e-16


def masses(values: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """values (any shape) with weights >= 0 of that shape -> the distinct ones sorted, and their summed weight, both fp64."""
    values = values.reshape(-1)
    if weights is None:
        found, count = values.unique(return_counts=True)
        return found.double(), count.double()
    found, place = values.unique(return_inverse=True)
    mass = torch.zeros(len(found), dtype=torch.float64, device=values.device).index_add_(0, place, weights.reshape(-1).double())
    return found.double(), mass if mass.sum() > 0 else torch.ones_like(mass)


def start(values: Tensor, mass: Tensor, size: int) -> Tensor:
    """A book (size,) whose codes lie as dense as the cube root of the numbers' density, which is the best density for many codes.
    Around a number of mass m the density is m over its gap, so it counts as m^(1/3) gap^(2/3)."""
    if len(values) <= size:
        return F.pad(values[None], (0, size - len(values)), mode="replicate")[0]
    padded = F.pad(values[None], (1, 1), mode="replicate")[0]
    total = (mass ** (1 / 3) * ((padded[2:] - padded[:-2]) / 2) ** (2 / 3)).cumsum(0)
    wanted = (torch.arange(size, dtype=torch.float64, device=values.device) + 0.5) / size * total[-1]
    return values[torch.searchsorted(total, wanted).clamp(max=len(values) - 1)].contiguous()


def lloyd(values: Tensor, mass: Tensor, book: Tensor, iterations: int) -> Tensor:
    """k-means of sorted numbers from a sorted book (K,), at most `iterations` steps. A code that serves nothing goes to the cell with
    the largest error."""
    zero = torch.zeros(1, dtype=values.dtype, device=values.device)
    sums = [torch.cat([zero, (mass * values**power).cumsum(0)]) for power in range(3)]
    for _ in range(iterations):
        cuts = torch.searchsorted(values, (book[1:] + book[:-1]) / 2, right=True)
        edges = torch.cat([cuts.new_zeros(1), cuts, cuts.new_tensor([len(values)])])
        count, first, second = ((total[edges[1:]] - total[edges[:-1]]) for total in sums)
        found = torch.where(count > 0, first / count.clamp(min=1e-300), book)
        empty = (count == 0).nonzero().flatten()
        if len(empty) and len(values) > len(book):
            worst = (second - first * found).argmax()
            low, high = int(edges[worst]), int(edges[worst + 1])
            if high - low > 1:
                found[empty[0]] = values[high - 1] if values[high - 1] > found[worst] else values[low]
                found = found.sort().values
        if torch.equal(found, book):
            break
        book = found
    return book


def soft_means(values: Tensor, mass: Tensor, book: Tensor, iterations: int, tau: float) -> Tensor:
    """Differentiable k-means: every number belongs to every code, by softmax(-(w - c)^2 / (tau mean w^2)). At most `iterations` steps,
    until no code moves by a hundred-thousandth of the numbers' root mean square."""
    if len(values) <= len(book):
        return book
    scale = ((mass * values**2).sum() / mass.sum()).clamp(min=1e-300)
    for _ in range(iterations):
        total = torch.zeros(2, len(book), dtype=values.dtype, device=values.device)
        for some, weight in zip(values.split(max(1, PIECE // len(book))), mass.split(max(1, PIECE // len(book)))):
            attention = weight[:, None] * (-(some[:, None] - book) ** 2 / (tau * scale)).softmax(-1)
            total += torch.stack([some @ attention, attention.sum(0)])
        found = torch.where(total[1] > 0, total[0] / total[1].clamp(min=1e-300), book)
        moved, book = (found - book).abs().max(), found
        if moved <= 1e-5 * scale.sqrt():
            break
    return book.sort().values


def nearest(values: Tensor, book: Tensor) -> Tensor:
    """Index of the nearest code (ties: the lower value) in a book (K,) of any order: uint8 of the shape of values."""
    ordered, order = book.sort()
    found = torch.bucketize(values.contiguous(), (ordered[1:] + ordered[:-1]) / 2, out_int32=True)
    return order.to(torch.uint8)[found]


def nearest_rows(values: Tensor, books: Tensor, which: Tensor) -> Tensor:
    """values (out, in), each row under the book (of `books`, (n, K)) that `which` (out,) int64 names: (out, in) uint8, as `nearest`."""
    ordered, order = books.sort(1)
    found = torch.searchsorted(((ordered[:, 1:] + ordered[:, :-1]) / 2)[which], values.contiguous())
    return order.to(torch.uint8)[which].gather(1, found)


def rows_alike(weight: Tensor, groups: int, iterations: int = 20) -> Tensor:
    """Rows (out, in) in `groups` groups by the distribution of their weights: (out,) int64.

    k-means of the rows' quantile functions at 32 points, whose distance is the Wasserstein-2 distance of the distributions; from
    groups of equal size by the rows' norm."""
    levels = (torch.arange(32, device=weight.device) + 0.5) / 32
    ordered = weight.float().sort(1).values
    places = (levels * weight.shape[1]).long().clamp(max=weight.shape[1] - 1)
    features = ordered[:, places].double()
    group = torch.empty(len(weight), dtype=torch.int64, device=weight.device)
    group[features.norm(dim=1).argsort(stable=True)] = torch.arange(len(weight), device=weight.device) * groups // len(weight)
    for _ in range(iterations):
        count = torch.bincount(group, minlength=groups).double()
        centers = torch.zeros(groups, 32, dtype=torch.float64, device=weight.device).index_add_(0, group, features)
        centers = torch.where(count[:, None] > 0, centers / count[:, None].clamp(min=1), torch.inf)
        found = torch.cdist(features, centers).nan_to_num(nan=torch.inf).argmin(1)
        if torch.equal(found, group):
            break
        group = found
    return group


def joint(weight: Tensor, book: Tensor, which: Tensor, importance: Tensor, hessian: Tensor, *, iterations: int, rate: float, reach: int,
          proximal: float) -> tuple[Tensor, Tensor]:
    """Book and codes trained together on tr((D - W) H (D - W)^T). weight (out, in) fp32; book (books, K), sorted; which (out,): the
    row's book; importance (out,): what the error of a row counts. -> codes (out, in) uint8 and the book: the best seen.

    Logits and their moments are (2 reach + 1, rows, in) for some rows at a time, which a step changes while they are in the cache."""
    size, device = book.shape[1], weight.device
    codes, window = nearest_rows(weight, book, which), torch.arange(-reach, reach + 1, device=device)
    places = torch.arange(size, device=device) + window[:, None]
    outside, places = (places < 0) | (places >= size), places.clamp(0, size - 1)
    gap = ((book[:, -1] - book[:, 0]) / (size - 1)).clamp(min=1e-30)
    h = hessian.to(device) / hessian.diagonal().mean().clamp(min=1e-30)
    weigh, book = (importance / importance.mean())[:, None], book.clone()
    moments = torch.zeros_like(book), torch.zeros_like(book)

    def around() -> Tensor:  # (2 reach + 1, books K): what the codes within reach of each stand for
        return book[:, places].transpose(0, 1).reshape(len(window), -1)

    parts, values = [], around()
    every = max(1, (TILE if device.type == "cpu" else PIECE) // (len(window) * weight.shape[1]))
    for low in range(0, len(weight), every):
        rows = slice(low, low + every)
        base, unit = (codes[rows].long() + size * which[rows, None]).flatten(), gap[which[rows]][:, None]
        shape = (len(window), *weight[rows].shape)
        logits = -((weight[rows] - values.index_select(1, base).view(shape)) / unit) ** 2
        logits.masked_fill_(outside.repeat(1, len(book)).index_select(1, base).view(shape), -torch.inf)
        parts.append((rows, base, unit, logits, torch.zeros_like(logits), torch.zeros_like(logits)))
    best, kept = None, None
    for step in range(1, iterations + 2):
        left, sharp = 1 - (step - 1) / max(1, iterations), SOFT * (HARD / SOFT) ** ((step - 1) / max(1, iterations))
        values, loss, picked = around(), 0.0, torch.empty_like(codes)
        by_code = torch.zeros(values.shape, dtype=torch.float64, device=device)
        for rows, base, unit, logits, first, second in parts:
            below, value, own = logits - logits.amax(0), values.index_select(1, base).view(logits.shape), weight[rows]
            chosen = _last_zero(below)
            at = value.gather(0, chosen[None])[0]
            picked[rows] = codes[rows] + (chosen - reach).to(torch.uint8)
            loss += float((weigh[rows] * ((at - own) @ h) * (at - own)).sum(dtype=torch.float64))
            if step > iterations:
                continue
            # Not exp(-inf) and, in _adam, not sqrt(0): they take many times as long as other numbers.
            p = F.threshold(below.mul_(sharp).clamp_(min=math.log(TINY) - 1).exp_(), TINY, 0.0, inplace=True)
            p /= p.sum(0)
            mean = (p * value).sum(0)
            p *= weigh[rows] * ((mean - own) @ h)
            by_code += torch.stack([values.new_zeros(values.shape[1]).index_add_(0, base, each.flatten()) for each in p])
            if proximal:
                p /= (value - at).abs_().div_(unit).clamp_(min=1).pow_(proximal)
            move = F.hardshrink(p.mul_(value.sub_(mean)), TINY)
            _adam(logits, move, first, second, step, rate * left)
        if best is None or loss < best:
            best, kept = loss, (picked, book.clone())
        if step <= iterations:
            slope = torch.zeros_like(book)
            for place, each in zip(places, by_code.to(book.dtype)):
                slope.index_add_(1, place, each.view_as(book))
            _adam(book, slope, *moments, step, 0.1 * rate * left * gap[:, None])
    return kept


def _last_zero(below: Tensor) -> Tensor:
    """Where (n, ...) numbers <= 0 are 0 along the first axis, the last of such: int64. `argmax` takes ten times as long."""
    order = torch.arange(float(len(below)), device=below.device).view(-1, *[1] * (below.dim() - 1))
    return (below * 1e30).clamp_(min=-len(below)).add_(order).amax(0).long()


def _adam(value: Tensor, gradient: Tensor, first: Tensor, second: Tensor, step: int, rate: float | Tensor) -> None:
    """Adam's step number `step` (beta 0.9 and 0.99), in place."""
    first.lerp_(gradient, 0.1)
    second.mul_(0.99).addcmul_(gradient, gradient, value=0.01)
    value -= first / second.div(1 - 0.99**step).add_(1e-24).sqrt_() * (rate / (1 - 0.9**step))
