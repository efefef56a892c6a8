"""One address before several replicas of the server: a reverse proxy that sends an adapter's requests to the same replica.

A replica is the whole server (app.py) at an address of its own; what it answers passes through unchanged, piece by piece. The router
adds what must be one for all of them: the address, the limit on bodies, the requests that a key may send in a minute, the log line of
each request, and /health, /ready and /metrics. Which replica: see ../affinity.py. A response names its replica in `x-graftwork-replica`.

A replica that dies before it has answered is passed over, and the request goes to the next; the change of an adapter only where it had
not been sent yet. A stream that breaks ends with an error event, as one that the server itself ends.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

import httpx
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ..affinity import choose
from .answers import ClientGone, Json, send_pieces, unless_gone
from .app import ServerOptions
from .edge import FACTS, Edge, to_json
from .errors import ApiError
from .keys import Keys
from .replica_metrics import RouterMetrics

METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
#: of one connection, not of the message; and what the router says itself
OWN = {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer", "transfer-encoding", "upgrade", "host",
       "content-length", "expect", "x-request-id"}
#: repeating these could do them twice
CHANGES = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/adapters/")


@dataclass(eq=False)
class Replica:
    """client: of the replica's address, None while it does not answer. open: requests that it has."""

    number: int
    client: httpx.AsyncClient | None = None
    open: int = 0
    starts: int = 0


class Router:
    """replicas by number; whoever keeps them alive sets their clients. full: requests in a replica's batch."""

    def __init__(self, replicas: Mapping[int, Replica], options: ServerOptions, *, full: int, keys: Keys | None = None):
        self.replicas, self.options, self.full, self.keys = replicas, options, full, keys
        self.metrics = RouterMetrics(replicas)

    @property
    def live(self) -> dict[int, Replica]:
        return {number: replica for number, replica in self.replicas.items() if replica.client is not None}

    async def forward(self, request: Request) -> Response:
        """Raises ApiError."""
        facts = request.scope[FACTS]
        if self.keys is not None and request.method != "GET":
            key = self.keys.find(request.headers.get("authorization"))
            facts["key"] = key.name
            key.count(self.keys.clock())  # the replicas do not count: each sees its part only
        try:
            body, path = await request.body(), request.url.path
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it; the log does
        model = _asked(body)
        if model is not None:
            facts["model"] = model[:200]
        adapter, tried = None if model == self.options.model else model, set()
        wanted = self._wanted(request)
        while True:
            live = {number: replica for number, replica in self.live.items()
                    if number not in tried and (wanted is None or number == wanted)}
            if not live:
                who = "no replica of the server answers; they are" if wanted is None else f"replica {wanted} does not answer; it is"
                raise ApiError(503, f"{who} started again", code="unavailable",
                               headers={"retry-after": "5"})
            if request.method == "GET":
                number, why = min(live), "first"  # what it shows of itself does not jump from one to the other
            else:
                number, why = choose(adapter, {n: replica.open for n, replica in live.items()}, self.full)
            replica = live[number]
            facts["replica"] = number
            try:
                return await self._ask(replica, request, body, why if not tried else "again")
            except ClientGone:
                return Response(status_code=499)
            except httpx.TransportError as error:
                tried.add(number)
                if path.startswith(CHANGES) and not isinstance(error, httpx.ConnectError):
                    raise ApiError(503, "the replica ended before it answered; look at GET /v1/models before you send it again",
                                   code="unavailable") from None

    def _wanted(self, request: Request) -> int | None:
        """The replica that a GET names: `?replica=1`."""
        named = request.query_params.get("replica") if request.method == "GET" else None
        found = None if named is None else next((number for number in self.replicas if str(number) == named), None)
        if named is not None and found is None:
            raise ApiError(404, f"there is no replica '{named[:20]}'; replicas: {', '.join(map(str, self.replicas))}", param="replica",
                           code="not_found")
        return found

    async def _ask(self, replica: Replica, request: Request, body: bytes, why: str) -> Response:
        client, scope = replica.client, request.scope
        headers = [(name, value) for name, value in request.headers.raw if name.decode("latin-1").lower() not in OWN]
        headers.append((b"x-request-id", scope[FACTS]["id"].encode()))
        url = client.base_url.copy_with(raw_path=scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b""))
        self.metrics.requests.labels(str(replica.number), why).inc()
        replica.open += 1
        handed_over = False
        try:
            answer = await unless_gone(request.receive, client.send(
                client.build_request(request.method, url, headers=headers, content=body), stream=True))
            handed_over = True
        finally:
            if not handed_over:
                replica.open -= 1
        return Passed(answer, replica)

    # -- of the router itself ---------------------------------------------------------------------------------------------------------
    async def health(self, request: Request) -> Response:
        states = {str(number): "ok" if replica.client is not None else "starting" for number, replica in self.replicas.items()}
        return Json({"status": "ok" if self.live else "failed", "replicas": states}, status_code=200 if self.live else 503)

    async def ready(self, request: Request) -> Response:
        for replica in list(self.live.values()):
            try:
                if (await replica.client.get("/ready")).status_code == 200:
                    return Json({"status": "ready"})
            except httpx.TransportError:
                continue
        return Json({"status": "not ready"}, status_code=503)

    async def measured(self, request: Request) -> Response:
        texts = {}
        for number, replica in list(self.live.items()):
            try:
                texts[number] = (await replica.client.get("/metrics")).text
            except httpx.TransportError:
                continue
        return Response(self.metrics.text(texts), media_type="text/plain; version=0.0.4; charset=utf-8")


