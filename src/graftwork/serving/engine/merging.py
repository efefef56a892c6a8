"""When to serve one adapter alone from merged weights, and when everybody from the base (dLoRA, OSDI 2024).

A merged step costs what the bare base costs, but leaves all other requests out. Before each step the rule looks at the requests
that run or wait, the first m in order of arrival (m: as many as may run at once), and counts them by adapter, by its content:

    merged on a, and a has at least left * n of these n      stay merged on a
    the adapter that has most has at least right * n         merge that one
    else                                                     everybody runs, each row with its own adapter

right starts at 1; left starts at t_merged / t_unmerged, seconds of steps of equal size as they were measured (before that: at 1).
Whenever the mode changes, the period that ends is judged by the requests it moved on in a second, its switch included, against
what the other mode would have done for the requests that were there: if it won, its threshold moves by 0.05 in its favor (right
down, left up), if it lost, by 1.1 the other way. Both stay in [0.1, 1], and left is never above right.

Nobody starves: each merged step gives every adapter that it passes over 1 / ratio credits (ratio = t_merged / t_unmerged). At
`patience` credits an adapter is owed: nothing else is merged until it has fallen below half of that, by one a step. So a request
that is among the first m is through after `latest(steps)` steps, when it needs `steps` that it is part of.

Differs from dLoRA: nothing is timed beforehand; credits belong to adapters with a request among the first m and are counted in
steps (theirs: 1/m a step and 10,000 to be owed); whoever is owed runs beside everybody else and not alone; an adapter is merged
only if those that are left out keep the memory they were promised, and no request is let in past one that is left out.

Nothing here knows the time, a tensor or a model: the engine and the simulator measure, and run this same code.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from itertools import chain
from operator import attrgetter

from ...errors import GraftworkError, UsageError
from .scheduler import Scheduler, Step

LEAST = 0.1  # of a threshold
ENOUGH = 3  # steps of a mode before its pace is used
KEEP = 0.98  # weight of what was measured before, at each new step
REFUSED = 1024  # adapters that could not be merged and are remembered


class Pace:
    """Seconds of a step as a line over its tokens, by least squares that forget."""

    def __init__(self) -> None:
        self.steps = 0
        self.weight = self.n = self.s = self.nn = self.ns = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        self.steps += 1
        new = (1.0, tokens, seconds, tokens * tokens, tokens * seconds)
        kept = (self.weight, self.n, self.s, self.nn, self.ns)
        self.weight, self.n, self.s, self.nn, self.ns = (KEEP * old + value for old, value in zip(kept, new))

    @property
    def known(self) -> bool:
        return self.steps >= ENOUGH and self.s > 0

    def seconds(self, tokens: float) -> float:
        """Of a step with this many tokens: never falling with them, and above 0 without any."""
        n, s = self.n / self.weight, self.s / self.weight
        spread = self.nn / self.weight - n * n
        slope = (self.ns / self.weight - n * s) / spread if spread > 1e-9 * n * n else 0.0
        return s + min(max(slope, 0.0), 0.99 * s / n) * (tokens - n)


@dataclass
class Period:
    """Steps in one mode: requests that they moved on and seconds, and what the other mode would have done."""

    turns: float = 0.0
    seconds: float = 0.0
    other_turns: float = 0.0
    other_seconds: float = 0.0


class Merging:
    """The rule and what it has learned. patience: credits at which an adapter is owed. add, cut: how thresholds move.

    merged: content of the adapter that was merged in the last step, None if nothing was. refused: content -> why it cannot be."""

    def __init__(self, *, patience: float = 64.0, add: float = 0.05, cut: float = 1.1):
        if not patience >= 1 or not add > 0 or not cut > 1:
            raise UsageError(f"merging with patience {patience}, add {add}, cut {cut}",
                             remedy="patience: 1 or more; add above 0, cut above 1")
        self.patience, self.add, self.cut = patience, add, cut
        self.right, self.left = 1.0, 1.0
        self.merged: str | None = None
        self.credits: dict[str, float] = {}
        self.owed: set[str] = set()
        self.refused: OrderedDict[str, str] = OrderedDict()
        self.paces = {False: Pace(), True: Pace()}
        self.period = Period()
        self.steps = self.switches = 0  # merged steps; changes of `merged`
        self._measured = False  # whether `left` has started

    # -- the decision -----------------------------------------------------------------------------------------------------------------
    def step(self, scheduler: Scheduler) -> Step:
        """The next step; `Step.merged` is the content of the adapter that it is to run merged."""
        most = min(scheduler.limits.max_running, scheduler.limits.max_tokens)
        first = nsmallest(most, chain(scheduler.running, scheduler.waiting), key=attrgetter("arrived"))
        names: dict[object, str] = {}
        chosen = self.choose([_content(scheduler, request, names) for request in first], scheduler.may_leave_out)
        step = scheduler.step(chosen)
        if chosen is not None and not step.work:  # its requests do not fit beside those that are left out
            more = scheduler.step()
            for lists in ("aborted", "failed", "preempted", "absent"):
                getattr(more, lists)[:0] = getattr(step, lists)
            return more
        step.merged = chosen
        return step

    def choose(self, queue: Sequence[str], able: Callable[[str], bool]) -> str | None:
        """What to merge for the next step. queue: contents of the first requests' adapters, "" for the bare base. able(content): whether
        the others may be left out."""
        counts = Counter(queue)
        self.credits = {content: credit for content, credit in self.credits.items() if content in counts}
        self.owed = {content for content, credit in self.credits.items()
                     if credit >= (self.patience / 2 if content in self.owed else self.patience)}
        wanted = self._wanted(counts, len(queue), able)
        if wanted is None:
            return None
        if self.owed - {wanted}:
            for content in self.owed:
                self.credits[content] = max(self.credits[content] - 1, 0.0)
            return None
        for content in counts:
            if content != wanted:
                self.credits[content] = self.credits.get(content, 0.0) + 1 / self.ratio
            elif content in self.credits:
                self.credits[content] = max(self.credits[content] - 1, 0.0)
        return wanted

    def _wanted(self, counts: Counter[str], total: int, able: Callable[[str], bool]) -> str | None:
        if self.merged is not None and counts[self.merged] and counts[self.merged] >= self.left * total and able(self.merged):
            return self.merged
        for content, count in counts.most_common():
            if count < self.right * total:
                return None
            if content and content not in self.refused and able(content):
                return content
        return None

    def latest(self, steps: int) -> float:
        """After how many steps a request that is among the first has taken part in `steps` of them."""
        return 2 * steps + self.patience + 1

    # -- what was measured ----------------------------------------------------------------------------------------------------------------
    @property
    def ratio(self) -> float:
        """Seconds of a merged step over those of an unmerged one of the same size, at most 1; 1 until both were measured."""
        merged, unmerged = self.paces[True], self.paces[False]
        if not (merged.known and unmerged.known):
            return 1.0
        tokens = merged.n / merged.weight
        return min(max(merged.seconds(tokens) / unmerged.seconds(tokens), LEAST), 1.0)

    def ran(self, step: Step, running: int, seconds: float, switch: float = 0.0) -> None:
        """A step was computed. running: requests that hold memory, with those that were left out. seconds: of the step; switch: of
        merging before it. `step.merged` says what it really was."""
        merged, turns, tokens = step.merged is not None, len(step.work), step.tokens
        if step.merged != self.merged:
            self._judge()
            self.merged, self.period = step.merged, Period()
            self.switches += 1
        self.steps += merged
        self.paces[merged].add(tokens, seconds)
        if not self._measured and self.paces[True].known and self.paces[False].known:
            self.left, self._measured = min(self.ratio, self.right), True
        self.period.turns += turns
        self.period.seconds += seconds + switch
        other = self.paces[not merged]
        if other.known:
            adapters = Counter(request.resident.digest for request, _ in step.work if request.resident is not None)
            there = running if merged else max(adapters.values(), default=0)
            self.period.other_turns += there
            self.period.other_seconds += other.seconds(tokens * there / turns) if there else 0.0

    def refuse(self, content: str, reason: str) -> None:
        """This adapter cannot be merged; it is served as any other."""
        self.refused[content] = reason
        if len(self.refused) > REFUSED:
            self.refused.popitem(last=False)

    def _judge(self) -> None:
        period = self.period
        if not self._measured or not period.other_seconds or not period.seconds:
            return
        won = period.turns * period.other_seconds >= period.other_turns * period.seconds
        if self.merged is not None:
            self.right = self.right - self.add if won else self.right * self.cut
        else:
            self.left = self.left + self.add if won else self.left / self.cut
        self.right = min(max(self.right, LEAST), 1.0)
        self.left = min(max(self.left, LEAST), self.right)


def _content(scheduler: Scheduler, request, names: dict[object, str]) -> str:
    """Looked up once a step and name; an adapter that is gone counts as none, and fails when its turn comes."""
    if request.resident is not None:
        return request.resident.digest
    key = request.digest if request.output and request.digest is not None else request.adapter
    if key not in names:
        try:
            names[key] = scheduler.memory.content(request)
        except (GraftworkError, OSError):
            names[key] = ""
    return names[key]

