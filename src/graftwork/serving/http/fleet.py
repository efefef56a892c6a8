"""Replicas of the server on one machine as Ray actors, kept alive behind a router (router.py).

A replica is an actor whose process runs `graft serve` on a loopback port, with the options of the command that was given. Ray starts the
processes, gives each its share of processors and GPUs, and says when one has ended; a new one is started in its place.

Why actors and not Ray Serve's own proxy: which replica a request goes to depends on its body, which that proxy does not read. A
deployment that routes would have to pack every streamed piece into a message of Ray's and out again, and would stand between the
server and its client where a client that goes, limits and headers are concerned. A reverse proxy hands all of that through as it is.

Ray listens on all addresses of the machine. Its ports take commands only with a token, which is made at the start and is in the
environment of these processes alone.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import secrets
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from ...errors import GraftworkError
from .router import Replica, Router, create_router
from .server import run as serve

HOST = "127.0.0.1"
#: to start Ray: it gives its own processes some 15 seconds, which may be too few on a machine with much to do
TRIES = 3
log = logging.getLogger("graftwork.serve")


class Process:
    """The actor. `run` takes its main thread, which signals need."""

    def pid(self, folder: str) -> int:
        os.chdir(folder)  # relative paths of the command
        return os.getpid()

    def run(self, command: Callable[..., None], options: Mapping[str, Any]) -> None:
        command(**options)


@dataclass
class Running:
    actor: Any
    pid: int
    url: str
    ended: Any  # ray.ObjectRef: done when the command is


class Stopped(Exception):
    """The fleet is about to stop."""


class Fleet:
    """count replicas of command(**options, host=..., port=...). drain: seconds that their end may take."""

    def __init__(self, count: int, command: Callable[..., None], options: Mapping[str, Any], *, drain: float):
        self.replicas = {number: Replica(number) for number in range(count)}
        self.command, self.options, self.drain = command, dict(options), drain
        self.running: dict[int, Running] = {}
        self._stopping = threading.Event()
        self.ray: Any = None
        self._process: Any = None

    def start(self) -> None:
        """Start Ray and all replicas; returns when all of them answer. Raises the GraftworkError with which one of them failed."""
        self._start_ray()
        ray, cores, count = self.ray, os.cpu_count() or 1, len(self.replicas)
        gpus = int(ray.cluster_resources().get("GPU", 0))
        share = 1 / math.ceil(count / gpus) if gpus else 0
        self._process = ray.remote(num_cpus=max(1, cores // count), num_gpus=share, max_restarts=0)(Process)
        with ThreadPoolExecutor(count) as threads:
            started = [threads.submit(self._launch, replica) for replica in self.replicas.values()]
            for number, each in enumerate(started):
                try:
                    self.running[number] = each.result()
                except BaseException:
                    self._stopping.set()  # the others give up too
                    raise

    def _start_ray(self) -> None:
        os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
        import ray  # reads these variables when it is imported

        self.ray = ray
        for tries_left in reversed(range(TRIES)):
            try:
                ray.init(address="local", include_dashboard=False, num_cpus=max(os.cpu_count() or 1, len(self.replicas)),
                         object_store_memory=80 << 20, logging_level=logging.ERROR)
                return
            except Exception as error:  # Ray raises bare ones
                ray.shutdown()
                if not tries_left:
                    raise GraftworkError(f"Ray could not start: {error}", remedy="its logs are in /tmp/ray/session_latest/logs") from error

    def close(self) -> None:
        """End whatever is left."""
        self._stopping.set()
        if self.ray is not None:
            self.ray.shutdown()

    @asynccontextmanager
    async def lifespan(self, app: Any) -> AsyncIterator[None]:
        keepers = [asyncio.create_task(self._keep(replica)) for replica in self.replicas.values()]
        try:
            yield
        finally:
            self._stopping.set()
            for running in self.running.values():
                self._end(running)
            await asyncio.wait(keepers, timeout=self.drain + 5)
            for keeper in keepers:
                keeper.cancel()
            await asyncio.gather(*keepers, return_exceptions=True)

    # -- one replica ------------------------------------------------------------------------------------------------------------------
    def _launch(self, replica: Replica) -> Running:
        """Blocks until it answers. Raises GraftworkError, and Stopped."""
        replica.starts += 1
        actor = self._process.remote()
        try:
            pid, url = self.ray.get(actor.pid.remote(os.getcwd())), f"http://{HOST}:{_free_port()}"
            options = {**self.options, "host": HOST, "port": int(url.rpartition(":")[2])}
            running = Running(actor, pid, url, actor.run.remote(self.command, options))
            with httpx.Client(trust_env=False, timeout=2) as client:
                while not self.ray.wait([running.ended], timeout=0.1)[0]:
                    if self._stopping.is_set():
                        raise Stopped
                    try:
                        if client.get(f"{url}/health").status_code == 200:
                            return running
                    except httpx.TransportError:
                        continue
            self.ray.get(running.ended)
            raise GraftworkError("a replica ended before it answered", remedy="its last lines above say why")
        except self.ray.exceptions.RayError as error:
            self.ray.kill(actor)
            cause = getattr(error, "cause", None) or error  # what the command raised
            if isinstance(cause, GraftworkError):
                raise cause from None
            raise GraftworkError(f"a replica could not start: {type(cause).__name__}: {cause}",
                                 remedy="its last lines above say why") from error
        except BaseException:
            self.ray.kill(actor)
            raise

    async def _keep(self, replica: Replica) -> None:
        while not self._stopping.is_set():
            running = self.running[replica.number]
            # an idle connection is given up here first: on one that the server just closed a request would seem to fail
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2)
            async with httpx.AsyncClient(base_url=running.url, trust_env=False, timeout=httpx.Timeout(None, connect=5),
                                         limits=limits) as client:
                replica.client = client
                reason = await self._ended(client, running)
                replica.client = None
            self.ray.kill(running.actor)
            if not self._stopping.is_set():
                log.error("a replica has ended and is started again", extra={"facts": {"replica": replica.number, "reason": reason}})
                await self._again(replica)

    async def _ended(self, client: httpx.AsyncClient, running: Running) -> str:
        """Waits for the end of a replica, or for its engine's; says why."""
        ended = asyncio.wrap_future(running.ended.future())
        while True:
            await asyncio.wait({ended}, timeout=1)
            if ended.done():
                error = ended.exception()
                return "it was stopped" if error is None else type(error).__name__
            try:
                if (await client.get("/health", timeout=30)).status_code == 503:
                    return "its engine has failed"
            except httpx.TransportError:
                continue

    def _end(self, running: Running) -> None:
        """An orderly end, as of any server."""
        if not self.ray.wait([running.ended], timeout=0)[0]:
            try:
                os.kill(running.pid, signal.SIGTERM)
            except ProcessLookupError:
                pass

    async def _again(self, replica: Replica) -> None:
        pause = 1.0
        while True:
            try:
                self.running[replica.number] = await asyncio.to_thread(self._launch, replica)
                return
            except Stopped:
                return
            except GraftworkError as error:
                log.error("a replica could not be started; the next try follows",
                          extra={"facts": {"replica": replica.number, "error": str(error)[:500], "seconds": pause}})
            await asyncio.sleep(pause)
            pause = min(60.0, 2 * pause)


def serve_replicas(fleet: Fleet, router: Router, listening: socket.socket, ready: Callable[[], None]) -> None:
    """Start them, serve until SIGTERM or SIGINT, end them. Raises GraftworkError where one of them cannot start."""
    try:
        fleet.start()
        serve(create_router(router, fleet.lifespan), listening, drain=fleet.drain, ready=ready)
    finally:
        fleet.close()


def _free_port() -> int:
    with socket.create_server((HOST, 0)) as free:
        return free.getsockname()[1]
