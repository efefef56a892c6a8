"""Prompts that begin alike under the same adapter share the pages of what they have in common.

A full page is known by a hash chain over the tokens before and in it, which starts from the *content* of the adapter that
computed it (the digest of its artifact, empty for the bare base) and never from its name: after a reload under the same name
nothing old can be found. The cache is one more user of a page; pages that nobody else uses are given up, least recently used
first, when memory is asked for.
"""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from .pool import Pool


class Prefixes:
    """The index from (adapter content, tokens) to pages of the pool."""

    def __init__(self, pool: Pool):
        self.pool = pool
        self.pages: OrderedDict[bytes, int] = OrderedDict()  # least recently used first, of one prompt its end before its beginning
        self.known = np.zeros(pool.pages, dtype=bool)  # by page: whether it is in `pages`
        self.hits = self.asked = 0  # tokens

    def keys(self, digest: str, tokens: Sequence[int], known: Sequence[bytes] = ()) -> list[bytes]:
        """The key of every full page of `tokens`; known: those of its first pages."""
        size, keys = self.pool.page_tokens, list(known)
        for first in range(len(keys) * size, len(tokens) - size + 1, size):
            before = keys[-1] if keys else digest.encode()
            keys.append(hashlib.blake2b(before + b"/" + struct.pack(f"<{size}q", *tokens[first: first + size]), digest_size=16).digest())
        return keys

    def adopt(self, digest: str, tokens: Sequence[int]) -> list[int]:
        """Pages, one more user each, that hold the longest known beginning of `tokens`, its last token aside."""
        found, keys = [], self.keys(digest, tokens[:-1])
        for key in keys:
            page = self.pages.get(key)
            if page is None:
                break
            found.append(page)
        self._used(keys[: len(found)])
        self.pool.share(found)
        self.asked += len(tokens)
        self.hits += len(found) * self.pool.page_tokens
        return found

    def publish(self, keys: Sequence[bytes], pages: Sequence[int]) -> None:
        """The first full pages of a request may be shared from now on; where a key is known already the older page stays."""
        for key, page in zip(keys, pages):
            if key not in self.pages:
                self.pool.share([page])
                self.pages[key], self.known[page] = page, True
        self._used(keys)

    def idle(self) -> int:
        """Pages that only the cache uses."""
        return int(np.count_nonzero(self.pool.users[self.known] == 1))

    def evict(self, count: int) -> int:
        """Give up at least `count` pages that only the cache uses, oldest first; how many there were."""
        given = []
        for key, page in self.pages.items():
            if len(given) >= count:
                break
            if self.pool.users[page] == 1:
                given.append(key)
        for key in given:
            page = self.pages.pop(key)
            self.known[page] = False
            self.pool.give([page])
        return len(given)

    def moved(self, where: dict[int, int]) -> None:
        """Follow pages that were moved inside the pool."""
        for key, page in self.pages.items():
            if page in where:
                self.pages[key] = where[page]
        self.known[:] = False
        self.known[list(self.pages.values())] = True

    def clear(self) -> None:
        self.pool.give(list(self.pages.values()))
        self.pages.clear()
        self.known[:] = False

    def _used(self, keys: Sequence[bytes]) -> None:
        """A prompt's beginning is used last: a page is found only through those before it, so it should not outlive them."""
        for key in reversed(keys):
            self.pages.move_to_end(key)
