"""Running the app: a socket, logs as JSON lines, signals, and an orderly end."""

from __future__ import annotations

import logging
import signal
import socket
import sys
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from ...errors import UsageError
from .edge import JsonLines


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


def run(app: FastAPI, listening: socket.socket, *, drain: float, ready: Callable[[], None] = lambda: None) -> None:
    """Serve until SIGTERM or SIGINT: then nothing new is accepted and what runs gets `drain` seconds. ready() is called once the server
    answers. After SIGINT KeyboardInterrupt is raised; a second one ends at once."""
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="on", timeout_graceful_shutdown=max(1, round(drain)),
                            server_header=False)

    class Server(uvicorn.Server):
        async def startup(self, sockets=None) -> None:
            await super().startup(sockets)
            if self.started:
                ready()

    # uvicorn sends itself the signal once more after its orderly end: SIGTERM would then kill the process
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        Server(config).run(sockets=[listening])
    finally:
        signal.signal(signal.SIGTERM, before)
