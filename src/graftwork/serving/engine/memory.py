"""The pool as the scheduler sees it: pages of requests, of cached prefixes and of adapters, and who has to give way.

When pages are asked for and none are free, cached prefixes that nobody reads go first, then adapters that no request runs on,
each least recently used first. What a running request holds is never taken here; that is the scheduler's decision.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ...errors import GraftworkError
from .pool import Packing, Pool
from .prefixes import Prefixes
from .request import Request

PACKINGS = 256  # ways to lie in the pool that are kept


@dataclass
class Resident:
    """An adapter whose tensors lie in the pool. digest: of its content. route: the name that rows are routed to. unload: called
    before its pages are given up. users: running requests."""

    digest: str
    route: str
    start: int
    pages: int
    unload: Callable[[], None]
    users: int = 0


class Source(Protocol):
    """Where adapters come from (see adapters.py). Names change their meaning when an adapter is replaced, digests never do."""

    def digest(self, name: str) -> str:
        """Of the content that the name stands for now."""

    def sizes(self, digest: str) -> Sequence[int]:
        """Bytes of each of its tensors."""

    def virtual(self, digest: str, prompt: Sequence[int]) -> tuple[int, ...]:
        """A number below zero for each virtual token that it puts before this prompt; equal ones stand for equal vectors."""

    def load(self, digest: str, place: Callable[[int, Sequence[int], torch.dtype], torch.Tensor]) -> tuple[str, Callable[[], None]]:
        """Attach it with its i-th tensor in place(i, shape, dtype): (the name to route rows to, what detaches it). Raises
        GraftworkError for one that is broken."""


class Memory:
    """Pages for whoever asks; see the module."""

    def __init__(self, pool: Pool, source: Source, *, prefix_cache: bool = True):
        self.pool, self.source = pool, source
        self.prefixes = Prefixes(pool) if prefix_cache else None
        self.residents: OrderedDict[str, Resident] = OrderedDict()  # by digest, least recently used first
        self.running: dict[str, Request] = {}
        self.keys: dict[str, list[bytes]] = {}  # request -> keys of its full pages
        self.page_tokens = pool.page_tokens
        self.loads = self.evictions = self.ahead = 0  # ahead: of the loads, those before a request was admitted
        self.there: Callable[[str], bool] | None = None  # says what is in host memory; None: reading is for `load` to do
        self._broken: set[str] = set()  # could not be loaded ahead; whoever runs on them is told why
        self.resident_pages = self.busy_pages = 0  # of adapters in the pool; of those, that requests run on
        self._packings: OrderedDict[tuple[int, ...], Packing] = OrderedDict()  # by sizes, least recently used first

    # -- what the scheduler asks ----------------------------------------------------------------------------------------------
    def available(self) -> int:
        return self.pool.free + (self.prefixes.idle() if self.prefixes else 0) + self.resident_pages - self.busy_pages

    def capacity(self) -> int:
        return self.pool.pages - self.busy_pages

    def content(self, request: Request) -> str:
        """The digest of the request's adapter: what its name stands for now, or stood for when its answer began."""
        if request.resident is not None:
            return request.resident.digest
        if request.adapter is None:
            return ""
        return request.digest if request.output and request.digest is not None else self.source.digest(request.adapter)

    def adapter_pages(self, request: Request) -> int:
        if request.adapter is None:
            return 0
        digest = self.content(request)
        resident = self.residents.get(digest)
        if resident is not None:
            return 0 if resident.users else resident.pages  # idle pages count as available until somebody runs on them
        return self.packing(digest).pages

    def absent(self, request: Request) -> bool:
        if request.adapter is None or self.there is None:
            return False
        digest = self.content(request)
        return digest not in self.residents and not self.there(digest)

    def prepare(self, request: Request) -> bool:
        """Make the request's adapter resident and give it the pages of its prompt that are known. Raises GraftworkError for an
        adapter that cannot be loaded."""
        request.resident = None
        if request.adapter is not None:
            digest = self.content(request)
            request.resident = self.resident(digest)
            if request.resident is None:
                return False
            request.digest = digest
            self.busy_pages += 0 if request.resident.users else request.resident.pages
            request.resident.users += 1
            request.virtual = self.source.virtual(request.resident.digest, request.prompt)
        self.running[request.id], self.keys[request.id] = request, []
        request.pages, request.computed, request.cached = [], 0, 0
        if self.prefixes is not None:
            request.pages = self.prefixes.adopt(_digest(request), request.tokens)
            request.computed = request.cached = len(request.pages) * self.page_tokens
        return True

    def reserve(self, request: Request, tokens: int) -> bool:
        if request.computed + tokens <= len(request.pages) * self.page_tokens:
            return True
        missing = self.pool.pages_for(request.computed + tokens) - len(request.pages)
        if missing > self.pool.free and not self.give_way(missing - self.pool.free):
            return False
        pages = self.pool.take(missing, request.id, request.pages[-1] if request.pages else None)
        assert pages is not None
        request.pages += pages
        return True

    def release(self, request: Request) -> None:
        if self.running.pop(request.id, None) is None:
            return
        self.pool.give(request.pages)
        request.pages = []
        del self.keys[request.id]
        if request.resident is not None:
            request.resident.users -= 1
            self.busy_pages -= 0 if request.resident.users else request.resident.pages
            request.resident = None

    # -- what the engine tells ----------------------------------------------------------------------------------------------------
    def computed(self, request: Request) -> None:
        """More of a request's tokens have keys and values: its full pages may be shared."""
        if self.prefixes is None or request.id not in self.running:
            return
        known, full = self.keys[request.id], request.computed // self.page_tokens
        if full > len(known):
            keys = self.prefixes.keys(_digest(request), request.tokens[: full * self.page_tokens], known)
            self.prefixes.publish(keys, request.pages[:full])
            self.keys[request.id] = keys

    # -- adapters -----------------------------------------------------------------------------------------------------------------
    def packing(self, digest: str) -> Packing:
        """How the adapter lies in the pool. Kept: a request that waits asks for it in every step, and adapters look alike."""
        sizes = tuple(self.source.sizes(digest))
        found = self._packings.get(sizes)
        if found is None:
            found = self._packings[sizes] = self.pool.pack(sizes)
            if len(self._packings) > PACKINGS:
                self._packings.popitem(last=False)
        self._packings.move_to_end(sizes)
        return found

    def resident(self, digest: str) -> Resident | None:
        """The adapter in the pool, loaded if it is not there; None when no room can be made now."""
        found = self.residents.get(digest)
        if found is None:
            packing = self.packing(digest)
            start = self._run(packing.pages, digest)
            if start is None:
                return None
            found = self._load(digest, packing, start)
        self.residents.move_to_end(digest)
        return found

    def load_ahead(self, request: Request) -> bool:
        """Copy the adapter of a request that waits into pages that are free and not about to be written: nothing is moved or gives
        way. Whether it was. A broken one is left to its request."""
        if request.adapter is None or self.absent(request):
            return False
        digest = self.content(request)
        if digest in self.residents or digest in self._broken:
            return False
        try:
            packing = self.packing(digest)
            start = None if packing.pages + len(self.running) > self.pool.free else self.pool.take_run(packing.pages, digest)
            if start is None:
                return False
            self._load(digest, packing, start)
        except GraftworkError:
            self._broken.add(digest)
            return False
        self.ahead += 1
        return True

    def _load(self, digest: str, packing: Packing, start: int) -> Resident:
        """Load an adapter into the run of pages that was taken for it."""

        def place(i: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
            return self.pool.piece(start, packing.places[i], shape, dtype)

        self._broken.discard(digest)
        try:
            route, unload = self.source.load(digest, place)
        except BaseException:
            self.pool.give(range(start, start + packing.pages))
            raise
        self.loads += 1
        self.resident_pages += packing.pages
        found = self.residents[digest] = Resident(digest, route, start, packing.pages, unload)
        return found

    def drop(self, digest: str) -> None:
        """Take an adapter that nobody runs on out of the pool."""
        resident = self.residents[digest]
        assert not resident.users, f"adapter {digest} is in use"
        del self.residents[digest]
        resident.unload()
        self.pool.give(range(resident.start, resident.start + resident.pages))
        self.resident_pages -= resident.pages
        self.evictions += 1

    def clear(self) -> None:
        """Give up everything that no request uses."""
        if self.prefixes is not None:
            self.prefixes.clear()
        for digest in [digest for digest, resident in self.residents.items() if not resident.users]:
            self.drop(digest)

    def give_way(self, pages: int) -> bool:
        """Free this many pages of what can be had again."""
        given = self.prefixes.evict(pages) if self.prefixes else 0
        for digest in [digest for digest, r in self.residents.items() if not r.users]:
            if given >= pages:
                break
            given += self.residents[digest].pages
            self.drop(digest)
        return given >= pages

    def _run(self, pages: int, owner: str) -> int | None:
        while True:
            start = self.pool.make_run(pages, owner, self._moved)
            if start is not None:
                return start
            before = self.pool.free
            self.give_way(max(pages - before, 1))
            if self.pool.free == before:
                return None

    def _moved(self, where: dict[int, int]) -> None:
        for request in self.running.values():
            request.pages = [where.get(page, page) for page in request.pages]
        if self.prefixes is not None:
            self.prefixes.moved(where)

    # -- invariants ---------------------------------------------------------------------------------------------------------------
    def check(self) -> None:
        """Every page has exactly the users that the books name. For tests; raises AssertionError."""
        users = [0] * self.pool.pages
        for request in self.running.values():
            for page in request.pages:
                users[page] += 1
        for page in self.prefixes.pages.values() if self.prefixes else ():
            users[page] += 1
        for resident in self.residents.values():
            for page in range(resident.start, resident.start + resident.pages):
                users[page] += 1
        assert users == self.pool.users.tolist(), "the books and the pool differ"
        assert self.pool.free == users.count(0) and self.pool.free + self.pool.used == self.pool.pages
        fixed = sorted(page for r in self.residents.values() for page in range(r.start, r.start + r.pages))
        assert fixed == self.pool.fixed.nonzero()[0].tolist(), "pages of adapters and pages that cannot be moved differ"
        assert self.resident_pages == len(fixed)
        assert self.busy_pages == sum(r.pages for r in self.residents.values() if r.users)
        running = [request.resident for request in self.running.values()]
        assert all(r.users == sum(other is r for other in running) for r in self.residents.values())
        if self.prefixes is not None:
            assert sorted(self.prefixes.pages.values()) == self.prefixes.known.nonzero()[0].tolist()


def _digest(request: Request) -> str:
    return "" if request.resident is None else request.resident.digest
