"""Which requests take part in the next step, and with how many tokens.

The scheduler decides once a step (iteration-level scheduling). Running requests come first: one token each for those that
write, pieces of at most `chunk` tokens for prompts that are not through. Then waiting requests are admitted in the order of
the policy, as long as the budget of tokens, the number of running requests, and the memory allow: a request is let in only if
all that run could write to their limits, the one that ends first giving its pages back first (`worst_pages`); `Limits.optimism`
above 1 lets in more than that.

When memory runs out all the same, the request that came last is put back into the queue and its tokens are computed again
later. A policy is an order over waiting requests; it never sees tensors, so the simulator runs the same code on a virtual clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ...errors import GraftworkError
from .request import Request, Status


class Memory(Protocol):
    """What the scheduler asks of the pool."""

    page_tokens: int

    def available(self) -> int:
        """Pages that are free or can be made free without stopping a request (cached prefixes, idle adapters)."""

    def adapter_pages(self, name: str | None) -> int:
        """Pages that loading this adapter takes; 0 where it is resident already or needs none."""

    def reserve(self, request: Request, tokens: int) -> bool:
        """Take the pages for this many more tokens of a request, or say that they are not there."""

    def release(self, request: Request) -> None:
        """Give all pages of a request back."""

    def prepare(self, request: Request) -> bool:
        """Before a request runs for the first time: adopt cached prefixes and make its adapter resident. False: not now."""


@dataclass(frozen=True)
class Limits:
    """max_running: requests in a step. max_tokens: new tokens of a step. chunk: tokens of one prompt in a step. optimism: how much
    of the memory may be promised; 1 is what is there."""

    max_running: int = 256
    max_tokens: int = 2048
    chunk: int = 512
    optimism: float = 1.0


@dataclass
class Step:
    """The work of one step: (request, number of its pending tokens to compute)."""

    work: list[tuple[Request, int]] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)
    aborted: list[Request] = field(default_factory=list)
    failed: list[tuple[Request, GraftworkError]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(count for _, count in self.work)


class Policy:
    """Order of waiting requests: first come, first served. Subclasses override what differs."""

    name = "fcfs"

    def order(self, waiting: Sequence[Request], running: Sequence[Request], now: float) -> Iterable[Request]:
        return waiting

    def hopeless(self, waiting: Sequence[Request], now: float) -> list[Request]:
        """Requests that are given up because their first token would come too late."""
        return []

    def admitted(self, request: Request) -> None:
        """A request starts to run."""

    def wrote(self, request: Request, tokens: int) -> None:
        """A request got tokens."""

    def arrived(self, request: Request, active: Iterable[Request]) -> None:
        """A request joins the queue; active: those that wait or run."""


class Scheduler:
    """waiting and running requests, and the decision of every step."""

    def __init__(self, memory: Memory, limits: Limits, policy: Policy, clock: Callable[[], float]):
        self.memory, self.limits, self.policy, self.clock = memory, limits, policy, clock
        self.waiting: list[Request] = []
        self.running: list[Request] = []

    def add(self, request: Request) -> None:
        self.policy.arrived(request, [*self.waiting, *self.running])
        self.waiting.append(request)

    def step(self) -> Step:
        """Decide the next step. Empty when nothing can run."""
        now, step = self.clock(), Step()
        for request in self.policy.hopeless(self.waiting, now):
            self.waiting.remove(request)
            step.aborted.append(request)
        budget = self.limits.max_tokens
        for request in list(self.running):
            if request not in self.running or budget == 0:  # put back on behalf of an earlier one, or no room in this step
                continue
            count = min(request.pending, self.limits.chunk, budget)
            if self._make_room(request, count, step):
                step.work.append((request, count))
                budget -= count
        if not step.preempted:
            self._admit(step, budget, now)
        return step

    def finish(self, request: Request) -> None:
        """A request has ended, wherever it was."""
        self.memory.release(request)
        for queue in (self.waiting, self.running):
            if request in queue:
                queue.remove(request)
        request.status = Status.FINISHED

    # -- inside ---------------------------------------------------------------------------------------------------------------
    def _admit(self, step: Step, budget: int, now: float) -> None:
        for request in self.policy.order(list(self.waiting), self.running, now):
            if budget == 0 or len(self.running) >= self.limits.max_running or not self._fits(request):
                return
            try:
                if not self.memory.prepare(request):
                    return
            except GraftworkError as error:  # a broken adapter fails its own request only
                self.waiting.remove(request)
                step.failed.append((request, error))
                continue
            count = min(request.pending, self.limits.chunk, budget)
            if not self.memory.reserve(request, count):
                self.memory.release(request)
                return
            self.waiting.remove(request)
            self.running.append(request)
            request.status = Status.RUNNING
            self.policy.admitted(request)
            step.work.append((request, count))
            budget -= count

    def _fits(self, request: Request) -> bool:
        """Whether all could write to their limits with what is there."""
        pages = worst_pages([*self.running, request], self.memory.page_tokens)
        held = sum(len(r.pages) for r in self.running)
        promised = pages - held + self.memory.adapter_pages(request.adapter)
        return promised <= self.limits.optimism * self.memory.available()

    def _make_room(self, request: Request, count: int, step: Step) -> bool:
        """Pages for the next tokens, taking them from the request that came last where there are none."""
        while not self.memory.reserve(request, count):
            victim = self.running[-1]
            self.running.remove(victim)
            self.memory.release(victim)
            victim.status, victim.computed, victim.preempted = Status.WAITING, 0, victim.preempted + 1
            self.waiting.insert(0, victim)
            step.preempted.append(victim)
            step.work = [(r, n) for r, n in step.work if r is not victim]
            if victim is request:
                return False
        return True


def worst_pages(requests: Sequence[Request], page_tokens: int) -> int:
    """An upper bound of the pages that these requests hold at once when each writes to its limit, all at one token a step.

    Sorted by what is left, longest first: when request j (1-based) ends, those before it and itself have each written left_j
    more tokens, and those behind it have given their pages back; a request's last page is part empty:

        max over j of  (sum_{i <= j} length_i + j left_j + j (page_tokens - 1)) / page_tokens"""
    worst = held = 0
    for j, request in enumerate(sorted(requests, key=lambda r: -r.remaining), 1):
        held += request.length
        worst = max(worst, (held + j * (request.remaining + page_tokens - 1)) // page_tokens)
    return worst
