"""The server on a virtual clock: the engine's own scheduler, policies and page accounting, and a formula in place of the model.

    step time = fixed + token x (tokens of the step) + adapter x (distinct adapters of the step) + byte x (bytes loaded for it)

With merging, a step of merged weights has no distinct adapters, and `switch` is added where other weights were merged before.

Requests of a trace go through the same Scheduler, Memory and Pool as in the engine; only the pool's buffer is a meta tensor, an
adapter is the list of its tensors' sizes, and a request ends when it has its full answer. Nothing depends on the machine or the
hour: the same trace and options give the same result, hours of traffic in seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from ..errors import GraftworkError, UsageError
from .engine.memory import Memory
from .engine.merging import Merging
from .engine.policies import make_policy
from .engine.pool import LayerShape, Pool
from .engine.request import Request, Sampling, Status
from .engine.scheduler import Limits, Policy, Scheduler
from .workload import Metrics, Record, Trace, metrics


@dataclass(frozen=True)
class StepCost:
    """Seconds of a step: fixed, and for each token, distinct adapter, and byte that is loaded. switch: of merging an adapter."""

    fixed: float
    token: float
    adapter: float = 0.0
    byte: float = 0.0
    switch: float = 0.0

    def seconds(self, tokens: int, adapters: int, nbytes: int) -> float:
        return self.fixed + self.token * tokens + self.adapter * adapters + self.byte * nbytes


@dataclass(frozen=True)
class Machine:
    """What is simulated. layers, page_tokens, dtype: as the pool's; pages: how many. sizes(rank): bytes of an adapter's tensors."""

    cost: StepCost
    layers: tuple[LayerShape, ...]
    pages: int
    sizes: Callable[[int], Sequence[int]]
    page_tokens: int = 16
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Outcome:
    """requests: as the engine leaves them, in order of the trace. distinct: mean number of adapters in a step. loaded: bytes. merged:
    steps with merged weights."""

    metrics: Metrics
    requests: list[Request]
    steps: int
    distinct: float
    loads: int
    loaded: int
    evictions: int
    preempted: int
    trace: str
    merged: int = 0


def lora_sizes(targets: Sequence[tuple[int, int]], layers: int, itemsize: int = 2) -> Callable[[int], Sequence[int]]:
    """Sizes of LoRA's tensors by rank; targets: (width in, width out) of each projection of a layer."""

    @cache
    def sizes(rank: int) -> Sequence[int]:
        return [rank * width * itemsize for pair in targets for width in pair] * layers

    return sizes


def simulate(trace: Trace, machine: Machine, *, policy: str | Policy = "fcfs", options: Mapping[str, object] | None = None,
             limits: Limits | None = None, slo: float = 6.0, prefix_cache: bool = False,
             tenant: Callable[[int], str] | None = None, merging: Merging | None = None) -> Outcome:
    """Answer a trace. options: of the policy. merging: when to serve from merged weights; left out: never. slo: seconds to the first
    token, the requests' deadline under early_abort. tenant: of the i-th request, its adapter's name if left out. Every prompt is one
    token repeated, so with prefix_cache requests of the same adapter share what they have in common. Raises UsageError for a trace
    with a request that the pool cannot hold."""
    now = 0.0
    source = _Adapters(trace, machine.sizes)
    pool = Pool(machine.layers, machine.pages, page_tokens=machine.page_tokens, dtype=machine.dtype, device="meta")
    memory = Memory(pool, source, prefix_cache=prefix_cache)
    chosen = policy if isinstance(policy, Policy) else make_policy(policy, **(options or {}))
    scheduler = Scheduler(memory, limits or Limits(), chosen, lambda: now)
    requests = _requests(trace, slo, tenant)
    for request in requests:
        worst = pool.pages_for(request.worst) + memory.adapter_pages(request)
        if worst > pool.pages:
            raise UsageError(f"request {request.id} may need {worst} pages, the pool has {pool.pages}", remedy="give it more pages")
    steps = distinct = arrived = 0
    held: str | None = None  # what is merged
    while True:
        while arrived < len(requests) and requests[arrived].arrived <= now:
            scheduler.add(requests[arrived])
            arrived += 1
        before = source.loaded
        step = scheduler.step() if merging is None else merging.step(scheduler)
        for request, reason in [(r, "abort") for r in step.aborted] + [(r, "error") for r, _ in step.failed]:
            _end(scheduler, request, reason, now)
        if not step.work:
            if step.aborted or step.failed:
                continue
            if arrived == len(requests):
                break
            now = max(now, requests[arrived].arrived)
            continue
        steps += 1
        adapters = len({request.adapter for request, _ in step.work})
        distinct += adapters
        seconds = machine.cost.seconds(step.tokens, 0 if step.merged else adapters, source.loaded - before)
        switch = machine.cost.switch if step.merged not in (None, held) else 0.0
        held = step.merged or held
        now += seconds + switch
        if merging is not None:
            merging.ran(step, len(scheduler.running), seconds, switch)
        for request, count in step.work:
            request.computed += count
            if prefix_cache:
                memory.computed(request)
            if request.computed == request.length:
                request.output.append(1)
                if request.first_token is None:
                    request.first_token = now
                chosen.wrote(request, 1)
                if request.remaining == 0:
                    _end(scheduler, request, "length", now)
    if scheduler.waiting or scheduler.running:
        raise GraftworkError("requests wait for memory and nothing runs that could give it back", remedy="give the pool more pages")
    records = [Record(r.arrived, len(r.prompt), len(r.output), r.first_token, r.ended or now, r.finish_reason == "length")
               for r in requests]
    return Outcome(metrics(records, elapsed=now, slo=slo, rate=trace.rate), requests, steps, distinct / max(steps, 1), memory.loads,
                   source.loaded, memory.evictions, sum(r.preempted for r in requests), trace.hash,
                   0 if merging is None else merging.steps)


def _end(scheduler: Scheduler, request: Request, reason: str, now: float) -> None:
    scheduler.finish(request)
    request.finish_reason, request.ended, request.status = reason, now, Status.FINISHED


def _requests(trace: Trace, slo: float, tenant: Callable[[int], str] | None) -> list[Request]:
    answers = {n: Sampling(max_tokens=n, ignore_eos=True) for n in set(trace.answers.tolist())}
    prompts = {n: (1,) * n for n in set(trace.prompts.tolist())}
    rows = zip(trace.arrivals.tolist(), trace.adapters.tolist(), trace.prompts.tolist(), trace.answers.tolist())
    return [Request(str(i), prompts[prompt], f"a{adapter}", answers[answer], arrived=at, deadline=slo,
                    tenant=tenant(i) if tenant else f"a{adapter}")
            for i, (at, adapter, prompt, answer) in enumerate(rows)]


class _Adapters:
    """The trace's adapters, of which only the sizes exist."""

    def __init__(self, trace: Trace, sizes: Callable[[int], Sequence[int]]):
        self.trace, self.of_rank, self.loaded = trace, sizes, 0

    def digest(self, name: str) -> str:
        return name

    def sizes(self, digest: str) -> Sequence[int]:
        return self.of_rank(self.trace.rank(int(digest[1:])))

    def virtual(self, digest: str, prompt: Sequence[int]) -> tuple[int, ...]:
        return ()

    def load(self, digest: str, place: Callable[[int, Sequence[int], torch.dtype], torch.Tensor]) -> tuple[str, Callable[[], None]]:
        self.loaded += sum(self.sizes(digest))
        return digest, _nothing


def _nothing() -> None:
    """What unloads an adapter that was never there."""
