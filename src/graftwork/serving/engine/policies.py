"""Orders of waiting requests, by name (`policy` of the server's config).

fcfs            first come, first served.
newest          the newest first; what it puts off may wait for ever under overload (S-LoRA's comparison, arXiv 2311.03285).
clustered       few adapters at a time: while adapters beyond `distinct` wait, requests of those in the cluster go first (S-LoRA);
                places in the cluster are held for `cycle` seconds and passed on in turn (LoRAX), so no adapter starves.
early_abort     requests whose first token would come after their deadline are given up, and under overload the newest go first
                (S-LoRA): r and b are moving averages (weight 0.7 on the newest) of arrivals and admissions between two
                admissions; r >= b serves the newest first.
fair            virtual token counters: the tenant that got least goes first; a prompt token counts 1, a written token 2, over
                the tenant's weight; a tenant that comes back is lifted to the least of those that wait (VTC, arXiv 2401.00588).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice

from ...errors import UsageError, nearest
from .request import Request
from .scheduler import Policy


class Newest(Policy):
    name = "newest"

    def order(self, waiting: Sequence[Request], running: Sequence[Request], now: float) -> Iterable[Request]:
        """Those put back for want of memory come first, as they have begun to answer; they stand at the head of the queue."""
        back = 0
        while back < len(waiting) and waiting[back].preempted:
            back += 1
        return chain(islice(waiting, back), islice(reversed(waiting), len(waiting) - back))


@dataclass
class Place:
    """An adapter's place in the cluster. since: when it got it. served: whether a request of it has been admitted since."""

    since: float
    served: bool = False


class Clustered(Policy):
    """Adapters that wait stand in line for the `distinct` places of the cluster. Whoever gets a place has its oldest request served
    first of all; after that the cluster's requests go by arrival, then all others by arrival. A place is given up when nobody
    asks for the adapter any more; or after `cycle` seconds if others stand in line and one request of it was admitted: the
    adapter goes to the end of the line if it has more. While nobody stands in line the order is that of arrival.

    So while anybody stands in line, the k-th oldest request of an adapter is admitted within k (p + 1) slices, when there are p
    other adapters; a slice is `cycle` seconds and the time that running requests need to make room for the first in order. While
    nobody stands in line it is never overtaken at all."""

    name = "clustered"

    def __init__(self, distinct: int = 8, cycle: float = 2.0):
        if distinct < 1 or cycle < 0:
            raise UsageError(f"a cluster of {distinct} adapters for {cycle} seconds", remedy="distinct: 1 or more, cycle: 0 or more")
        self.distinct, self.cycle = distinct, cycle
        self.places: dict[str | None, Place] = {}  # by the time they were taken
        self.line: dict[str | None, None] = {}

    def order(self, waiting: Sequence[Request], running: Sequence[Request], now: float) -> Iterable[Request]:
        oldest: dict[str | None, Request] = {}
        for request in waiting:
            oldest.setdefault(request.adapter, request)
        used = {request.adapter for request in running}
        self.places = {a: place for a, place in self.places.items() if a in oldest or a in used}
        self.line = {a: None for a in self.line if a in oldest}
        self.line.update((a, None) for a in oldest if a not in self.places)
        self._fill(now)
        if self.line:
            over = [a for a, place in self.places.items() if now - place.since >= self.cycle and (place.served or a not in oldest)]
            for adapter in over:
                del self.places[adapter]
                if adapter in oldest:
                    self.line[adapter] = None
            self._fill(now)
        if not self.line:
            return waiting
        first = [oldest[a] for a, place in self.places.items() if not place.served and a in oldest]
        chosen = set(map(id, first))
        inside = [r for r in waiting if r.adapter in self.places and id(r) not in chosen]
        return [*first, *inside, *(r for r in waiting if r.adapter not in self.places)]

    def admitted(self, request: Request) -> None:
        if request.adapter in self.places:
            self.places[request.adapter].served = True

    def _fill(self, now: float) -> None:
        while self.line and len(self.places) < self.distinct:
            adapter = next(iter(self.line))
            del self.line[adapter]
            self.places[adapter] = Place(now)


