"""Adapters on their way into host memory, so that the engine's thread never waits for a disk or a URL.

A request joins the engine's queue once its adapter is in host memory, and holds it there until it has run; requests behind it go
on. Reads begin in the order in which they were asked for, a few at a time, and wait while more is held than host memory may have:
what is held then runs first. One read serves all that want the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue

from .adapters import Catalog
from .targets import Target

THREADS = 4
#: then(digest, None) or then(None, error), in the engine's thread
Then = Callable[[str | None, BaseException | None], None]


class Workers:
    """Threads that are begun when there is work, and that no exit waits for: a URL may never answer."""

    def __init__(self, count: int, name: str):
        self.count, self.name = count, name
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    def submit(self, task: Callable[[], None]) -> None:
        """task() must raise nothing."""
        self._tasks.put(task)
        if len(self._threads) < self.count:
            self._threads.append(threading.Thread(target=self._main, name=f"{self.name}-{len(self._threads)}", daemon=True))
            self._threads[-1].start()

    def stop(self) -> None:
        """They end with what they have begun."""
        for _ in self._threads:
            self._tasks.put(None)

    def _main(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()


@dataclass
class Job:
    """A read: what (a target, or the digest of a content that was read before), and who wants it: key -> what to call."""

    what: Target | str
    wanted: dict[str, Then] = field(default_factory=dict)
    begun: bool = False


class ReadAhead:
    """post(function): runs it in the engine's thread, as everything here but the reads themselves."""

    def __init__(self, catalog: Catalog, post: Callable[[Callable[[], None]], None], threads: int = THREADS):
        self.catalog, self.post, self.threads = catalog, post, threads
        self.workers = Workers(threads, "graftwork-reader")
        self.jobs: dict[Target | str, Job] = {}  # in the order in which they were asked for
        self.held: dict[str, list[str]] = {}  # key -> digests that are kept in host memory for it
        self.active = 0

    def want(self, what: Target | str, key: str, then: Then) -> None:
        """Have an adapter in host memory, held under this key until `release`. What is there already is there at once."""
        digest = self.catalog.known(what) if isinstance(what, Target) else what
        if digest is not None and self.catalog.hosts.hold(digest):
            self._hold(key, digest)
            then(digest, None)
            return
        self.jobs.setdefault(what, Job(what)).wanted[key] = then
        self._begin()

    def want_all(self, whats: Sequence[Target | str], key: str, then: Callable[[list[str], BaseException | None], None]) -> None:
        """Have several: then(their digests in this order, None) when all are there, or then([], error) when the first one fails."""
        found: dict[Target | str, str] = {}
        missing = set(whats)

        def one(what: Target | str, digest: str | None, error: BaseException | None) -> None:
            if not missing:
                return
            if error is not None:
                missing.clear()
                self.cancel(key)
                then([], error)
                return
            found[what] = digest
            missing.discard(what)
            if not missing:
                then([found[each] for each in whats], None)

        for what in dict.fromkeys(whats):
            self.want(what, key, partial(one, what))

    def cancel(self, key: str) -> bool:
        """Nobody waits for anything any more under this key; False when nobody did."""
        found = False
        for what, job in list(self.jobs.items()):
            if job.wanted.pop(key, None) is not None:
                found = True
                if not job.wanted and not job.begun:
                    del self.jobs[what]
        return found

    def release(self, key: str) -> None:
        digests = self.held.pop(key, ())
        for digest in digests:
            self.catalog.hosts.let_go(digest)
        if digests:
            self._begin()

    @property
    def waiting(self) -> int:
        return sum(len(job.wanted) for job in self.jobs.values())

    def stop(self) -> None:
        self.workers.stop()

    def _hold(self, key: str, digest: str) -> None:
        self.held.setdefault(key, []).append(digest)

    def _begin(self) -> None:
        hosts = self.catalog.hosts
        for job in self.jobs.values():
            if self.active >= self.threads:
                return
            # who holds something already and wants more cannot run, and so gives nothing back, before the rest is there
            full = hosts.held >= hosts.limit and self.held and not job.wanted.keys() & self.held.keys()
            if not job.begun and not full:
                job.begun = True
                self.active += 1
                self.workers.submit(lambda job=job: self._read(job))

    def _read(self, job: Job) -> None:
        """In a thread of its own."""
        digest, problem = None, None
        try:
            read = self.catalog.reopen if isinstance(job.what, str) else self.catalog.open
            digest = read(job.what, hold=True)
        except BaseException as error:
            problem = error
        self.post(lambda: self._done(job, digest, problem))

    def _done(self, job: Job, digest: str | None, problem: BaseException | None) -> None:
        self.active -= 1
        del self.jobs[job.what]
        if digest is not None:
            for key in job.wanted:
                self.catalog.hosts.hold(digest)
                self._hold(key, digest)
            self.catalog.hosts.let_go(digest)
        for then in job.wanted.values():
            then(digest, problem)
        self._begin()
