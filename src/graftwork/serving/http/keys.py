"""API keys: a file with one JSON object a line.

    {"name": "alice", "sha256": "<hex SHA-256 of the key>", "adapters": ["team-*"], "requests_per_minute": 60, "manage": false}

adapters: patterns of names that the key may use, the base's name among them (default: all). manage: may load and unload
adapters. Only hashes are kept, and they are compared in constant time.
"""

from __future__ import annotations

import fnmatch
import hashlib
import hmac
import json
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import DataError
from .errors import ApiError

FIELDS = {"name", "sha256", "adapters", "requests_per_minute", "manage"}


@dataclass
class Key:
    name: str
    digest: bytes
    adapters: tuple[str, ...] = ("*",)
    requests_per_minute: int | None = None
    manage: bool = False
    seen: deque[float] = field(default_factory=deque, repr=False)

    def may_use(self, model: str) -> bool:
        return any(fnmatch.fnmatchcase(model, pattern) for pattern in self.adapters)

    def count(self, now: float) -> None:
        """One more request. Raises ApiError 429 when there were too many in the last minute."""
        if self.requests_per_minute is None:
            return
        while self.seen and self.seen[0] <= now - 60:
            self.seen.popleft()
        if len(self.seen) >= self.requests_per_minute:
            wait = max(1, int(self.seen[0] + 60 - now) + 1)
            raise ApiError(429, f"this key may send {self.requests_per_minute} requests a minute", code="rate_limit_exceeded",
                           headers={"retry-after": str(wait)})
        self.seen.append(now)


class Keys:
    """Every key that the server accepts."""

    def __init__(self, keys: list[Key], clock: Callable[[], float] = time.monotonic):
        self.keys, self.clock = keys, clock

    def find(self, authorization: str | None) -> Key:
        """The key of an `Authorization: Bearer ...` header. Raises ApiError 401."""
        scheme, _, secret = (authorization or "").partition(" ")
        given = hashlib.sha256(secret.strip().encode()).digest()
        found = None
        for key in self.keys:  # all of them, whatever was found, so that the time says nothing
            if hmac.compare_digest(key.digest, given):
                found = key
        if found is None or scheme.lower() != "bearer":
            raise ApiError(401, "no valid API key was given; send the header 'Authorization: Bearer KEY'", code="invalid_api_key",
                           headers={"www-authenticate": "Bearer"})
        return found


def read_keys(path: str | Path) -> Keys:
    """Raises DataError with file and line."""
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {error}", remedy="name a file with one JSON object a line") from None
    keys = [_key(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not keys:
        raise DataError(f"{path}: no keys", remedy='write {"name": "alice", "sha256": "..."}')
    for what in ("name", "digest"):
        values = [getattr(key, what) for key in keys]
        if len(set(values)) < len(values):
            raise DataError(f"{path}: two keys have the same {what}", remedy="one line a key")
    return Keys(keys)


def _key(line: str, where: str) -> Key:
    remedy = ('{"name": "alice", "sha256": "64 hex digits", "adapters": ["team-*"], "requests_per_minute": 60, "manage": false}; '
              "the hash: printf %s KEY | sha256sum")
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: {error}", remedy=remedy) from None
    if not isinstance(row, dict) or row.keys() - FIELDS:
        unknown = sorted(row.keys() - FIELDS) if isinstance(row, dict) else []
        raise DataError(f"{where}: " + (f"unknown field '{unknown[0]}'" if unknown else "this is no object"), remedy=remedy)
    name, digest, rate = row.get("name"), row.get("sha256"), row.get("requests_per_minute")
    patterns, manage = row.get("adapters", ["*"]), row.get("manage", False)
    wrong = [text for bad, text in [
        (not isinstance(name, str) or not name, "'name' is missing"),
        (not isinstance(digest, str) or len(digest) != 64 or not set(digest.lower()) <= set("0123456789abcdef"),
         "'sha256' is not 64 hex digits"),
        (not isinstance(patterns, list) or not all(isinstance(p, str) for p in patterns), "'adapters' is no list of patterns"),
        (rate is not None and (not isinstance(rate, int) or isinstance(rate, bool) or rate < 1),
         "'requests_per_minute' is no positive whole number"),
        (not isinstance(manage, bool), "'manage' is neither true nor false")] if bad]
    if wrong:
        raise DataError(f"{where}: {'; '.join(wrong)}", remedy=remedy)
    return Key(name, bytes.fromhex(digest), tuple(patterns), rate, manage)
