"""Running the app: a socket, logs as JSON lines, signals, and an orderly end."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from ...errors import UsageError
from .edge import JsonLines, to_json
from .errors import ApiError

#: bytes of a request's first line and headers
MAX_HEAD = 32 << 10
#: seconds within which a connection without a request has to send the whole head of one
HEAD_SECONDS = 20.0
#: files a process may have open, connections among them, where the system allows so many
FILES = 65536


class Connection(H11Protocol):
    """One client. It is cut off when it begins a request and does not go on, and what is no HTTP gets an error of our shape."""

    _idle: Any = None  # the exchange that was over at the last look (None: there had been none), False while one was going on
    _looking: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._looking = self.loop.call_later(HEAD_SECONDS, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._looking is not None:
            self._looking.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        over = self.cycle is None or self.cycle.response_complete
        if over and self._idle is self.cycle:  # silent ones are closed sooner by uvicorn: this one sends a head, and does not end it
            self.transport.abort()
            return
        self._idle = self.cycle if over else False
        self._looking = self.loop.call_later(HEAD_SECONDS, self._look)

    def send_400_response(self, msg: str) -> None:
        error = ApiError(400, f"this is no HTTP request, or its head is longer than {MAX_HEAD} bytes", code="invalid_request")
        content = to_json(error.body())
        headers = [("content-type", "application/json"), ("content-length", str(len(content))), ("connection", "close")]
        try:
            for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=content), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
        except h11.LocalProtocolError:  # in the middle of an answer nothing can be said any more
            pass
        self.transport.close()


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises UsageError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise UsageError(f"cannot listen on {host}:{port}: {error}",
                         remedy="choose another --port or --host; --port 0 takes a free one") from None


def log_to_stderr(level: int = logging.INFO) -> None:
    """One JSON object a line for requests and for what uvicorn has to say."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("graftwork.serve", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


def settings(app: FastAPI, drain: float) -> uvicorn.Config:
    return uvicorn.Config(app, http=Connection, h11_max_incomplete_event_size=MAX_HEAD, ws="none", log_config=None, access_log=False,
                          lifespan="on", timeout_graceful_shutdown=max(1, round(drain)), server_header=False)


def raise_file_limit() -> None:
    """As many open files as the system allows this process, up to FILES: a connection is one, and 1024 is a usual default."""
    try:
        import resource
    except ImportError:  # Windows knows no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def run(app: FastAPI, listening: socket.socket, *, drain: float, ready: Callable[[], None] = lambda: None) -> None:
    """Serve until SIGTERM or SIGINT: then nothing new is accepted and what runs gets `drain` seconds. ready() is called once the server
    answers. After SIGINT KeyboardInterrupt is raised; a second one ends at once."""
    raise_file_limit()

    class Server(uvicorn.Server):
        async def startup(self, sockets=None) -> None:
            await super().startup(sockets)
            if self.started:
                ready()

    # uvicorn sends itself the signal once more after its orderly end: SIGTERM would then kill the process
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        Server(settings(app, drain)).run(sockets=[listening])
    finally:
        signal.signal(signal.SIGTERM, before)
