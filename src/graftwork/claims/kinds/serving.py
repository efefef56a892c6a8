"""Throughput, latency and quality of a cache, by a function of the claim, once a seed; both sides run in the same function."""

from __future__ import annotations

from .base import Kind as Base


class Kind(Base):
    reduces = True
    about = "throughput, latency or cache quality, both sides in the same function"
