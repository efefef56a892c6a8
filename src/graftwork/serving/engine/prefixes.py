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
        self.pages: OrderedDict[bytes, int] = OrderedDict()  # least recently used first
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
        found = []
        for key in self.keys(digest, tokens[:-1]):
            page = self.pages.get(key)
            if page is None:
                break
            self.pages.move_to_end(key)
            found.append(page)
        self.pool.share(found)
        self.asked += len(tokens)
        self.hits += len(found) * self.pool.page_tokens
        return found

    def publish(self, keys: Sequence[bytes], pages: Sequence[int]) -> None:
        """These full pages may be shared from now on; where a key is known already the older page stays."""
        for key, page in zip(keys, pages):
            if key not in self.pages:
                self.pool.share([page])
                self.pages[key] = page

    def idle(self) -> int:
        """Pages that only the cache uses."""
        return int((self.pool.users[np.fromiter(self.pages.values(), dtype=np.int64, count=len(self.pages))] == 1).sum())

    def evict(self, count: int) -> int:
        """Give up at least `count` pages that only the cache uses, oldest first; how many there were."""
        given = 0
        for key, page in list(self.pages.items()):
            if given >= count:
                break
            if self.pool.users[page] == 1:
                del self.pages[key]
                self.pool.give([page])
                given += 1
        return given

    def moved(self, where: dict[int, int]) -> None:
        """Follow pages that were moved inside the pool."""
        for key, page in self.pages.items():
            if page in where:
                self.pages[key] = where[page]

    def clear(self) -> None:
        self.pool.give(list(self.pages.values()))
        self.pages.clear()
