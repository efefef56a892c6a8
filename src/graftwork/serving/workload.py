"""Seeded traffic for measuring a server with many adapters, and what is measured (S-LoRA's recipe, arXiv 2311.03285).

The traffic is open loop: arrivals are fixed beforehand and do not wait for answers. `trace` draws as S-LoRA's code does, from
numpy's legacy generator in this order: adapters, prompt lengths, answer lengths, gaps.

    N = int(rate x duration)            adapter = floor(n x power(alpha))       density alpha x^(alpha - 1) on [0, 1]
    length = randint(low, high)         gap ~ Gamma(shape 1/cv^2, scale cv^2/rate), arrival = sum of gaps

alpha = 1 is uniform, smaller alphas send more to fewer adapters; cv = 1 is Poisson. There is one arrival process for all, so a
burst is a mix of adapters. `trace_per_adapter` draws what the paper describes instead: adapter i has an arrival process of its
own, with a rate in proportion to (i + 1)^-alpha (alpha = 0 is uniform), so bursts belong to adapters.

Ranks go round: adapter i has ranks[i mod len(ranks)]. A trace is known by its hash; results name it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from ..errors import UsageError


@dataclass(frozen=True, eq=False)
class Trace:
    """Request i arrives at arrivals[i] seconds for adapter adapters[i], with a prompt and an answer of so many tokens. rate:
    requests a second that were asked for."""

    arrivals: np.ndarray
    adapters: np.ndarray
    prompts: np.ndarray
    answers: np.ndarray
    ranks: tuple[int, ...]
    rate: float

    def __len__(self) -> int:
        return len(self.arrivals)

    def rank(self, adapter: int) -> int:
        return self.ranks[adapter % len(self.ranks)]

    @property
    def hash(self) -> str:
        """Of arrivals (to the microsecond), adapters, lengths and ranks."""
        columns = [np.round(self.arrivals * 1e6), self.adapters, self.prompts, self.answers, np.array(self.ranks)]
        return hashlib.sha256(b"".join(np.ascontiguousarray(c, dtype="<i8").tobytes() for c in columns)).hexdigest()[:16]

    def at_once(self) -> Trace:
        """The same requests, all there from the start: how fast they are answered is the capacity of a server."""
        return replace(self, arrivals=np.zeros(len(self)))


def trace(*, adapters: int, rate: float, duration: float, alpha: float = 1.0, cv: float = 1.0, prompt: tuple[int, int] = (8, 512),
          answer: tuple[int, int] = (8, 512), ranks: Sequence[int] = (64, 32, 16, 8), seed: int = 42) -> Trace:
    """S-LoRA's generator. prompt, answer: lengths in [low, high). Raises UsageError for a trace without requests."""
    _check(adapters, rate, duration, alpha > 0, cv, prompt, answer, ranks)
    draw, count = np.random.RandomState(seed), int(rate * duration)
    chosen = (draw.power(alpha, count) * adapters).astype(np.int64)
    prompts, answers = draw.randint(*prompt, count), draw.randint(*answer, count)
    gaps = draw.gamma(1 / cv**2, cv**2 / rate, count)
    return Trace(np.cumsum(gaps), np.minimum(chosen, adapters - 1), prompts, answers, tuple(ranks), rate)


def trace_per_adapter(*, adapters: int, rate: float, duration: float, alpha: float = 1.0, cv: float = 1.0,
                      prompt: tuple[int, int] = (8, 512), answer: tuple[int, int] = (8, 512), ranks: Sequence[int] = (64, 32, 16, 8),
                      seed: int = 42) -> Trace:
    """One Gamma process per adapter, with power-law rates that add up to `rate`. Drawn adapter by adapter, then lengths in order
    of arrival. Raises UsageError for a trace without requests."""
    _check(adapters, rate, duration, alpha >= 0, cv, prompt, answer, ranks)
    draw = np.random.RandomState(seed)
    shares = np.arange(1, adapters + 1, dtype=np.float64) ** -alpha
    times, owners = [], []
    for i, share in enumerate(rate * shares / shares.sum()):
        now = draw.gamma(1 / cv**2, cv**2 / share)
        while now < duration:
            times.append(now)
            owners.append(i)
            now += draw.gamma(1 / cv**2, cv**2 / share)
    order = np.argsort(times, kind="stable")
    prompts, answers = draw.randint(*prompt, len(order)), draw.randint(*answer, len(order))
    return Trace(np.array(times, dtype=np.float64)[order], np.array(owners, dtype=np.int64)[order], prompts, answers, tuple(ranks), rate)


