"""Which requests take part in the next step, and with how many tokens.

The scheduler decides once a step (iteration-level scheduling). Requests that write come first, each with its one token, so none
of them ever waits for another; then pieces of at most `chunk` tokens of prompts that are not through. Then waiting requests are
admitted in the order of the policy, as long as the budget of tokens, the number of running requests, and the memory allow: a
request is let in only if all that run could write to their limits, the one that ends first giving its pages back first
(`worst_pages`); so nothing is ever put back. `Limits.optimism` above 1 lets in more than that. The first one in the policy's
order that does not fit ends the round: what comes behind it does not overtake.

When memory runs out all the same, the request that came last is put back into the queue and its tokens are computed again
later. A policy is an order over waiting requests; it never sees tensors, so the simulator runs the same code on a virtual clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Protocol

from ...errors import GraftworkError, UsageError
from .request import Request, Status


class Memory(Protocol):
    """What the scheduler asks of the pool."""

    page_tokens: int

    def available(self) -> int:
        """Pages that are free or can be made free without stopping a request (cached prefixes, idle adapters)."""

    def capacity(self) -> int:
        """Those, and what the running requests hold themselves: all pages but those of adapters in use."""

    def content(self, request: Request) -> str:
        """What tells the request's adapter from others, "" for the bare base. Raises GraftworkError for one that is not there."""

    def adapter_pages(self, request: Request) -> int:
        """Pages that the request's adapter takes from the others; 0 where it is in use already or needs none."""

    def absent(self, request: Request) -> bool:
        """Whether the request's adapter has to be read before it can run, which is not the scheduler's to wait for."""

    def reserve(self, request: Request, tokens: int) -> bool:
        """Take the pages for this many more tokens of a request, or say that they are not there."""

    def release(self, request: Request) -> None:
        """Give all pages of a request back."""

    def prepare(self, request: Request) -> bool:
        """Before a request runs for the first time: adopt cached prefixes and make its adapter resident. False: not now."""


@dataclass(frozen=True)
class Limits:
    """max_running: requests in a step, never more than max_tokens. max_tokens: new tokens of a step. chunk: tokens of one prompt in
    a step. optimism: how much of the memory may be promised; 1 is what is there."""

    max_running: int = 256
    max_tokens: int = 2048
    chunk: int = 512
    optimism: float = 1.0


@dataclass
class Step:
    """The work of one step: (request, number of its pending tokens to compute). merged: content of the adapter that all of it is
    for, where it is to be computed with merged weights."""

    work: list[tuple[Request, int]] = field(default_factory=list)
    merged: str | None = None
    preempted: list[Request] = field(default_factory=list)
    aborted: list[Request] = field(default_factory=list)
    failed: list[tuple[Request, Exception]] = field(default_factory=list)
    absent: list[Request] = field(default_factory=list)  # left the queue until their adapters have been read

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

    def arrived(self, request: Request, waiting: Sequence[Request]) -> None:
        """A request is about to join those that wait."""


