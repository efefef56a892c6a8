"""The adapters a server offers: subfolders of one folder (adapters or run folders), and what was loaded or unloaded while it ran.

What changes at run time is written into `.graftwork-adapters.json` beside the subfolders, so that a restart offers the same
names: {"adapters": {name: folder, or null for a subfolder that was unloaded}}. A request is tied to the content that its name
stood for when it came (`pin`): it keeps it when the adapter is replaced or unloaded before it has ended. Files that were
replaced on disk are noticed by their time and size at the next request.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ...adapters.graft import NAME
from ...artifact import CARD, TENSORS
from ...errors import ArtifactError, GraftworkError, UsageError
from ...files import atomic_write_text
from ..engine.adapters import PEFT_CARD, PEFT_TENSORS, AdapterFolder, Host, content_digest, refuse_links
from .errors import UnknownAdapter

BOOK = ".graftwork-adapters.json"
PINNED = "="  # no name begins with it


class Catalog(AdapterFolder):
    """base: the base model's name, which no adapter may have. roots: folders beside `root` that adapters may be loaded from.

    `names`, `folder` and `allowed` may be used by any thread, all else by the engine's."""

    def __init__(self, model: nn.Module, root: str | Path, *, base: str, roots: Sequence[str | Path] = (), host_bytes: int = 1 << 30):
        super().__init__(model, root, host_bytes=host_bytes)
        self.base = base
        self.roots = [self.root, *(Path(each).resolve() for each in roots)]
        self.book = self.root / BOOK
        self.entries: dict[str, str | None] = self._read_book()
        self._stamps: dict[str, tuple] = {}

    # -- which there are ----------------------------------------------------------------------------------------------------------
    def names(self) -> list[str]:
        found = {name for name in super().names() if self.entries.get(name, "") is not None}
        return sorted((found | {name for name, where in self.entries.items() if where is not None}) - {self.base})

    def folder(self, name: str) -> Path:
        """Where an adapter lies. Raises UnknownAdapter, and ArtifactError for one whose files are links."""
        path = None
        if NAME.fullmatch(name) and name != self.base:
            where = self.entries.get(name, name)
            path = None if where is None else self.root / where
        if path is None or path.is_symlink() or not path.is_dir():
            raise UnknownAdapter(f"there is no adapter '{name[:200]}'", remedy="GET /v1/models lists them")
        inner = path / "graft"  # of a run folder
        if not (path / CARD).exists() and (inner / CARD).is_file() and not inner.is_symlink():
            path = inner
        return refuse_links(name, path)

    def allowed(self, text: str) -> Path:
        """The folder that a client named, absolute or inside the folder of adapters. Raises UsageError for one outside of the
        allowed roots, links followed, and for one that is not there."""
        try:
            path = (self.root / text).resolve()
            inside = any(path != root and path.is_relative_to(root) for root in self.roots)
            there = inside and path.is_dir()
        except (OSError, ValueError, RuntimeError):  # too long, a zero byte, links in a circle
            inside = there = False
        if not inside:
            raise UsageError("lora_path does not lie in a folder that adapters may be loaded from",
                             remedy="name a folder inside --adapters, or start the server with --allow-path")
        if not there:
            raise UsageError(f"there is no folder {text}", remedy="name a folder written by graft.save or PEFT")
        return path

    # -- changes ------------------------------------------------------------------------------------------------------------------
    def put(self, name: str, path: Path, check: Callable[[str], None]) -> None:
        """A name stands for the adapter in this folder from now on. check(digest) tries it; where it raises, nothing changes."""
        if not NAME.fullmatch(name) or name == self.base:
            raise UsageError(f"'{name[:200]}' is no name for an adapter",
                             remedy="letters, digits, '_', '-', '@', at most 128, beginning with a letter or digit, not the base's name")
        entries, digest = dict(self.entries), self._digests.pop(name, None)
        changed = {key: where for key, where in entries.items() if key != name}
        if path != self.root / name:
            changed[name] = str(path)
        try:
            self.entries = changed
            check(self.digest(name))
            self._write_book()
        except BaseException:
            self.entries = entries
            self._digests.pop(name, None)
            if digest is not None:
                self._digests[name] = digest
            raise

    def remove(self, name: str) -> None:
        """A name stands for nothing from now on; its files stay. Raises UnknownAdapter."""
        self.folder(name)
        entries = self.entries
        changed = {key: where for key, where in entries.items() if key != name}
        if (self.root / name).is_dir():
            changed[name] = None
        try:
            self.entries = changed
            self._write_book()
        except BaseException:
            self.entries = entries
            raise
        self._digests.pop(name, None)
        self._stamps.pop(name, None)

    def _read_book(self) -> dict[str, str | None]:
        if not self.book.is_file():
            return {}
        try:
            found = json.loads(self.book.read_text())["adapters"]
            ours = all(NAME.fullmatch(name) and (where is None or isinstance(where, str)) for name, where in found.items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            ours = False
        if not ours:
            raise ArtifactError(f"{self.book} is damaged", remedy="delete it: all subfolders are offered then")
        kept = {name: where for name, where in found.items()
                if where is None or any(Path(where).resolve().is_relative_to(root) for root in self.roots)}
        return kept

    def _write_book(self) -> None:
        atomic_write_text(self.book, json.dumps({"adapters": self.entries}, indent=1, sort_keys=True) + "\n")

    # -- what the engine asks -----------------------------------------------------------------------------------------------------
    def pin(self, name: str) -> str:
        """What to ask the engine for: the content that the name stands for now."""
        folder = self.folder(name)
        stamp = (str(folder), *_stamps(folder))
        if self._stamps.get(name) != stamp:
            self.refresh(name)
        digest = self.digest(name)
        self._stamps[name], self._folders[digest] = stamp, folder  # where this content lies for certain
        return PINNED + digest

    def names_of(self, digests: Container[str]) -> dict[str, list[str]]:
        """{digest: the names that stand for it, of those that were asked for}."""
        found: dict[str, list[str]] = {}
        for name, digest in self._digests.items():
            if digest in digests:
                found.setdefault(digest, []).append(name)
        return found

    def digest(self, name: str) -> str:
        if name.startswith(PINNED):
            return name.removeprefix(PINNED)
        with _foreign(name):
            return super().digest(name)

    def host(self, digest: str) -> Host:
        if digest in self.hosts:
            return super().host(digest)
        # several names may stand for the same content, and one of the copies may be damaged
        places = [self._folders[digest], *(Path(stamp[0]) for name, stamp in self._stamps.items() if self._digests.get(name) == digest)]
        problem: ArtifactError | None = None
        for folder in dict.fromkeys(places):
            try:
                with _foreign(folder.name):
                    if not folder.is_dir() or content_digest(folder) != digest:
                        raise ArtifactError(f"the adapter in {folder} was replaced or deleted while a request waited for it",
                                            remedy="send the request again")
                    self._folders[digest] = folder
                    return super().host(digest)
            except ArtifactError as error:
                problem = problem or error
        assert problem is not None
        raise problem

    def load(self, digest: str, place: Callable[[int, Sequence[int], torch.dtype], Tensor]) -> tuple[str, Callable[[], None]]:
        with _foreign(self._folders[digest].name):
            return super().load(digest, place)


class _foreign:
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


def _stamps(folder: Path) -> list[tuple[int, int, int]]:
    found = []
    for file in (CARD, TENSORS, PEFT_CARD, PEFT_TENSORS):
        try:
            seen = (folder / file).stat()
            found.append((seen.st_ino, seen.st_mtime_ns, seen.st_size))
        except OSError:
            found.append((0, 0, 0))
    return found
