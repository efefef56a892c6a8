"""What the server does right now, for the page and for whoever asks GET /v1/status.

The engine's thread copies what can be copied quickly (`take`), between two steps and at most ten times a second, however many
ask; everything else is made of the copy (`show`), for the one who asks: adapters that a key may not use and requests of other
keys are in the numbers, without a name.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..engine.adapters import sum_of
from ..engine.request import Sum
from .adapters import Catalog
from .keys import Key
from .loop import EngineLoop

INTERVAL = 0.1  # seconds that a copy is good for
PATIENCE = 0.5  # seconds that who asks waits for a new one: a step may be long
LISTED = 200  # requests and adapters that are listed by name


@dataclass(frozen=True)
class Held:
    """A request. name: of its adapter as it was asked for, of a sum its parts; None for the base."""

    id: str
    name: str | None
    tenant: str
    pages: tuple[int, ...]
    running: bool
    prompt: int
    computed: int
    written: int
    limit: int


@dataclass(frozen=True)
class Loaded:
    """An adapter in the pool, or a sum of several. names: those that stand for its content now; none once it was replaced or unloaded.
    parts: of a sum, the weight and the names of each."""

    names: tuple[str, ...]
    start: int
    pages: int
    users: int
    parts: tuple[tuple[float, tuple[str, ...]], ...] = ()

    def seen_by(self, key: Key | None) -> list[str]:
        """The names that a key may see; a sum's only where it may see all parts."""
        if self.parts:
            parts = [(next(iter(_allowed(names, key)), None), weight) for weight, names in self.parts]
            return [] if any(name is None for name, _ in parts) else [_sum_name(parts)]
        return _allowed(self.names, key)


@dataclass(frozen=True)
class Snapshot:
    """All of one moment. users: of every page of the pool."""

    users: np.ndarray
    page_tokens: int
    page_bytes: int
    requests: tuple[Held, ...]
    adapters: tuple[Loaded, ...]
    loads: int
    evictions: int
    steps: int
    written: int
    per_second: float
    cached: int
    idle: int
    hits: int
    asked: int


def take(loop: EngineLoop, catalog: Catalog | None) -> Snapshot:
    """In the engine's thread."""
    engine = loop.engine
    memory, scheduler, pool = engine.memory, engine.scheduler, engine.pool
    sums = {digest: sum_of(digest) or () for digest in memory.residents}
    parts = [part for found in sums.values() for part, _ in found]
    names = {} if catalog is None else catalog.names_of([*memory.residents, *parts])
    prefixes = memory.prefixes
    return Snapshot(
        pool.users.copy(), pool.page_tokens, pool.page_bytes,
        tuple(Held(r.id, _asked_name(loop.asked_for(r)), r.tenant, tuple(r.pages), running, len(r.prompt), r.computed, len(r.output),
                   r.sampling.max_tokens)
              for running, group in ((True, scheduler.running), (False, scheduler.waiting)) for r in group),
        tuple(Loaded(tuple(names.get(r.digest, ())), r.start, r.pages, r.users,
                     tuple((weight, tuple(names.get(part, ()))) for part, weight in sums[r.digest])) for r in memory.residents.values()),
        memory.loads, memory.evictions, engine.steps, loop.written.total, loop.written.per_second(),
        *((0, 0, 0, 0) if prefixes is None else (len(prefixes.pages), prefixes.idle(), prefixes.hits, prefixes.asked)))


def _allowed(names: tuple[str, ...], key: Key | None) -> list[str]:
    return [name for name in names if key is None or key.may_use(name)]


def _sum_name(parts: Sum) -> str:
    return " + ".join(f"{weight:g} * {name}" for name, weight in parts)


def _asked_name(asked: str | Sum | None) -> str | None:
    return asked if asked is None or isinstance(asked, str) else _sum_name(asked)


