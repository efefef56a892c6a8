"""The engine's news in OpenAI's two forms, whole or as server-sent events.

Both forms share one life: requests are queued, their news is read until all have ended, the time is up or the client has gone;
whatever has not ended then is cancelled. The first news is awaited before a status is sent, so that a request that cannot run
fails with a status and not inside a stream.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..engine.request import TokenLogprob
from .edge import to_json
from .errors import ApiError, api_error
from .loop import Piece, Stream

T = TypeVar("T")


class Json(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content)


@dataclass
class Choice:
    """One answer as far as it is known."""

    index: int
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    begun: bool = False
    offset: int = 0  # characters of its tokens so far

    def add(self, piece: Piece) -> None:
        self.text.append(piece.text)
        self.logprobs += piece.logprobs
        self.finish_reason = piece.finish_reason


class Form:
    """Completions (the base) or chat. token_text: a token's id -> its text."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, call: str, model: str, reported: int | None, token_text: Callable[[int], str]):
        self.id, self.model, self.created = f"{self.prefix}-{call}", model, int(time.time())
        self.reported, self.token_text = reported, token_text

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def choice(self, choice: Choice) -> dict[str, Any]:
        return {"index": choice.index, "text": "".join(choice.text), "logprobs": self.logprobs(choice, choice.logprobs),
                "finish_reason": choice.finish_reason}

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """Sent before a choice's first text."""
        return None

    def delta(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        return {"index": choice.index, "text": piece.text, "logprobs": self.logprobs(choice, piece.logprobs),
                "finish_reason": piece.finish_reason}

    def logprobs(self, choice: Choice, found: Any) -> dict[str, Any] | None:
        if self.reported is None:
            return None
        texts, offsets = [self.token_text(one.token) for one in found], []
        for text in texts:
            offsets.append(choice.offset)
            choice.offset += len(text)
        return {"tokens": texts, "token_logprobs": [_finite(one.value) for one in found], "text_offset": offsets,
                "top_logprobs": [{self.token_text(token): _finite(value) for token, value in one.top} for one in found]
                if self.reported else None}


class ChatForm(Form):
    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def choice(self, choice: Choice) -> dict[str, Any]:
        message = {"role": "assistant", "content": "".join(choice.text), "refusal": None}
        return {"index": choice.index, "message": message, "logprobs": self.logprobs(choice, choice.logprobs),
                "finish_reason": choice.finish_reason}

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        return {"index": choice.index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def delta(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        return {"index": choice.index, "delta": {"content": piece.text} if piece.text else {},
                "logprobs": self.logprobs(choice, piece.logprobs), "finish_reason": piece.finish_reason}

    def logprobs(self, choice: Choice, found: Any) -> dict[str, Any] | None:
        if self.reported is None:
            return None
        return {"content": [{**self._token(one.token, one.value), "top_logprobs": [self._token(*each) for each in one.top]}
                            for one in found], "refusal": None}

    def _token(self, token: int, value: float) -> dict[str, Any]:
        text = self.token_text(token)
        return {"token": text, "logprob": _finite(value), "bytes": list(text.encode("utf-8", "replace"))}


def _finite(value: float) -> float:
    """JSON has no infinity and no NaN; vLLM writes the same number."""
    return value if value > -9999.0 else -9999.0


class Answer:
    """One call: its stream, and the time by which it must have ended (of the event loop's clock)."""

    def __init__(self, stream: Stream, form: Form, until: float, choices_per_prompt: int):
        self.stream, self.form, self.until = stream, form, until
        self.choices = [Choice(i) for i in range(len(stream.requests))]
        self.per_prompt = choices_per_prompt

    async def next(self) -> tuple[Choice, Piece]:
        """The next news. Raises ApiError for a request that ended with an error, and when the time is up."""
        try:
            async with asyncio.timeout_at(self.until):
                i, piece = await self.stream.next()
        except TimeoutError:
            raise ApiError(504, "the request took longer than this server allows", code="timeout") from None
        if piece.error is not None:
            raise api_error(piece.error)
        if piece.finish_reason == "abort":
            raise ApiError(503, "the request was given up: the server is too busy, or about to stop", code="overloaded",
                           headers={"retry-after": "5"})
        return self.choices[i], piece

    def usage(self) -> dict[str, Any]:
        requests = self.stream.requests
        firsts = requests[:: self.per_prompt]  # the choices of a prompt share it
        prompt, written = sum(len(r.prompt) for r in firsts), sum(len(r.output) for r in requests)
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written,
                "prompt_tokens_details": {"cached_tokens": sum(min(r.cached, len(r.prompt)) for r in firsts)}}

    async def whole(self) -> dict[str, Any]:
        while any(choice.finish_reason is None for choice in self.choices):
            choice, piece = await self.next()
            choice.add(piece)
        return {**self.form.head(self.form.kind), "choices": [self.form.choice(choice) for choice in self.choices], "usage": self.usage()}

    async def events(self, first: tuple[Choice, Piece], with_usage: bool) -> AsyncIterator[bytes]:
        """Server-sent events; an error on the way is the last one but [DONE]."""
        news: tuple[Choice, Piece] | None = first
        try:
            while news is not None:
                choice, piece = news
                found = [] if choice.begun else [self.form.opening(choice)]
                choice.begun, choice.finish_reason = True, piece.finish_reason
                if piece.text or piece.finish_reason or (piece.logprobs and self.form.reported is not None):
                    found.append(self.form.delta(choice, piece))
                for each in found:
                    if each is not None:
                        yield self._event([each], {"usage": None} if with_usage else {})
                more = any(choice.finish_reason is None for choice in self.choices)
                news = await self.next() if more else None
            if with_usage:
                yield self._event([], {"usage": self.usage()})
        except ApiError as error:
            yield b"data: " + to_json(error.body()) + b"\n\n"
        yield b"data: [DONE]\n\n"

    def _event(self, choices: list[dict[str, Any]], more: dict[str, Any]) -> bytes:
        return b"data: " + to_json({**self.form.head(self.form.chunk_kind), "choices": choices, **more}) + b"\n\n"


class EventStream(Response):
    """Sends events as they come; stops, and calls `closed`, when the client has gone."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], closed: Callable[[], None]):
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.events, self.closed = events, closed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send_pieces(self, self.events, receive, send)
        finally:
            self.closed()


async def send_pieces(response: Response, pieces: AsyncIterator[bytes], receive: Receive, send: Send) -> None:
    """A response whose body comes piece by piece, until its end or until the client has gone."""
    async def write() -> None:
        await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
        async for piece in pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    try:
        await unless_gone(receive, write())
    except ClientGone:
        pass


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """What `work` gives; it is cancelled, and ClientGone raised, when the client goes first."""
    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)
