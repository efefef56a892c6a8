"""The cache: converted models, digests and other things that can be made again. `graft doctor` shows and empties it.

Place: `GRAFTWORK_CACHE`, else `$XDG_CACHE_HOME/graftwork`, else `~/.cache/graftwork`. Each kind of content has a folder
with a marker file; only marked folders are ever listed or emptied, so pointing the variable at a home folder is safe.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .errors import GraftworkError
from .files import FileLock, atomic_write_text, disk_errors, folder_bytes, process_alive, remove_path, safe_name, sweep

_MARKER = ".graftwork-cache"


class Entry(NamedTuple):
    """One thing in the cache: `kind/name`, its bytes, its path."""

    name: str
    bytes: int
    path: Path


def cache_dir() -> Path:
    """The cache folder (absolute; it need not exist yet)."""
    chosen = os.environ.get("GRAFTWORK_CACHE")
    if chosen:
        return Path(os.path.abspath(Path(chosen).expanduser()))
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base and os.path.isabs(base) else Path.home() / ".cache") / "graftwork"


def cache_folder(kind: str) -> Path:
    """The folder of one kind of content, made if needed. Raises GraftworkError when it cannot be written."""
    folder = cache_dir() / safe_name(kind, "cache folder")
    with disk_errors(folder, remedy="set GRAFTWORK_CACHE to a folder you may write to"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _MARKER).touch()
        tag = cache_dir() / "CACHEDIR.TAG"  # backup tools skip folders that carry it (bford.info/cachedir)
        if not tag.exists():
            atomic_write_text(tag, "Signature: 8a477f597d28d172789f06886806bc55\n# made by graftwork\n")
    return folder


def entry_lock(path: Path, timeout: float | None = None) -> FileLock:
    """The lock under which the cache entry at `path` is written or deleted."""
    return FileLock(path.with_name(f".{path.name}.lock"), timeout=timeout, what=f"cache entry {path.name}")


def _kinds() -> list[Path]:
    root = cache_dir()
    return sorted(k for k in root.iterdir() if (k / _MARKER).is_file()) if root.is_dir() else []


def entries() -> list[Entry]:
    """What the cache holds, largest first."""
    found = [Entry(f"{kind.name}/{child.name}", folder_bytes(child), child)
             for kind in _kinds() for child in kind.iterdir() if not child.name.startswith(".")]
    return sorted(found, key=lambda e: (-e.bytes, e.name))


def clean() -> int:
    """Deletes all entries and what killed processes left; an entry being written now stays. Returns the bytes freed."""
    freed = 0
    with disk_errors(cache_dir()):
        for entry in entries():
            try:
                with entry_lock(entry.path, timeout=0.0):
                    remove_path(entry.path)
            except GraftworkError:
                continue
            freed += entry.bytes if not entry.path.exists() else 0
        for kind in _kinds():
            freed += clean_hidden(kind)
    return freed


def clean_hidden(kind: Path) -> int:
    """Deletes what killed processes left in the folder of one kind; the bytes freed."""
    before = folder_bytes(kind)
    for child in list(kind.iterdir()):
        if child.suffix == ".tmp":  # .NAME.HOST-PID-TOKEN.tmp
            sweep(kind / child.name[1:].rsplit(".", 2)[0])
        elif child.suffix == ".lock":
            pid = FileLock(child).holder()
            if pid is None or not process_alive(pid):
                child.unlink(missing_ok=True)
    return max(0, before - folder_bytes(kind))


def remember(kind: str, key: str, compute: Callable[[], Any]) -> Any:
    """A JSON value computed once per `key` and kept in the cache; a cache that cannot be written only costs the time."""
    name = hashlib.sha256(key.encode()).hexdigest()[:32] + ".json"
    try:
        return json.loads((cache_dir() / kind / name).read_text())["value"]
    except (OSError, ValueError, KeyError, TypeError):
        value = compute()
    try:
        atomic_write_text(cache_folder(kind) / name, json.dumps({"key": key, "value": value}))
    except GraftworkError:
        pass
    return value


def file_stamp(path: str | Path) -> list:
    """What changes when a file does: resolved path, size, modification time in ns."""
    path = Path(path).resolve()
    stat = path.stat()
    return [str(path), stat.st_size, stat.st_mtime_ns]


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's content (hex), remembered by path, size and modification time."""

    def compute() -> str:
        with open(path, "rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()

    return remember("digests", json.dumps(file_stamp(path)), compute)