class Watch:
    """The newest copy, shared by all who ask within INTERVAL seconds. Of the event loop."""

    def __init__(self, loop: EngineLoop, catalog: Catalog | None, clock: Callable[[], float] = time.monotonic):
        self.loop, self.catalog, self.clock = loop, catalog, clock
        self._last: tuple[float, Snapshot] | None = None
        self._taking: asyncio.Future[None] | None = None

    def begin(self) -> None:
        """The first copy, before the engine's thread runs: a server that reads its first adapter has something to show."""
        self._last = self.clock(), take(self.loop, self.catalog)

    async def snapshot(self) -> tuple[Snapshot, float]:
        """(the copy, its age in seconds). Raises Unavailable once the engine has failed or ended."""
        if self._last is None or self.clock() - self._last[0] >= INTERVAL or self.loop.failed is not None:
            if self._taking is None or self._taking.done():
                self._taking = asyncio.ensure_future(self._take())
                self._taking.add_done_callback(lambda done: done.cancelled() or done.exception())
            done, _ = await asyncio.wait({self._taking}, timeout=None if self._last is None else PATIENCE)
            for each in done:
                each.result()
        return self._last[1], max(0.0, self.clock() - self._last[0])

    async def _take(self) -> None:
        snapshot = await self.loop.call(lambda: take(self.loop, self.catalog))
        self._last = self.clock(), snapshot


def show(snapshot: Snapshot, age: float, base: str, key: Key | None) -> dict[str, Any]:
    """The answer for this key; see docs/serving.md. age: of the copy, in seconds. Any thread."""
    mine = [r for r in snapshot.requests if key is None or r.tenant == key.name]
    adapters = [loaded for loaded in snapshot.adapters if key is None or loaded.seen_by(key)]
    shown = adapters[-LISTED:][::-1]  # the most recently used first
    pages, used = len(snapshot.users), int(np.count_nonzero(snapshot.users))
    owners, lengths = _owners(snapshot, base, mine, key)
    return {
        "object": "graftwork.status", "model": base, "age": round(age, 2), "steps": snapshot.steps,
        "running": sum(r.running for r in snapshot.requests), "waiting": sum(not r.running for r in snapshot.requests),
        "tokens": {"written": snapshot.written, "per_second": round(snapshot.per_second, 2)},
        "pool": {"pages": pages, "used": used, "free": pages - used, "page_tokens": snapshot.page_tokens,
                 "page_bytes": snapshot.page_bytes, "owners": owners, "map": lengths},
        "adapters": {"resident": len(snapshot.adapters), "bytes": sum(a.pages for a in snapshot.adapters) * snapshot.page_bytes,
                     "loads": snapshot.loads, "evictions": snapshot.evictions,
                     "list": [{"names": a.seen_by(key), "bytes": a.pages * snapshot.page_bytes, "pages": a.pages, "users": a.users}
                              for a in shown]},
        "prefixes": {"pages": snapshot.cached, "idle": snapshot.idle, "hit_tokens": snapshot.hits, "asked_tokens": snapshot.asked},
        "requests": [{"id": r.id, "model": base if r.name is None else r.name, "state": "running" if r.running else "waiting",
                      "prompt_tokens": r.prompt, "computed_tokens": r.computed, "completion_tokens": r.written, "max_tokens": r.limit}
                     for r in mine[:LISTED]]}


def _owners(snapshot: Snapshot, base: str, mine: list[Held], key: Key | None) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """(who has pages and how many, [[number of the owner, so many neighbouring pages], ...] from the pool's first page to its last)."""
    owners: list[dict[str, Any]] = [{"kind": kind} for kind in ("free", "prefix", "shared", "other")]
    free, prefix, shared, other = range(4)
    # what neither an adapter nor a running request has is kept for the next prompt that begins like it
    codes = np.where(snapshot.users > 0, prefix, free)
    own = {r.id for r in mine}
    for request in snapshot.requests:
        if request.id not in own:
            codes[list(request.pages)] = other
    for loaded in snapshot.adapters:
        code, names = other, loaded.seen_by(key)
        if names or key is None:
            code = len(owners)
            owners.append({"kind": "adapter", "names": names})
        codes[loaded.start: loaded.start + loaded.pages] = code
    count = np.zeros(len(codes), dtype=np.int32)
    for request in mine:
        if request.pages:
            at = list(request.pages)
            codes[at] = len(owners)
            count[at] += 1
            owners.append({"kind": "request", "id": request.id, "model": base if request.name is None else request.name})
    codes[count > 1] = shared
    for owner, had in zip(owners, np.bincount(codes, minlength=len(owners)).tolist()):
        owner["pages"] = had
    starts = np.concatenate([[0], np.flatnonzero(np.diff(codes)) + 1])
    lengths = np.diff(np.concatenate([starts, [len(codes)]]))
    return owners, np.stack([codes[starts], lengths], axis=1).tolist()