class Scheduler:
    """waiting and running requests, and the decision of every step."""

    def __init__(self, memory: Memory, limits: Limits, policy: Policy, clock: Callable[[], float]):
        self.memory, self.limits, self.policy, self.clock = memory, limits, policy, clock
        self.waiting: list[Request] = []
        self.running: list[Request] = []

    def add(self, request: Request) -> None:
        self.policy.arrived(request, self.waiting)
        self.resume(request)

    def resume(self, request: Request) -> None:
        """Queue a request by its arrival; one that was put back in its time goes to the head, as it was then."""
        at = 0 if request.preempted else len(self.waiting)
        while at and self.waiting[at - 1].arrived > request.arrived and not self.waiting[at - 1].preempted:
            at -= 1
        request.status = Status.WAITING
        self.waiting.insert(at, request)

    def step(self, only: str | None = None) -> Step:
        """Decide the next step. Empty when nothing can run. only: requests with this adapter content; the others keep what they have,
        and nobody is let in whom those that wait before him would not leave the room."""
        now, step = self.clock(), Step()
        for request in self.policy.hopeless(self.waiting, now):
            self.waiting.remove(request)
            request.status = Status.FINISHED
            step.aborted.append(request)
        one: list[tuple[Request, int]] = []
        more: list[tuple[Request, int]] = []
        writing: list[Request] = []  # those that get a token in this step, and from then on in every step
        reading: list[Request] = []  # those whose prompts are not through, or left out; nobody knows yet when they begin to write
        for request in self.running:
            if only is not None and self.memory.content(request) != only:
                reading.append(request)
                continue
            pending = request.pending
            (one if pending == 1 else more).append((request, pending))
        budget = self.limits.max_tokens
        for request, pending in one + more:
            if request.status is not Status.RUNNING:  # put back on behalf of another
                continue
            count = min(pending, self.limits.chunk, budget)
            if count and self._make_room(request, count, step):
                step.work.append((request, count))
                budget -= count
            (writing if count == pending else reading).append(request)
        if not step.preempted:
            self._admit(step, budget, now, writing, reading, only)
        return step

    def may_leave_out(self, only: str) -> bool:
        """Whether all running requests could write to their limits even if those of other adapters wait for any number of steps."""
        writing, reading = [], []
        for request in self.running:
            (writing if request.pending == 1 and self.memory.content(request) == only else reading).append(request)
        return self._there(worst_pages(writing, self.memory.page_tokens, reading))

    def finish(self, request: Request) -> None:
        """A request has ended, wherever it was."""
        self.memory.release(request)
        if request.status is not Status.FINISHED:
            if request.status is not Status.READING:
                (self.running if request.status is Status.RUNNING else self.waiting).remove(request)
            request.status = Status.FINISHED

    # -- inside ---------------------------------------------------------------------------------------------------------------
    def _admit(self, step: Step, budget: int, now: float, writing: list[Request], reading: list[Request], only: str | None) -> None:
        most = min(self.limits.max_running, self.limits.max_tokens)
        if budget == 0 or len(self.running) >= most or not self.waiting:
            return
        aside: dict[str, int] = {}  # adapters of requests that are left out, and pages that they will take
        for request in self.policy.order(list(self.waiting), self.running, now):
            if budget == 0 or len(self.running) >= most:
                return
            try:
                if self.memory.absent(request):
                    self.waiting.remove(request)
                    request.status = Status.READING
                    step.absent.append(request)
                    continue
                content = "" if only is None else self.memory.content(request)
                if not self._fits(request, budget, writing, reading, sum(pages for other, pages in aside.items() if other != content)):
                    return
                if only is not None and content != only:
                    aside[content] = self.memory.adapter_pages(request)
                    reading.append(request)
                    most -= 1
                    continue
                if not self.memory.prepare(request):
                    return
            except (GraftworkError, OSError) as error:  # a broken adapter fails its own request only
                self.waiting.remove(request)
                request.status = Status.FINISHED
                step.failed.append((request, error))
                continue
            count = min(request.pending, self.limits.chunk, budget)
            if not self.memory.reserve(request, count):
                self.memory.release(request)
                request.computed = 0
                return
            self.waiting.remove(request)
            self.running.append(request)
            request.status = Status.RUNNING
            self.policy.admitted(request)
            step.work.append((request, count))
            (writing if count == request.pending else reading).append(request)
            budget -= count

    def _there(self, pages: int) -> bool:
        """Whether so many pages of requests, what they hold now included, are there or may be promised."""
        available = self.memory.available()
        return pages - (self.memory.capacity() - available) <= self.limits.optimism * available

    def _fits(self, request: Request, budget: int, writing: list[Request], reading: list[Request], aside: int) -> bool:
        """Whether all could write to their limits with what is there, `aside` pages left free. Raises UsageError for a request that
        never will, alone with the whole pool for itself: its adapter was replaced by a larger one while it waited."""
        size = self.memory.page_tokens
        if request.length <= min(budget, self.limits.chunk):
            pages = worst_pages([*writing, request], size, reading)
        else:
            pages = worst_pages(writing, size, [*reading, request])
        pages += self.memory.adapter_pages(request)
        if self.running or aside:
            return self._there(pages + aside)
        capacity = self.memory.capacity()
        if pages > capacity:
            raise UsageError(f"the request may need {pages} pages of memory with its adapter, the pool has {capacity}",
                             remedy="ask for fewer tokens, or give the pool more memory")
        return True

    def _make_room(self, request: Request, count: int, step: Step) -> bool:
        """Pages for the next tokens, taking them from the request that came last where there are none."""
        while not self.memory.reserve(request, count):
            victim = self.running.pop()
            self.memory.release(victim)
            victim.status, victim.computed, victim.preempted = Status.WAITING, 0, victim.preempted + 1
            self.waiting.insert(0, victim)
            step.preempted.append(victim)
            step.work = [(r, n) for r, n in step.work if r is not victim]
            if victim is request:
                return False
        return True


def worst_pages(writing: Sequence[Request], page_tokens: int, reading: Sequence[Request] = ()) -> int:
    """An upper bound of the pages that these requests hold at once when each writes to its limit.

    writing: those that get one token in every step from now on. Sorted by what is left, longest first: when request j (1-based)
    ends, those before it and itself have each written left_j more tokens, and those behind it have given their pages back.
    reading: those whose prompts are not through. When each begins to write depends on what else runs, so each is counted with
    all it may ever hold (n requests, R tokens). A request's last page is part empty:

        max over j >= 0 of  (R + sum_{i <= j} length_i + j left_j + (n + j) (page_tokens - 1)) / page_tokens

    Pages of a common prefix are counted once among those that adopted them: who ends gives back only what the rest lacks."""
    adopted: set[int] = set()
    held = 0
    for request in reading:
        held += request.worst - _adopted_before(request, adopted, page_tokens)
    count, slack = len(reading), page_tokens - 1
    worst = held + count * slack
    rows = [(r.remaining, r.length, r) for r in writing]
    rows.sort(key=itemgetter(0), reverse=True)
    for j, (left, length, request) in enumerate(rows, 1):
        held += length
        if request.cached:
            held -= _adopted_before(request, adopted, page_tokens)
        tokens = held + j * left + (count + j) * slack
        if tokens > worst:
            worst = tokens
    return worst // page_tokens


def _adopted_before(request: Request, adopted: set[int], page_tokens: int) -> int:
    """Tokens of the request on adopted pages that requests before it adopted too."""
    if not request.cached:
        return 0
    pages = request.pages[: request.cached // page_tokens]
    shared = sum(page in adopted for page in pages)
    adopted.update(pages)
    return shared * page_tokens