class EarlyAbort(Newest):
    name = "early_abort"

    def __init__(self, margin: float = 0.5):
        self.margin = margin  # seconds that a prompt takes from admission to its first token
        self.rate = self.batch = 0.0
        self.arrivals = self.admissions = 0

    def arrived(self, request: Request, waiting: Sequence[Request]) -> None:
        self.arrivals += 1

    def admitted(self, request: Request) -> None:
        self.admissions += 1

    def hopeless(self, waiting: Sequence[Request], now: float) -> list[Request]:
        return [request for request in waiting if request.deadline is not None and request.first_token is None
                and now - request.arrived + self.margin >= request.deadline]

    def order(self, waiting: Sequence[Request], running: Sequence[Request], now: float) -> Iterable[Request]:
        if self.admissions:
            self.rate = 0.7 * self.arrivals + 0.3 * self.rate
            self.batch = max(0.7 * self.admissions + 0.3 * self.batch, 1.0)
            self.arrivals = self.admissions = 0
        return super().order(waiting, running, now) if self.rate >= self.batch > 0 else waiting


class Fair(Policy):
    """While two tenants both wait, their counters differ by at most max(prompt x longest prompt, written x tokens that run at
    once), over the smaller weight. counters are per tenant that ever asked."""

    name = "fair"

    def __init__(self, weights: Mapping[str, float] | None = None, prompt: float = 1.0, written: float = 2.0):
        self.weights, self.prompt, self.written = dict(weights or {}), prompt, written
        if any(not weight > 0 for weight in self.weights.values()):
            raise UsageError("a tenant's weight is not above 0", remedy="give every tenant a weight above 0")
        self.counters: dict[str, float] = {}
        self.last: str | None = None  # whose request left the queue last

    def arrived(self, request: Request, waiting: Sequence[Request]) -> None:
        tenants = {other.tenant for other in waiting}
        if request.tenant in tenants:
            return
        if tenants:  # nobody saves up while away
            least = min(self.counters.get(tenant, 0.0) for tenant in tenants)
        else:
            least = self.counters.get(self.last, 0.0) if self.last is not None else 0.0
        self.counters[request.tenant] = max(self.counters.get(request.tenant, 0.0), least)

    def order(self, waiting: Sequence[Request], running: Sequence[Request], now: float) -> Iterable[Request]:
        queues: dict[str, deque[Request]] = {}
        for request in waiting:
            queues.setdefault(request.tenant, deque()).append(request)
        while queues:  # counters move as requests are admitted, so the next one is chosen only when it is asked for
            tenant = min(queues, key=lambda t: (self.counters.get(t, 0.0), t))
            yield queues[tenant].popleft()
            if not queues[tenant]:
                del queues[tenant]

    def admitted(self, request: Request) -> None:
        self.last = request.tenant
        if not request.preempted:
            self._charge(request.tenant, self.prompt * len(request.prompt))

    def wrote(self, request: Request, tokens: int) -> None:
        self._charge(request.tenant, self.written * tokens)

    def _charge(self, tenant: str, cost: float) -> None:
        self.counters[tenant] = self.counters.get(tenant, 0.0) + cost / self.weights.get(tenant, 1.0)


POLICIES: dict[str, type[Policy]] = {cls.name: cls for cls in (Policy, Newest, Clustered, EarlyAbort, Fair)}


def make_policy(name: str, **options) -> Policy:
    """A policy by name. Raises UsageError for one that is not known, or options that it does not have."""
    if name not in POLICIES:
        raise UsageError(f"there is no scheduling policy '{name}'{nearest(name, POLICIES)}", remedy=f"policies: {', '.join(POLICIES)}")
    try:
        return POLICIES[name](**options)
    except TypeError:
        raise UsageError(f"policy '{name}' has no such options: {', '.join(options)}", remedy="see the server's documentation") from None
