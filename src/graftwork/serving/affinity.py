"""Which replica a request goes to: that of its adapter, as long as it has room.

Each pair of adapter and replica has a score, a hash of the two; an adapter's favorite is the replica with the highest (rendezvous
hashing). So every router finds the same favorite without a table, an adapter's pages and prefixes lie in one replica, and a replica that
goes takes only its own adapters with it: all others keep their favorites.

A favorite that has as many requests as fit in its batch would let the next one wait. It then goes to the replica with the fewest, the
next best by score among equals, so that what overflows of one adapter meets there too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping


def ranking(adapter: str, replicas: Iterable[int]) -> list[int]:
    """The replicas by their score for this adapter, its favorite first."""
    def score(replica: int) -> bytes:
        return hashlib.blake2b(f"{replica}/{adapter}".encode("utf-8", "replace"), digest_size=16).digest()

    return sorted(replicas, key=score, reverse=True)


def choose(adapter: str | None, loads: Mapping[int, int], full: int) -> tuple[int, str]:
    """(replica, why): `affinity`, `overflow`, or `least` for a request without adapter. loads: requests that each replica has, of those
    that live (one or more); full: requests from which one more would wait."""
    if adapter is None:
        return min(loads, key=lambda replica: (loads[replica], replica)), "least"
    order = ranking(adapter, loads)
    best = order[0] if loads[order[0]] < full else min(order, key=loads.__getitem__)
    return best, "affinity" if best == order[0] else "overflow"
