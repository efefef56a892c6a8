"""Orders of waiting requests, by name (`policy` of the server's config).

fcfs            first come, first served.
clustered       once `distinct` adapters run, requests of adapters that run already go first (S-LoRA, arXiv 2311.03285).
early_abort     requests whose first token would come after their deadline are given up, and under overload the newest go first
                (S-LoRA): r and b are moving averages (weight 0.7 on the newest) of arrivals and admissions between two
                admissions; r >= b serves the newest first.
fair            virtual token counters: the tenant that got least goes first; a prompt token counts 1, a written token 2, over
                the tenant's weight; a tenant that comes back is lifted to the least of the active ones (VTC, arXiv 2401.00588).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ...errors import UsageError, nearest
from .request import Request
from .scheduler import Policy


class Clustered(Policy):
    name = "clustered"

    def __init__(self, distinct: int = 8):
        self.distinct = distinct

    def order(self, waiting: Sequence[Request], running: Sequence[Request], now: float) -> Iterable[Request]:
        here = {request.adapter for request in running}
        for request in waiting:  # what was let in before counts, so the first ones may open the cluster
            if len(here) >= self.distinct:
                break
            here.add(request.adapter)
        return sorted(waiting, key=lambda request: request.adapter not in here)  # stable: else by arrival


class EarlyAbort(Policy):
    name = "early_abort"

    def __init__(self, margin: float = 0.5):
        self.margin = margin  # seconds that a prompt takes from admission to its first token
        self.rate = self.batch = 0.0
        self.arrivals = self.admissions = 0

    def arrived(self, request: Request, active: Iterable[Request]) -> None:
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
        return reversed(waiting) if self.rate >= self.batch > 0 else waiting


class Fair(Policy):
    name = "fair"

    def __init__(self, weights: Mapping[str, float] | None = None, prompt: float = 1.0, written: float = 2.0):
        self.weights, self.prompt, self.written = dict(weights or {}), prompt, written
        self.counters: dict[str, float] = {}

    def arrived(self, request: Request, active: Iterable[Request]) -> None:
        tenants = {other.tenant for other in active}
        if request.tenant not in tenants:  # nobody saves up while idle
            least = min((self.counters.get(t, 0.0) for t in tenants), default=0.0)
            self.counters[request.tenant] = max(self.counters.get(request.tenant, 0.0), least)

    def order(self, waiting: Sequence[Request], running: Sequence[Request], now: float) -> Iterable[Request]:
        queues: dict[str, list[Request]] = {}
        for request in waiting:
            queues.setdefault(request.tenant, []).append(request)
        while queues:  # counters move as requests are admitted, so the next one is chosen only when it is asked for
            tenant = min(queues, key=lambda t: (self.counters.get(t, 0.0), t))
            yield queues[tenant].pop(0)
            if not queues[tenant]:
                del queues[tenant]

    def admitted(self, request: Request) -> None:
        if not request.preempted:
            self._charge(request.tenant, self.prompt * len(request.prompt))

    def wrote(self, request: Request, tokens: int) -> None:
        self._charge(request.tenant, self.written * tokens)

    def _charge(self, tenant: str, cost: float) -> None:
        self.counters[tenant] = self.counters.get(tenant, 0.0) + cost / self.weights.get(tenant, 1.0)


POLICIES: dict[str, type[Policy]] = {cls.name: cls for cls in (Policy, Clustered, EarlyAbort, Fair)}


def make_policy(name: str, **options) -> Policy:
    """A policy by name. Raises UsageError for one that is not known, or options that it does not have."""
    if name not in POLICIES:
        raise UsageError(f"there is no scheduling policy '{name}'{nearest(name, POLICIES)}", remedy=f"policies: {', '.join(POLICIES)}")
    try:
        return POLICIES[name](**options)
    except TypeError:
        raise UsageError(f"policy '{name}' has no such options: {', '.join(options)}", remedy="see the server's documentation") from None
