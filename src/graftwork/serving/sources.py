"""Adapters from URLs: below prefixes that the operator allowed, by their content, through a cache on disk.

A URL is read only where `Sources` has a prefix for it; without prefixes nothing is ever opened. What a URL gave is known by the
SHA-256 of its two files, the card first (`cat graft.json graft.safetensors | sha256sum`): a reference that names the sum
(`URL#sha256=...`) takes nothing else, and one that does not gets it when it is read for the first time. So a URL whose content
changes is refused, and one that is gone is served as long as the cache has its content.

    cache/adapters/<sha256>/graft.json + graft.safetensors, or adapter_config.json + adapter_model.safetensors

Only these files are asked for; whatever else lies there is never listed or opened. The cache may be shared by several servers.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..cache import cache_folder, clean_hidden, entry_lock
from ..errors import ArtifactError, GraftworkError, UsageError
from ..files import atomic_folder, disk_errors, folder_bytes, remove_path
from .engine.hosts import FILES

KIND = "adapters"  # of the cache
CHUNK = 1 << 20
CARD_BYTES = 64 << 20  # of a card
LOCAL = ("file", "local")  # schemes of this machine's disks
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
SUM = re.compile(r"[0-9a-f]{64}")
#: escapes of . / \ and NUL, and what fsspec takes for a chain of file systems
HIDDEN = re.compile(r"%(2e|2f|5c|00)|::|[\x00-\x20\x7f\\]", re.IGNORECASE)
#: what file systems are asked to do: a redirect leads out of what was allowed
OPTIONS: dict[str, dict[str, Any]] = {scheme: {"allow_redirects": False} for scheme in ("http", "https")}


@dataclass(frozen=True)
class Reference:
    """An adapter at a URL. sha256: of its two files; None: not known yet."""

    url: str
    sha256: str | None = None

    def __str__(self) -> str:
        return self.url if self.sha256 is None else f"{self.url}#sha256={self.sha256}"


def is_url(text: str) -> bool:
    return SCHEME.match(text) is not None


def parse(text: str) -> Reference:
    """A URL with or without `#sha256=`, its path without '.' and '..'. Raises UsageError."""
    found = SCHEME.match(text)
    url, hashed, fragment = text.partition("#")
    sha256 = fragment.removeprefix("sha256=").lower() if hashed else None
    problem = None
    if found is None:
        problem = "it does not begin with a scheme such as https://"
    elif HIDDEN.search(url) or "?" in url:
        problem = "it has a query, a space, a backslash, '::', or an escaped dot or slash"
    elif hashed and (not fragment.startswith("sha256=") or not SUM.fullmatch(sha256)):
        problem = "behind # stands sha256= and 64 hex digits"
    elif "@" in urlsplit(url).netloc:
        problem = "it names a user"
    elif found[1].lower() in LOCAL and not url[found.end():].startswith("/"):
        problem = "a file's URL has three slashes: file:///folder"
    if problem is not None:
        raise UsageError(f"{text[:300]!r} is no URL of an adapter: {problem}", remedy="for example s3://bucket/adapters/dates#sha256=...")
    path = posixpath.normpath("/" + url[found.end():]).lstrip("/")
    return Reference(f"{found[1].lower()}://{'/' if found[1].lower() in LOCAL else ''}{path}", sha256)


class Sources:
    """prefixes: URLs below which adapters may be read. disk_bytes: of the cache; what was used last stays. largest: bytes of one
    adapter (default: disk_bytes). Raises UsageError for a prefix that cannot be read on this machine. `reads` counts files that were
    opened at a URL. May be used by any thread."""

    def __init__(self, prefixes: Sequence[str], *, disk_bytes: int = 20 << 30, largest: int | None = None):
        urls = [parse(prefix).url for prefix in prefixes]
        self.prefixes = [url if url.endswith("/") else url + "/" for url in urls]
        self.disk_bytes, self.largest, self.reads = disk_bytes, min(largest or disk_bytes, disk_bytes), 0
        for prefix in self.prefixes:
            _system(prefix)

    def allows(self, reference: Reference) -> bool:
        return any(reference.url.startswith(prefix) for prefix in self.prefixes)

    def reference(self, text: str) -> Reference:
        """What a client named. Raises UsageError for what is no URL or lies below no prefix."""
        found = parse(text)
        if not self.allows(found):
            raise UsageError("lora_path does not lie below a URL that adapters may be read from",
                             remedy="the server allows URLs with --allow-source")
        return found

    def fetch(self, reference: Reference) -> tuple[Path, Reference]:
        """The folder that holds the adapter, and the reference with its sum. Blocks. Raises ArtifactError for what cannot be read, is
        too large, or is not what the sum is of, and UsageError for a URL below no prefix."""
        if reference.sha256 is not None:
            folder = self._cached(reference.sha256)
            if folder is not None:
                return folder, reference
        if not self.allows(reference):
            raise UsageError(f"{reference.url} does not lie below a URL that adapters may be read from", remedy="--allow-source")
        place = cache_folder(KIND)
        new = place / f"new-{os.urandom(8).hex()}"
        try:
            with atomic_folder(new) as work:
                found = self._download(reference.url, work)
                if reference.sha256 not in (None, found):
                    raise ArtifactError(f"{reference.url} holds another adapter now: its SHA-256 is {found}, not {reference.sha256}",
                                        remedy="load it under a new version, with load_inplace, or put the old files back")
            folder = place / found
            _settle(new, folder)
        finally:
            remove_path(new)
        self._make_room(folder)
        return folder, Reference(reference.url, found)

    # -- inside -------------------------------------------------------------------------------------------------------------------
    def _cached(self, sha256: str) -> Path | None:
        """The folder of this content in the cache, checked; a damaged one is thrown away."""
        folder = cache_folder(KIND) / sha256
        names = next((pair for pair in FILES if all((folder / name).is_file() for name in pair)), None)
        if names is None:
            return None
        try:
            total = hashlib.sha256()
            for name in names:
                with open(folder / name, "rb") as file:
                    while chunk := file.read(CHUNK):
                        total.update(chunk)
            if total.hexdigest() == sha256:
                os.utime(folder)  # used last
                return folder
        except OSError:  # another server made room
            return None
        remove_path(folder)
        return None

    def _download(self, url: str, work: Path) -> str:
        """Both files of an adapter into a folder; their SHA-256."""
        system, base = _system(url)
        forbidden: ArtifactError | None = None
        for card, tensors in FILES:
            total = hashlib.sha256()
            try:
                size = self._copy(system, base, card, work, total, CARD_BYTES)
            except FileNotFoundError:
                continue
            except ArtifactError as error:
                if not isinstance(error.__cause__, PermissionError):  # a bucket's word for a file that is not there
                    raise
                forbidden = error
                continue
            try:
                self._copy(system, base, tensors, work, total, self.largest - size)
            except FileNotFoundError:
                raise ArtifactError(f"{url} has {card} and no {tensors}", remedy="upload both files; pickles are never read") from None
            return total.hexdigest()
        raise forbidden or ArtifactError(f"{url} has neither {' nor '.join(card for card, _ in FILES)}",
                            remedy="name a folder written by graft.save or PEFT")

    def _copy(self, system: Any, base: str, name: str, work: Path, total: Any, limit: int) -> int:
        """Copy one file, `limit` bytes at most; its size. Raises FileNotFoundError, and ArtifactError for all else."""
        where, size = f"{base.rstrip('/')}/{name}", 0
        with disk_errors(work), open(work / name, "wb") as target:
            try:
                self._refuse_links(system, where)
                self.reads += 1
                source = system.open(where, "rb")
            except (FileNotFoundError, GraftworkError):
                (work / name).unlink()
                raise
            except Exception as error:  # whatever a file system's driver raises
                raise _unreadable(where, error) from error
            with source:
                while True:
                    try:
                        chunk = source.read(min(CHUNK, limit - size + 1))
                    except Exception as error:
                        raise _unreadable(where, error) from error
                    if not chunk:
                        return size
                    size += len(chunk)
                    if size > limit:
                        raise ArtifactError(f"{where} is larger than what is left of {self.largest} bytes for an adapter",
                                            remedy="start the server with a larger --disk-cache and --host-memory")
                    total.update(chunk)
                    target.write(chunk)

    def _refuse_links(self, system: Any, where: str) -> None:
        """On this machine's disks a path below a prefix may lead elsewhere."""
        from fsspec.implementations.local import LocalFileSystem

        if not isinstance(system, LocalFileSystem):
            return
        path = Path(where)
        roots = [Path(system._strip_protocol(prefix)) for prefix in self.prefixes if SCHEME.match(prefix)[1] in LOCAL]
        if not any(path.is_relative_to(root) and path.resolve() == root.resolve() / path.relative_to(root) for root in roots):
            raise ArtifactError(f"{where} is a link, or lies behind one", remedy="name the folder itself, without links")
        if path.exists() and not path.is_file():
            raise ArtifactError(f"{where} is no file", remedy="name a folder written by graft.save or PEFT")

    def _make_room(self, newest: Path) -> None:
        """Least recently used first, until the rest fits; what another server writes or deletes just now is left alone."""
        clean_hidden(newest.parent)
        found = []
        for path in newest.parent.iterdir():
            try:
                if not path.name.startswith("."):
                    found.append((path.stat().st_mtime_ns, folder_bytes(path), path))
            except OSError:
                continue
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.disk_bytes:
                return
            if path == newest or not SUM.fullmatch(path.name):  # being fetched
                continue
            try:
                with entry_lock(path, timeout=0.0):
                    remove_path(path)
                total -= size
            except GraftworkError:
                continue


def _system(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the URL as that one names it. Raises UsageError where its driver is missing."""
    import fsspec

    scheme = SCHEME.match(url)[1]
    try:
        system = fsspec.filesystem(scheme, skip_instance_cache=True, **OPTIONS.get(scheme, {}))
    except (ImportError, ValueError) as error:
        raise UsageError(f"{scheme}:// cannot be read on this machine: {error}",
                         remedy="install the driver of fsspec that it names") from None
    return system, system._strip_protocol(url)


def _unreadable(where: str, error: Exception) -> ArtifactError:
    return ArtifactError(f"{where} cannot be read: {type(error).__name__}: {str(error)[:200]}",
                         remedy="try again, or look whether it is there")


def _settle(new: Path, folder: Path) -> None:
    """Rename what was fetched to the name of its content; the same content may be there already."""
    with disk_errors(folder), entry_lock(folder):
        if folder.exists():
            remove_path(folder)
        os.rename(new, folder)
        os.utime(folder)
