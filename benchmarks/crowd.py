"""Many streaming clients of one server, every answer checked while it comes: shared by serving_load.py and the tests.

Bare asyncio streams: with five hundred connections an HTTP library would take more processor time than the server.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

#: seconds that a client waits for any one message before it counts as lost
PATIENCE = 300.0


@dataclass(frozen=True)
class Answer:
    """text, and the text of each token (special ones too, which `text` leaves out)."""

    text: str
    tokens: tuple[str, ...]


@dataclass(frozen=True)
class Ask:
    """body: of POST /v1/completions. answers: the right ones; one of them from end to end, as an adapter that is being replaced has
    two. refusals: (status, code) that are right as well."""

    body: dict[str, Any]
    answers: tuple[Answer, ...] = ()
    refusals: frozenset[tuple[int, str]] = frozenset()


@dataclass
class Tally:
    """What came of all asks. whole: right answers to their end. left: right ones as far as the client stayed. busy: 429s, each asked
    again. first, gaps: seconds to the first token and between tokens. most: clients that waited for the server at once."""

    whole: int = 0
    left: int = 0
    busy: int = 0
    tokens: int = 0
    refused: Counter[tuple[int, str]] = field(default_factory=Counter)
    models: Counter[str] = field(default_factory=Counter)  # of right answers
    wrong: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    asking: int = 0
    most: int = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        self.asking += 1
        self.most = max(self.most, self.asking)
        try:
            yield
        finally:
            self.asking -= 1


class Connection:
    """HTTP/1.1 over one socket, one exchange after the other."""

    def __init__(self, url: str):
        where = urlsplit(url)
        self.host, self.port = where.hostname, where.port
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None
        self.headers: dict[str, str] = {}

    async def send(self, method: str, path: str, body: Any = None) -> None:
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection(self.host, self.port)
        content = b"" if body is None else json.dumps(body).encode()
        self.writer.write(f"{method} {path} HTTP/1.1\r\nhost: {self.host}\r\ncontent-type: application/json\r\n"
                          f"content-length: {len(content)}\r\n\r\n".encode() + content)
        await self.writer.drain()

    async def status(self) -> int:
        assert self.reader is not None
        head = (await self._soon(self.reader.readuntil(b"\r\n\r\n"))).decode("latin-1").split("\r\n")
        self.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        return int(head[0].split(" ")[1])

    async def chunk(self) -> bytes:
        """The next piece of a body of unknown length, empty at its end."""
        assert self.reader is not None
        size = int(await self._soon(self.reader.readuntil(b"\r\n")), 16)
        return (await self._soon(self.reader.readexactly(size + 2)))[:-2]

    async def body(self) -> bytes:
        assert self.reader is not None
        if "content-length" in self.headers:
            return await self._soon(self.reader.readexactly(int(self.headers["content-length"])))
        pieces = []
        while piece := await self.chunk():
            pieces.append(piece)
        return b"".join(pieces)

    def close(self, hard: bool = False) -> None:
        """hard: with a reset."""
        if self.writer is not None:
            self.writer.transport.abort() if hard else self.writer.close()
        self.reader = self.writer = None

    @staticmethod
    async def _soon(work: Awaitable[bytes]) -> bytes:
        async with asyncio.timeout(PATIENCE):
            return await work


class Client:
    """Asks, and compares. leaves: goes away in the middle of every answer, at a place that `draw` chooses."""

    def __init__(self, url: str, tally: Tally, draw: random.Random, leaves: bool):
        self.connection, self.tally, self.draw, self.leaves = Connection(url), tally, draw, leaves

    async def run(self, asks: Callable[[random.Random], Ask], until: float) -> None:
        """until: of the event loop's clock; what was asked before is heard to its end."""
        clock = asyncio.get_running_loop().time
        try:
            while clock() < until:
                ask = asks(self.draw)
                while clock() < until and not await self.ask(ask):
                    await asyncio.sleep(self.draw.uniform(0.05, 0.5))
        finally:
            self.connection.close()

    async def ask(self, ask: Ask) -> bool:
        """False when the server was busy."""
        stay = self.draw.randrange(ask.body["max_tokens"]) if self.leaves else None
        try:
            with self.tally.waiting():
                return await self._exchange(ask, stay)
        except (OSError, asyncio.IncompleteReadError, ValueError, LookupError, TimeoutError) as error:
            self.tally.wrong.append(f"{ask.body['model']}: lost, {type(error).__name__}: {error}")
            self.connection.close()
            return True

    async def _exchange(self, ask: Ask, stay: int | None) -> bool:
        connection, tally, start = self.connection, self.tally, time.perf_counter()
        await connection.send("POST", "/v1/completions", ask.body)
        if stay == 0:  # gone before anything came
            connection.close(hard=bool(self.draw.getrandbits(1)))
            tally.left += 1
            return True
        status = await connection.status()
        if status != 200:
            error = json.loads(await connection.body())["error"]
            if status == 429:
                tally.busy += 1
                return False
            if (status, error["code"]) in ask.refusals:
                tally.refused[status, error["code"]] += 1
            else:
                tally.wrong.append(f"{ask.body['model']}: {status} {error}")
            return True
        text, tokens, ended, last = "", [], None, None
        while piece := await connection.chunk():
            if piece == b"data: [DONE]\n\n":
                continue
            event = json.loads(piece[6:])
            if "error" in event:
                tally.wrong.append(f"{ask.body['model']}: inside the stream: {event['error']}")
                continue
            now = time.perf_counter()
            (tally.first if last is None else tally.gaps).append(now - (start if last is None else last))
            choice, last = event["choices"][0], now
            text, ended = text + choice["text"], choice["finish_reason"]
            if choice["logprobs"] is not None:
                tokens += choice["logprobs"]["tokens"]
            if stay is not None and ended is None and len(tokens) >= stay:
                break
        left = stay is not None and ended is None
        if left:
            connection.close(hard=bool(self.draw.getrandbits(1)))
        tally.tokens += len(tokens)
        if not any(_right(answer, text, tokens, left) for answer in ask.answers) or not (left or ended):
            tally.wrong.append(f"{ask.body['model']}: {ask.body['prompt']!r} gave {tokens} ({ended}), right: {ask.answers}")
        else:
            tally.models[ask.body["model"]] += 1
            tally.left, tally.whole = tally.left + left, tally.whole + (not left)
        return True


