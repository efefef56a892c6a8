"""Logits to tokens, each request by its own options.

Every request draws from a generator of its own, by inversion of the cumulative distribution in float64, so that what it says
depends neither on the batch nor on the order of requests. Order of the steps: guide (what the grammar allows), bias,
penalties, minimum length, temperature, top-k, min-p, top-p.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .request import Request, TokenLogprob


def choose(logits: Tensor, requests: Sequence[Request], ends: frozenset[int], gaps: bool = False) -> list[int]:
    """One token for each request from logits (N, V). Appends to the requests' logprobs and gaps where they are asked for."""
    logits = logits.float()
    if gaps:
        top = logits.topk(2, dim=-1).values
        for request, gap in zip(requests, (top[:, 0] - top[:, 1]).tolist()):
            request.gaps.append(gap)
    special = [i for i, request in enumerate(requests) if not request.sampling.plain]
    tokens = logits.argmax(-1).tolist()
    for i in special:
        tokens[i] = _one(logits[i], requests[i], ends)
    for i, request in enumerate(requests):
        if request.sampling.logprobs is not None:
            request.logprobs.append(_report(logits[i], tokens[i], request.sampling.logprobs))
    return tokens


def _one(logits: Tensor, request: Request, ends: frozenset[int]) -> int:
    s = request.sampling
    logits = logits.clone()
    if request.guide is not None:
        logits = request.guide.mask(logits)
    for token, bias in s.logit_bias.items():
        logits[token] += bias
    if s.repetition_penalty != 1:
        seen = torch.tensor(sorted({*request.prompt, *request.output}), device=logits.device)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / s.repetition_penalty, values * s.repetition_penalty)
    if (s.presence_penalty or s.frequency_penalty) and request.output:
        tokens, counts = torch.tensor(request.output, device=logits.device).unique(return_counts=True)
        logits[tokens] -= s.presence_penalty + s.frequency_penalty * counts.float()
    if len(request.output) < s.min_tokens:
        logits[sorted({*ends, *s.stop_token_ids})] = float("-inf")
    if s.temperature == 0:
        return int(logits.argmax())
    values, order = logits.sort(descending=True, stable=True)
    values = values / s.temperature
    if s.top_k:
        values = values[: s.top_k]
    shares = values.double().softmax(-1)
    if s.min_p:
        shares = torch.where(shares >= s.min_p * shares[0], shares, 0.0)
        shares = shares / shares.sum()
    before = shares.cumsum(-1) - shares
    shares = torch.where(before < s.top_p, shares, 0.0)  # the first token stays, whatever top_p
    total = shares.cumsum(-1)
    drawn = torch.rand((), generator=generator_of(request), dtype=torch.float64).to(total.device)
    place = int((total <= drawn * total[-1]).sum())
    return int(order[min(place, int((shares > 0).sum()) - 1)])


def generator_of(request: Request) -> torch.Generator:
    """The request's own source of randomness; seeded from its seed, else from the machine's entropy."""
    if request.generator is None:
        request.generator = torch.Generator()
        if request.sampling.seed is None:
            request.generator.seed()
        else:
            request.generator.manual_seed(request.sampling.seed & (2**63 - 1))
    return request.generator


def _report(logits: Tensor, token: int, count: int) -> TokenLogprob:
    logs = logits.log_softmax(-1)
    top = logs.topk(count) if count else None
    return TokenLogprob(token, float(logs[token]), () if top is None else tuple(zip(top.indices.tolist(), top.values.tolist())))