def group_sizes(kind: str, rows: int) -> list[int]:
    """How many of `rows` requests each adapter gets, after Punica (arXiv 2310.18547): identical (one adapter), distinct (one each),
    uniform (ceil(sqrt(rows)) adapters of equal share), skewed (group k has floor(1.5^k), until all are used)."""
    if kind == "identical":
        return [rows]
    if kind == "distinct":
        return [1] * rows
    if kind == "uniform":
        groups = int(np.ceil(np.sqrt(rows)))
        return [rows // groups + (i < rows % groups) for i in range(groups)]
    if kind == "skewed":
        sizes: list[int] = []
        while sum(sizes) < rows:
            sizes.append(min(int(1.5 ** len(sizes)), rows - sum(sizes)))
        return sizes
    raise UsageError(f"there is no mix of adapters '{kind}'", remedy="identical, distinct, uniform or skewed")


@dataclass(frozen=True)
class Record:
    """What became of a request, in seconds on one clock. first_token: None where there was none. finished: it was answered to its
    end, neither aborted nor failed."""

    arrived: float
    prompt: int
    answer: int
    first_token: float | None
    ended: float
    finished: bool


@dataclass(frozen=True)
class Metrics:
    """Of one run; times in seconds. throughput: finished requests a second, the drain after the last arrival included;
    stripped_throughput: without 10 s at either end and the requests that are expected in them (None: the run is too short).
    tokens_per_second: of answers. latency, per_token (of prompt and answer), per_answer_token: means over finished requests. ttft:
    time to the first token. attainment: share of all requests with ttft < slo; satisfaction: mean of 1 - (ttft/slo)^2 where that
    is so; requests without a token count 0 in both. unfinished: aborted or failed."""

    requests: int
    finished: int
    unfinished: int
    elapsed: float
    throughput: float
    stripped_throughput: float | None
    tokens_per_second: float
    latency: float
    per_token: float
    per_answer_token: float
    ttft_mean: float
    ttft_p50: float
    ttft_p90: float
    ttft_p95: float
    slo: float
    attainment: float
    satisfaction: float

    def as_dict(self) -> dict[str, float | int | None]:
        return asdict(self)


def metrics(records: Sequence[Record], *, elapsed: float, slo: float, rate: float | None = None, strip: float = 10.0) -> Metrics:
    """elapsed: from the start to the last answer. rate: of arrivals, for the stripped throughput."""
    done = [r for r in records if r.finished]
    first = np.array([r.first_token - r.arrived for r in records if r.first_token is not None and r.finished])
    good = first[first < slo]
    count = max(len(records), 1)
    stripped = None
    if rate is not None and elapsed > 2 * strip:
        stripped = (len(done) - 2 * strip * rate) / (elapsed - 2 * strip)
    mean, percentile = [np.mean, np.percentile] if len(first) else [lambda values: float("nan"), lambda values, q: float("nan")]
    return Metrics(
        requests=len(records), finished=len(done), unfinished=len(records) - len(done), elapsed=elapsed,
        throughput=len(done) / elapsed if elapsed else 0.0, stripped_throughput=stripped,
        tokens_per_second=sum(r.answer for r in records) / elapsed if elapsed else 0.0,
        latency=float(mean([r.ended - r.arrived for r in done])),
        per_token=float(mean([(r.ended - r.arrived) / (r.prompt + r.answer) for r in done])),
        per_answer_token=float(mean([(r.ended - r.arrived) / r.answer for r in done])),
        ttft_mean=float(mean(first)), ttft_p50=float(percentile(first, 50)), ttft_p90=float(percentile(first, 90)),
        ttft_p95=float(percentile(first, 95)), slo=slo, attainment=len(good) / count,
        satisfaction=float((1 - (good / slo) ** 2).sum()) / count)


def _check(adapters: int, rate: float, duration: float, alpha: bool, cv: float, prompt: tuple[int, int], answer: tuple[int, int],
           ranks: Sequence[int]) -> None:
    wrong = [text for bad, text in [
        (adapters < 1, "there is no adapter"), (not rate > 0, "the rate is not above 0"), (int(rate * duration) < 1, "no request arrives"),
        (not alpha, "alpha is too small"), (not cv > 0, "cv is not above 0"), (not ranks, "there are no ranks"),
        (not 1 <= prompt[0] < prompt[1], "prompt lengths are empty"), (not 1 <= answer[0] < answer[1], "answer lengths are empty")] if bad]
    if wrong:
        raise UsageError("; ".join(wrong), remedy="correct the workload")