def _right(answer: Answer, text: str, tokens: Sequence[str], left: bool) -> bool:
    if left:
        return answer.text.startswith(text) and answer.tokens[: len(tokens)] == tuple(tokens)
    return answer.text == text and answer.tokens == tuple(tokens)


async def crowd(url: str, asks: Callable[[random.Random], Ask], *, clients: int, seconds: float, leaving: bool = True,
                seed: int = 0, tally: Tally | None = None) -> Tally:
    """`clients` clients at once for so many seconds, then until all have their last answer. leaving: every other one goes away in the
    middle of each of its answers."""
    tally, until = tally or Tally(), asyncio.get_running_loop().time() + seconds
    await asyncio.gather(*(Client(url, tally, random.Random(f"{seed} {i}"), leaving and i % 2 == 1).run(asks, until)
                           for i in range(clients)))
    return tally


async def call(url: str, path: str, body: Any = None) -> tuple[int, bytes]:
    """One exchange on a connection of its own: POST with a body, else GET. Status and body."""
    connection = Connection(url)
    try:
        await connection.send("GET" if body is None else "POST", path, body)
        return await connection.status(), await connection.body()
    finally:
        connection.close()


async def in_turn(url: str, calls: Sequence[tuple[str, Any]], *, seconds: float, pause: float, tally: Tally) -> int:
    """The same calls again and again, always to the end of the round; how many there were. One that gives no 200 is wrong."""
    until, made = asyncio.get_running_loop().time() + seconds, 0
    while asyncio.get_running_loop().time() < until:
        for path, body in calls:
            status, content = await call(url, path, body)
            made += 1
            if status != 200:
                tally.wrong.append(f"{path} {body}: {status} {content[:300]!r}")
            await asyncio.sleep(pause)
    return made


async def metrics(url: str) -> dict[str, float]:
    """/metrics, by name with labels."""
    _, content = await call(url, "/metrics")
    return {name: float(value) for name, value in re.findall(r"^(graftwork_\S+(?: \S+)*?) (\S+)$", content.decode(), re.M)}
