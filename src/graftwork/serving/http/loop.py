"""The engine in a thread of its own, and its answers as asynchronous streams.

Everything that touches the engine runs in its thread: requests that come and go, and functions (`call`) between two steps. Adapters
are read in others (readahead.py): a request joins the engine's queue when its adapter is in host memory.
What a step wrote goes to the event loop in one message. An error in a step ends all requests with that error and the engine
with it: a server that may compute nonsense answers nothing, and says so (`failed`).
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ...adapters.slot import parts_of
from ...errors import GraftworkError
from ..engine import Engine, Request
from ..engine.request import TokenLogprob
from .adapters import Catalog
from .errors import Unavailable
from .rate import Rate
from .readahead import ReadAhead
from .targets import PINNED, Target

T = TypeVar("T")
log = logging.getLogger("graftwork.serve")


@dataclass(frozen=True)
class Piece:
    """News of one request: text that may be shown, the tokens and their logprobs, and at its end why it ended."""

    text: str
    tokens: Sequence[int] = ()
    logprobs: Sequence[TokenLogprob] = ()
    finish_reason: str | None = None
    error: BaseException | None = None


class Stream:
    """What comes of the requests of one call, in the order in which it is written. names: of their adapters, as they were asked."""

    def __init__(self, loop: EngineLoop, requests: Sequence[Request]):
        self.requests, self.names = list(requests), [request.adapter for request in requests]
        self._loop = loop
        self._queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._open = set(range(len(self.requests)))  # of the event loop
        self._told = [0] * len(self.requests)  # of the engine's thread

    async def next(self) -> tuple[int, Piece]:
        """(number of the request, its news)."""
        return await self._queue.get()

    def cancel(self) -> None:
        """End what has not ended."""
        for i in self._open:
            self._loop.cancel(self.requests[i])


class EngineLoop:
    """engine: belongs to the loop from now on; `stop` closes it. catalog: the engine's adapters; a request is tied to the content that
    its name stands for when it comes. on_end(request, name): called in the event loop when a request has ended, however it did."""

    def __init__(self, engine: Engine, *, catalog: Catalog | None = None, on_end: Callable[[Request, str | None], None] | None = None):
        self.engine, self.catalog, self.on_end = engine, catalog, on_end
        self.written = Rate(engine.clock)  # tokens; of the engine's thread
        self.reader = None if catalog is None else ReadAhead(catalog, self._later)
        if catalog is not None:
            engine.memory.there, engine.absent = catalog.there, self._absent
        self.failed: BaseException | None = None
        self.draining = False
        self.open = 0  # requests that have not ended; of the event loop
        self._adding = 0
        self._lock = threading.Condition()
        self._inbox: deque[tuple[Callable[[], None], Callable[[BaseException], None]]] = deque()
        self._outbox: list[tuple[Stream, int, Piece]] = []
        self._live: dict[str, tuple[Stream, int]] = {}
        self._reading: set[str] = set()  # of those, requests that are not in the engine yet
        self._stopping = self._ended = False
        self._aio: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    # -- of the event loop --------------------------------------------------------------------------------------------------------
    def start(self) -> None:
        self._aio = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._main, name="graftwork-engine", daemon=True)
        self._thread.start()

    @property
    def ready(self) -> bool:
        return self._thread is not None and self.failed is None and not self.draining and not self._ended

    @property
    def waiting(self) -> int:
        """Requests that have not begun to run."""
        return self._adding + len(self.engine.scheduler.waiting)

    def submit(self, requests: Sequence[Request]) -> Stream:
        """Queue requests. One that the engine refuses ends with the error. Raises Unavailable."""
        if self.draining:
            raise Unavailable("the server is about to stop", remedy="send the request to another one")
        stream = Stream(self, requests)
        for i, request in enumerate(requests):
            request.listen = lambda request, tokens, i=i: self._heard(stream, i, tokens)
            with self._lock:
                self._adding += 1
            try:
                self._post(lambda i=i: self._add(stream, i), lambda error, i=i: self._refuse(stream, i, error))
            except Unavailable:
                with self._lock:
                    self._adding -= 1
                raise
            self.open += 1
        return stream

    def cancel(self, request: Request) -> None:
        """End a request; one that has ended already stays as it is."""
        self._later(lambda: self._cancel(request))

    async def call(self, function: Callable[[], T]) -> T:
        """function() in the engine's thread, between two steps. Raises what it raises, and Unavailable."""
        future, settle = self._future()

        def run() -> None:
            try:
                result = function()
            except Exception as error:
                self._send(settle, None, error)
            else:
                self._send(settle, result, None)

        self._post(run, lambda error: self._send(settle, None, error))
        return await future

    async def aside(self, function: Callable[[], T]) -> T:
        """function() in one of the threads that read adapters. Raises what it raises."""
        assert self.reader is not None
        future, settle = self._future()

        def run() -> None:
            try:
                result = function()
            except BaseException as error:
                self._send(settle, None, error)
            else:
                self._send(settle, result, None)

        self.reader.workers.submit(run)
        return await future

    async def read(self, target: Target, key: str) -> str:
        """The digest of an adapter that is in host memory now, and stays there until `release`. Raises what reading it raises."""
        assert self.reader is not None
        future, settle = self._future()
        self._post(lambda: self.reader.want(target, key, lambda digest, error: self._send(settle, digest, error)),
                   lambda error: self._send(settle, None, error))
        return await future

    def release(self, key: str) -> None:
        """Nobody needs what was read under this key any more, or waits for it."""
        self._later(lambda: (self.reader.cancel(key), self.reader.release(key)))

    async def stop(self, drain: float = 0.0) -> None:
        """Take no more requests, wait up to `drain` seconds for those that run, abort what is left, close the engine."""
        self.draining = True
        until = time.monotonic() + drain
        while self.open and self.failed is None and time.monotonic() < until:
            await asyncio.sleep(0.02)
        with self._lock:
            self._stopping = True
            self._lock.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    def _deliver(self, batch: list[tuple[Stream, int, Piece]]) -> None:
        for stream, i, piece in batch:
            if piece.finish_reason is not None:
                stream._open.discard(i)
                self.open -= 1
                if self.on_end is not None:
                    self.on_end(stream.requests[i], stream.names[i])
            stream._queue.put_nowait((i, piece))

    def _future(self) -> tuple[asyncio.Future[Any], Callable[[Any, BaseException | None], None]]:
        """A future, and what settles it, in the event loop."""
        assert self._aio is not None
        future: asyncio.Future[Any] = self._aio.create_future()

        def settle(result: Any, error: BaseException | None) -> None:
            if not future.done():
                future.set_result(result) if error is None else future.set_exception(error)

        return future, settle

    # -- of both ------------------------------------------------------------------------------------------------------------------
    def _post(self, run: Callable[[], None], refuse: Callable[[BaseException], None]) -> None:
        with self._lock:
            if self.failed is not None or self._ended:
                raise self._unavailable()
            self._inbox.append((run, refuse))
            self._lock.notify()

    def _later(self, run: Callable[[], None]) -> None:
        """run() in the engine's thread, if there is one still."""
        try:
            self._post(run, lambda error: None)
        except Unavailable:
            pass

    def _unavailable(self) -> Unavailable:
        if self.failed is None:
            return Unavailable("the server is about to stop", remedy="send the request to another one")
        return Unavailable(f"the engine has failed ({type(self.failed).__name__})", remedy="start the server again; its log has the reason")

    # -- of the engine's thread -----------------------------------------------------------------------------------------------------
    def _main(self) -> None:
        try:
            while True:
                with self._lock:
                    while not (self._inbox or self._stopping or self.engine.busy):
                        self._lock.wait()
                    tasks = list(self._inbox)
                    self._inbox.clear()
                    if self._stopping and not tasks:
                        self._ended = True  # under the lock: nothing can be posted behind it
                        break
                for run, _ in tasks:
                    run()
                # a step that only puts requests back into the queue computes nothing, so one more says that nothing can
                if self.engine.busy and not self.engine.step() and self.engine.busy and not self.engine.step():
                    self._unblock()
                if self.engine.scheduler.waiting:
                    self.engine.load_ahead()
                self._flush()
            for request_id in list(self._reading):
                stream, i = self._live[request_id]
                self._cancel(stream.requests[i])
            self.engine.close()
            self._flush()
        except BaseException as error:
            self._fail(error)
        finally:
            if self.reader is not None:
                self.reader.stop()

    def _add(self, stream: Stream, i: int) -> None:
        request = stream.requests[i]
        self._live[request.id] = (stream, i)
        if request.adapter is None or self.catalog is None:
            self._enter(stream, i)
            return
        try:
            targets = [self.catalog.target(name) for name, _ in parts_of(request.adapter)]
        except BaseException as error:
            self._leave(stream, i, error)
            return
        self._reading.add(request.id)
        self.reader.want_all(targets, request.id, lambda digests, error: self._found(stream, i, digests, error))

    def _found(self, stream: Stream, i: int, digests: list[str], error: BaseException | None) -> None:
        """The adapters of a request are in host memory, or cannot be."""
        request = stream.requests[i]
        self._reading.discard(request.id)
        if error is not None:
            self._leave(stream, i, error)
            return
        pinned = [PINNED + digest for digest in digests]
        single = isinstance(request.adapter, str)
        request.adapter = pinned[0] if single else tuple(zip(pinned, (weight for _, weight in request.adapter)))
        self._enter(stream, i)

    def _enter(self, stream: Stream, i: int) -> None:
        try:
            self.engine.add(stream.requests[i])
        except BaseException as error:  # a panic of a grammar compiler is no Exception
            self._leave(stream, i, error)
        else:
            self._added()

    def _leave(self, stream: Stream, i: int, error: BaseException) -> None:
        """A request that does not come into the engine."""
        request = stream.requests[i]
        self._live.pop(request.id, None)
        if self.reader is not None:
            self.reader.release(request.id)
        if not isinstance(error, GraftworkError):
            log.error("a request could not be added", exc_info=error, extra={"facts": {"request": request.id}})
        self._end(stream, i, error)
        self._added()

    def _added(self) -> None:
        with self._lock:
            self._adding -= 1

    def _cancel(self, request: Request) -> None:
        if self.engine.cancel(request.id) or request.id not in self._reading:
            return
        self._reading.discard(request.id)
        self.reader.cancel(request.id)
        stream, i = self._live.pop(request.id)
        request.finish_reason = "abort"
        self._outbox.append((stream, i, Piece("", finish_reason="abort")))
        self._added()

    def _absent(self, request: Request) -> None:
        """The adapter of a request in the queue has left the pool and host memory: it is read again, and the request waits again."""

        def back(digests: list[str], error: BaseException | None) -> None:
            if request.finish_reason is not None:
                self.reader.release(request.id)
            elif error is not None:
                self.engine.fail(request, error)
            else:
                self.engine.scheduler.resume(request)

        self.reader.want_all([pinned.removeprefix(PINNED) for pinned, _ in parts_of(request.adapter)], request.id, back)

    def _refuse(self, stream: Stream, i: int, error: BaseException) -> None:
        self._added()
        self._end(stream, i, error)

    def _end(self, stream: Stream, i: int, error: BaseException) -> None:
        request = stream.requests[i]
        request.error, request.finish_reason = error, "error"
        self._outbox.append((stream, i, Piece("", finish_reason="error", error=error)))

    def asked_for(self, request: Request) -> str | None:
        """The name that a request gave for its adapter."""
        stream, i = self._live[request.id]
        return stream.names[i]

    def _heard(self, stream: Stream, i: int, tokens: list[int]) -> None:
        request = stream.requests[i]
        if self.reader is not None:
            self.reader.release(request.id)  # it has run, or will not
        self.written.add(len(tokens))
        last = request.finish_reason is not None
        text = self.engine.text(request).take(final=last)
        logprobs = request.logprobs[stream._told[i]:]
        stream._told[i] += len(logprobs)
        if last:
            self._live.pop(request.id, None)
        self._outbox.append((stream, i, Piece(text, tuple(tokens), tuple(logprobs), request.finish_reason, request.error)))

    def _unblock(self) -> None:
        """Nothing runs and the first in the queue does not fit: it never will."""
        scheduler = self.engine.scheduler
        if not scheduler.running and scheduler.waiting:
            request = scheduler.waiting[0]
            request.error = GraftworkError("the request needs more memory than the pool has", remedy="ask for fewer tokens")
            self.engine.cancel(request.id)

    def _flush(self) -> None:
        if self._outbox:
            batch, self._outbox = self._outbox, []
            self._send(self._deliver, batch)

    def _send(self, function: Callable[..., None], *arguments: Any) -> None:
        try:
            self._aio.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the event loop is closed: nobody listens any more
            pass

    def _fail(self, error: BaseException) -> None:
        log.critical("the engine has failed", exc_info=error)
        with self._lock:
            self.failed = error
            tasks = list(self._inbox)
            self._inbox.clear()
        told = self._unavailable()
        for stream, i in list(self._live.values()):
            self._end(stream, i, told)
        self._live.clear()
        for _, refuse in tasks:
            refuse(told)
        self._flush()