def _asked(body: bytes) -> str | None:
    """The model or adapter that a body names. A body that is none is the replica's to refuse."""
    try:
        found = json.loads(body) if body else None
    except (ValueError, RecursionError):
        return None
    named = [found.get(field) for field in ("model", "lora_name", "name")] if isinstance(found, dict) else []
    return next((name for name in named if isinstance(name, str)), None)


class Passed(Response):
    """A replica's response, piece by piece; the replica hears when the client goes."""

    def __init__(self, answer: httpx.Response, replica: Replica):
        super().__init__(status_code=answer.status_code)
        self.answer, self.replica = answer, replica
        kept = [(name.lower(), value) for name, value in answer.headers.raw if name.decode("latin-1").lower() not in OWN
                or name.lower() == b"content-length"]
        self.raw_headers = [*kept, (b"x-graftwork-replica", str(replica.number).encode())]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send_pieces(self, self._pieces(), receive, send)
        finally:
            self.replica.open -= 1
            await self.answer.aclose()

    async def _pieces(self) -> AsyncIterator[bytes]:
        try:
            async for piece in self.answer.aiter_raw():
                yield piece
        except httpx.TransportError:
            if "text/event-stream" not in self.answer.headers.get("content-type", ""):
                raise  # the length that was promised is missing: the client sees that it broke
            gone = ApiError(503, "the replica ended while it wrote this answer; send the request again", code="unavailable")
            yield b"\n\ndata: " + to_json(gone.body()) + b"\n\ndata: [DONE]\n\n"


def create_router(router: Router, lifespan: Callable[[Starlette], AbstractAsyncContextManager[None]]) -> Starlette:
    """lifespan: what keeps the replicas alive."""
    app = Starlette(lifespan=lifespan, routes=[
        Route("/health", router.health), Route("/ready", router.ready), Route("/metrics", router.measured),
        Route("/{path:path}", router.forward, methods=METHODS)])
    app.state.router = router
    app.add_middleware(Edge, max_body=router.options.max_body, body_seconds=router.options.body_seconds,
                       answered=lambda route, status: router.metrics.answers.labels(str(status)).inc())
    app.add_exception_handler(ApiError, _failed)
    app.add_exception_handler(HTTPException, _refused)
    return app


async def _failed(request: Request, error: ApiError) -> Response:
    return Json(error.body(), status_code=error.status, headers=error.headers)


async def _refused(request: Request, error: HTTPException) -> Response:
    code = {408: "timeout", 413: "request_too_large"}.get(error.status_code, "invalid_request")
    return await _failed(request, ApiError(error.status_code, str(error.detail), code=code, headers=error.headers))
