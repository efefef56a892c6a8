"""The book of a folder of adapters: which names stand for what, for all servers on the folder and for the next start.

    .graftwork-adapters.json  {"adapters": {name: folder | {"url", "sha256"} | null}, "aliases": {name: name}}

null: a subfolder that was unloaded. Subfolders that the book does not name stand for themselves. Readers look at the file's
time, inode and size and read it again when one of them is new; a writer takes a lock, reads what is there, changes it and renames
a new file into place. So no server loses what another wrote, and nobody sees half a book.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..adapters.graft import NAME
from ..errors import ArtifactError
from ..files import FileLock, atomic_write_text
from .sources import SUM, Reference

BOOK = ".graftwork-adapters.json"
WAIT = 30.0  # seconds for another server's change
log = logging.getLogger("graftwork.serve")

#: what a name stands for: a folder (relative to the root, or absolute), a URL, or nothing
Where = str | Reference | None


@dataclass(frozen=True)
class State:
    """What the book says. aliases: name -> name of an adapter."""

    adapters: Mapping[str, Where] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)

    def with_adapter(self, name: str, where: Where) -> State:
        return State({**self.adapters, name: where}, self.aliases)

    def without_adapter(self, name: str) -> State:
        return State({key: where for key, where in self.adapters.items() if key != name}, self.aliases)

    def with_alias(self, name: str, target: str | None) -> State:
        """target None: the alias goes."""
        kept = {key: to for key, to in self.aliases.items() if key != name}
        return State(self.adapters, kept if target is None else {**kept, name: target})


class Book:
    """path: of the file, which need not be there. May be used by any thread and process. Raises ArtifactError for a damaged file."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()
        self._seen: tuple[tuple[int, int, int] | None, State] = (None, State())
        self._damaged: tuple[int, int, int] | None = None
        self.reads = 0
        self._look()

    def read(self) -> State:
        """What it says now. A file that somebody damaged while the server ran changes nothing, and is logged once."""
        stamp = self._stamp()
        if stamp == self._seen[0] or (stamp is not None and stamp == self._damaged):
            return self._seen[1]
        with self._lock:
            try:
                self._look()
            except ArtifactError as error:
                if stamp != self._damaged:
                    log.error("%s; what it said before stays", error.message)
                self._damaged = stamp
            return self._seen[1]

    def change(self, edit: Callable[[State], State]) -> State:
        """edit(what it says) becomes what it says, and nobody else changes it meanwhile; where edit raises, nothing changes. Raises
        GraftworkError when another server holds the lock for too long or the disk is full."""
        with FileLock(self.path.with_name(f"{BOOK}.lock"), timeout=WAIT, what="the book of adapters"):
            with self._lock:
                self._look()
                stamp, before = self._seen
                after = edit(before)
                if after == before:
                    return before
                atomic_write_text(self.path, _text(after))
                # a stamp that was there before would hide the change from those who saw it then
                later = max(time.time_ns(), stamp[1] + 1 if stamp else 0)
                os.utime(self.path, ns=(later, later))
                self._look()
                return self._seen[1]

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            return _stamp_of(os.stat(self.path))
        except OSError:
            return None

    def _look(self) -> None:
        """Read the file if it is another one than last time."""
        try:
            with open(self.path, encoding="utf-8") as file:
                stamp = _stamp_of(os.fstat(file.fileno()))  # of what is read, whatever has the name by then
                if stamp == self._seen[0]:
                    return
                self.reads += 1
                self._seen = (stamp, _state(json.load(file)))
        except FileNotFoundError:
            self._seen = (None, State())
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ArtifactError(f"{self.path} is damaged", remedy="delete it: all subfolders are offered then") from None


def _stamp_of(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_ino, found.st_mtime_ns, found.st_size


def _state(document: dict[str, Any]) -> State:
    """Raises ValueError and its like for what is no book."""
    adapters = {_name(name): _where(where) for name, where in document["adapters"].items()}
    return State(adapters, {_name(name): _name(target) for name, target in document.get("aliases", {}).items()})


def _name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise ValueError(name)
    return name


def _where(found: Any) -> Where:
    if isinstance(found, dict):
        if not SUM.fullmatch(found["sha256"]) or not isinstance(found["url"], str):
            raise ValueError(found)
        return Reference(found["url"], found["sha256"])
    if found is not None and not isinstance(found, str):
        raise ValueError(found)
    return found


def _text(state: State) -> str:
    adapters = {name: {"url": where.url, "sha256": where.sha256} if isinstance(where, Reference) else where
                for name, where in state.adapters.items()}
    return json.dumps({"adapters": adapters, "aliases": dict(state.aliases)}, indent=1, sort_keys=True) + "\n"
