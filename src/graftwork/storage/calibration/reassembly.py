"""Which channels of a map's inputs to take apart and which to put together (channel reassembly of QLLM, arXiv 2310.08041).

With m_i the largest |x_i| and a threshold theta, channel i becomes T_i = max(1, ceil(m_i / theta)) copies. As many channels as that adds,
n = sum (T_i - 1), are put into others: of the channels in one piece, those at even places are candidates, those at odd ones where they
may go; the n with the least distance to their nearest are taken,

    distance(i, j) = 1/4 mean (x_i - x_j)^2 |w_i - w_j|^2

which is what the pair changes of the outputs' mean square. theta falls from the largest m_i, so long as n is no more than asked for. The
one is kept with the least |Q(z) D(Q(W'))^T - X W^T|^2 over samples X, Q the rounding of inputs and D(Q()) the format's nearest codes.

n grows by one whenever theta passes some m_i / k, so theta is the (n + 1)-th largest of these, and n is what is tried.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._activations import near
from .._channels import columns, identity, kind, reassembled

if TYPE_CHECKING:
    from .._groups import GroupQuantizer


def pieces(largest: Tensor, extra: int) -> Tensor:
    """largest (in,) -> T (in,) int64 of the lowest threshold that adds at most `extra` channels (fewer where values are equal)."""
    wide, count = largest.double(), min(extra + 1, len(largest))
    parts = wide.topk(count).values[:, None] / torch.arange(1, extra + 2, device=wide.device)
    theta = parts.flatten().topk(extra + 1).values[-1]
    if not theta > 0:
        return torch.ones_like(wide, dtype=torch.int64)
    return (wide / theta - 1e-9).ceil().clamp(min=1).long()


def distances(samples: Tensor, weight: Tensor) -> Tensor:
    """samples (n, in), weight (out, in) -> distance of every even channel to every odd one, (ceil(in / 2), floor(in / 2))."""
    return 0.25 * _squares(samples) / len(samples) * _squares(weight)


def _squares(matrix: Tensor) -> Tensor:
    even, odd = matrix[:, 0::2], matrix[:, 1::2]
    return (even.square().sum(0)[:, None] + odd.square().sum(0) - 2 * even.T @ odd).clamp(min=0)


def table(largest: Tensor, distance: Tensor, extra: int) -> Tensor | None:
    """channels (2, in) with at most `extra` channels added; None where too few are left to be put together."""
    width = len(largest)
    count = pieces(largest, extra)
    split, added = count > 1, int((count - 1).sum())
    channels = identity(width, largest.device).long()
    if added:
        best, place = distance.masked_fill(split[0::2, None] | split[1::2], torch.inf).min(1)
        order = best.argsort(stable=True)[:added]
        if len(order) < added or not best[order].isfinite().all():
            return None
        sources = (2 * order).sort()
        channels[0, sources.values] = 2 * place[order[sources.indices]] + 1
        channels[1, sources.values] = torch.arange(width, device=largest.device).repeat_interleave(count - 1)
    return channels.to(kind(width))


def best_table(weight: Tensor, quantizer: GroupQuantizer, samples: Tensor, largest: Tensor, ratio: float, steps: int) -> Tensor:
    """weight (out, in) fp32, samples (n, in), largest (in,): the best of the tables of about `steps` numbers of added channels, up to
    `ratio` of all; that of none among them."""
    width = weight.shape[1]
    limit = int(ratio * width)
    wanted, distance = samples @ weight.T, distances(samples, weight) if limit else None
    best, least = None, None
    for extra in sorted({round(limit * step / steps) for step in range(steps + 1)}):
        tried = table(largest, distance, extra) if extra else identity(width, weight.device)
        if tried is None:
            break
        inputs = near(reassembled(samples, tried), quantizer.activations)
        loss = (inputs @ quantizer.nearest(columns(weight, tried)).T - wanted).double().square().sum()
        if least is None or loss < least:
            best, least = tried, loss
    return best
