"""Plans made in processes of their own, ahead of the search that will ask for them: simulating a step keeps one core busy.

A search says which plans it will probably ask for next (`expect`) and then asks as if they were made on the spot; one that was not
expected is. Workers are spawned, so they import everything anew (some seconds, while the search still screens), and each holds the end of a
pipe: they leave when the search closes it or its process dies, whatever they are at.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any

Planner = Callable[[dict[str, Any], str], dict[str, Any]]


class Ahead:
    """`planner` (a function of a module) with up to `jobs` processes of its own; with one job nothing is made ahead. A context
    manager: at its end the workers leave."""

    def __init__(self, planner: Planner, jobs: int = 1):
        self.planner, self.jobs = planner, jobs
        self._expected: dict[str, Future] = {}
        self._pool = self._alive = None
        if jobs > 1:
            held, self._alive = multiprocessing.Pipe(duplex=False)
            self._pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _begin, (held,))
            for _ in range(jobs):
                self._pool.submit(_import)

    def expect(self, document: dict[str, Any], device: str) -> None:
        """Begin this plan, if a process is there for it."""
        if self._pool is not None and (key := _key(document, device)) not in self._expected:
            try:
                self._expected[key] = self._pool.submit(self.planner, document, device)
            except BrokenProcessPool:
                self._pool = None

    def __call__(self, document: dict[str, Any], device: str) -> dict[str, Any]:
        """The plan; raises what the planner raises."""
        future = self._expected.get(_key(document, device))
        if future is not None and self._pool is not None:
            try:
                return future.result()
            except BrokenProcessPool:  # a worker was killed, for want of memory perhaps: go on alone
                self._pool = None
        return self.planner(document, device)

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._alive is not None:
            self._alive.close()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _key(document: dict[str, Any], device: str) -> str:
    return json.dumps([document, device], sort_keys=True)


def _begin(held: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the search decides what an interrupt means

    def leave() -> None:
        try:
            held.recv_bytes()
        except (EOFError, OSError):
            os._exit(0)

    threading.Thread(target=leave, daemon=True).start()


def _import() -> None:
    """What a plan needs, before there is one."""
    import transformers.masking_utils  # noqa: F401

    from . import search  # noqa: F401


__all__ = ["Ahead", "cores"]
