"""What the name of an adapter stands for at one moment, and whose fault it is when that cannot be read."""

from __future__ import annotations

import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ...artifact import CARD
from ...errors import ArtifactError, GraftworkError
from ..engine.hosts import FILES, link_error
from ..sources import Reference
from .errors import UnknownAdapter

PINNED = "="  # before a digest, in place of a name; no name begins with it


@dataclass(frozen=True)
class Target:
    """What a name stood for when it was looked up: a folder whose files had these times and sizes, or a reference to a URL."""

    place: Path | Reference
    stamps: tuple[tuple[int, int, int], ...] = ()
    name: str = field(default="", compare=False)  # for messages


class Names:
    """Which names stand for which targets, of those that were asked for; at most `most`, the oldest are forgotten. For any thread."""

    def __init__(self, most: int):
        self.most = most
        self._lock = threading.Lock()
        self._targets: OrderedDict[str, Target] = OrderedDict()
        self._names: dict[Target, dict[str, None]] = {}

    def put(self, name: str, target: Target | None) -> None:
        """The name stands for this target from now on, or for nothing that is known."""
        with self._lock:
            before = self._targets.get(name)
            if before == target:
                return
            if before is not None:
                self._drop(name)
            if target is not None:
                self._targets[name] = target
                self._names.setdefault(target, {})[name] = None
                if len(self._targets) > self.most:
                    self._drop(next(iter(self._targets)))

    def of(self, targets: Iterable[Target]) -> list[str]:
        with self._lock:
            return [name for target in targets for name in self._names.get(target, ())]

    def _drop(self, name: str) -> None:
        target = self._targets.pop(name)
        del self._names[target][name]
        if not self._names[target]:
            del self._names[target]


class Foreigner:
    """Whatever a folder from elsewhere makes go wrong is the adapter's fault, and fails its requests only."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> None:
        if not isinstance(error, Exception) or isinstance(error, (ArtifactError, UnknownAdapter)):
            return
        if isinstance(error, GraftworkError):
            raise ArtifactError(f"adapter '{self.name}': {error.message}", remedy=error.remedy) from error
        raise ArtifactError(f"adapter '{self.name}' cannot be read: {type(error).__name__}: {str(error)[:300]}",
                            remedy="save it again") from error


def adapter_in(path: Path) -> Path:
    """The adapter of a run folder, or the folder itself."""
    inner = path / "graft"
    return inner if not (path / CARD).exists() and (inner / CARD).is_file() and not inner.is_symlink() else path


def stamps_of(name: str, folder: Path) -> tuple[tuple[int, int, int], ...]:
    """What changes when one of an adapter's files is replaced: inode, time and size of each, 0 where there is none. One look at each, as
    every request asks. Raises ArtifactError where one is a link."""
    found = []
    for file in (file for pair in FILES for file in pair):
        try:
            seen = os.lstat(f"{folder}/{file}")
        except OSError:
            found.append((0, 0, 0))
            continue
        if stat.S_ISLNK(seen.st_mode):
            raise link_error(name, file)
        found.append((seen.st_ino, seen.st_mtime_ns, seen.st_size))
    return tuple(found)
