"""What happens to every HTTP request: an id, a limit on its size, one line in the log, and an answer even to what went wrong."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from typing import Any

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, api_error

ID = re.compile(r"[A-Za-z0-9._:@-]{1,128}")
FACTS = "graftwork.facts"  # of the scope: what the handlers add to the log line
POLLED = {"/v1/status"}  # asked for every second by every open page: logged only where it goes wrong

log = logging.getLogger("graftwork.serve")


class Edge:
    """Middleware. max_body: bytes. body_seconds: within which a body has to be there. answered(route, status): called for every
    response."""

    def __init__(self, app: ASGIApp, *, max_body: int, body_seconds: float, answered: Any):
        self.app, self.max_body, self.body_seconds, self.answered = app, max_body, body_seconds, answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if ID.fullmatch(given) else uuid.uuid4().hex
        facts = scope[FACTS] = {"id": request_id}
        start, status, received, whole = time.monotonic(), 0, 0, False
        until = asyncio.get_running_loop().time() + self.body_seconds

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        async def receiving() -> Message:
            nonlocal received, whole
            if whole:
                return await receive()
            waiting = asyncio.ensure_future(receive())
            try:
                # Not asyncio.timeout: after a stall of the server's own it would cancel a message that has come in the meantime.
                await asyncio.wait({waiting}, timeout=until - asyncio.get_running_loop().time())
                if not waiting.done():
                    raise HTTPException(408, f"the request's body did not come within {self.body_seconds:g} seconds",
                                        headers={"connection": "close"})
                message = waiting.result()
            finally:
                waiting.cancel()
            whole = not message.get("more_body", False)
            received += len(message.get("body", b""))
            if received > self.max_body:
                raise HTTPException(413, self._too_large)
            return message

        try:
            length = headers.get(b"content-length", b"").lstrip(b"0")
            if length.isdigit() and (len(length) > 18 or int(length) > self.max_body):
                await respond(ApiError(413, self._too_large, code="request_too_large"), sending)
            else:
                await self.app(scope, receiving, sending)
        except Exception as error:
            log.error("a request ended with an error that was not foreseen", exc_info=error, extra={"facts": facts})
            if status:
                raise
            await respond(api_error(error), sending)
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            self.answered(route, status)
            level = logging.DEBUG if scope["path"] in POLLED and status < 400 else logging.INFO
            log.log(level, "request", extra={"facts": {**facts, "method": scope["method"], "path": scope["path"][:200], "status": status,
                                                       "ms": round(1000 * (time.monotonic() - start), 1)}})

    @property
    def _too_large(self) -> str:
        return f"the request has more than {self.max_body} bytes"


async def respond(error: ApiError, send: Send) -> None:
    content = to_json(error.body())
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode()),
               *((k.encode(), v.encode()) for k, v in error.headers.items())]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


def to_json(value: Any) -> bytes:
    """UTF-8; halves of characters, which clients can send, become '?'."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


class JsonLines(logging.Formatter):
    """One JSON object a record, `extra={"facts": {...}}` as its fields."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {"time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z",
                                "level": record.levelname.lower(), "event": record.getMessage(), **getattr(record, "facts", {})}
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line)
