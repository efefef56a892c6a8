"""Adapters in host memory: read from a folder in one look, known by their content, least recently used out first.

What `read_adapter` returns is what its digest is of: every file is opened once, so a folder that is replaced meanwhile gives its
old content, its new content, or an error, and never new tensors under an old digest. It needs no model and no lock, so it may run
in any thread; PEFT's folders come as they are (`Foreign`) and become artifacts where the model is at hand.
"""

from __future__ import annotations

import hashlib
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ...artifact import CARD, TENSORS, read_card, read_tensors, seal
from ...errors import ArtifactError

PEFT_CARD, PEFT_TENSORS = "adapter_config.json", "adapter_model.safetensors"
#: the files of an adapter, ours and PEFT's: (card, tensors)
FILES = ((CARD, TENSORS), (PEFT_CARD, PEFT_TENSORS))
DIGITS = 32  # of a digest


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


@dataclass(eq=False)
class Host:
    """The card and the tensors of an artifact."""

    card: dict[str, Any]
    tensors: dict[str, Tensor]
    folder: Path
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.nbytes = _bytes(self.tensors)


@dataclass(eq=False)
class Foreign:
    """A PEFT folder (files: interchange.peft.PeftFiles) that no model has seen yet."""

    files: Any
    folder: Path
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.nbytes = _bytes(self.files.tensors)


def content_digest(path: Path) -> str:
    """Of what a folder's adapter computes. Raises ArtifactError for a folder without an adapter."""
    if (path / CARD).is_file():
        return _card_digest(read_card(path))
    _needs_peft(path)
    return hashlib.sha256((path / PEFT_CARD).read_bytes() + (path / PEFT_TENSORS).read_bytes()).hexdigest()[:DIGITS]


def read_adapter(path: Path) -> tuple[str, Host | Foreign]:
    """(digest, content) of the adapter in a folder. Raises ArtifactError for one that is damaged or not there."""
    if (path / CARD).is_file():
        card = read_card(path)
        return _card_digest(card), Host(card, read_tensors(path, card), path)
    _needs_peft(path)
    from ...interchange.peft import read_peft

    files = read_peft(path)
    return files.sha256[:DIGITS], Foreign(files, path)


def refuse_links(name: str, path: Path) -> Path:
    """The folder itself. Raises ArtifactError where one of its files is a link, which could lead anywhere."""
    for file in (file for pair in FILES for file in pair):
        if (path / file).is_symlink():
            raise link_error(name, file)
    return path


def link_error(name: str, file: str) -> ArtifactError:
    return ArtifactError(f"adapter '{name}': {file} is a link", remedy="put the file itself there")


def _card_digest(card: dict[str, Any]) -> str:
    return hashlib.sha256(f"{seal(card)}/{card['sha256']}".encode()).hexdigest()[:DIGITS]


def _needs_peft(path: Path) -> None:
    if not ((path / PEFT_CARD).is_file() and (path / PEFT_TENSORS).is_file()):
        raise ArtifactError(f"adapter '{path.name}' has neither {CARD} nor {PEFT_CARD} with {PEFT_TENSORS}",
                            remedy="put a folder written by graft.save or PEFT there")


class Hosts:
    """At most `limit` bytes, but for the one that came last and those that are held for somebody. May be used by any thread."""

    def __init__(self, limit: int):
        self.limit = limit
        self.bytes = self.held = 0  # all of them; of those, held
        self._found: OrderedDict[str, Host | Foreign] = OrderedDict()  # by digest, least recently used first
        self._holds: Counter[str] = Counter()
        self._lock = threading.Lock()

    def get(self, digest: str) -> Host | Foreign | None:
        with self._lock:
            if digest in self._found:
                self._found.move_to_end(digest)
            return self._found.get(digest)

    def put(self, digest: str, content: Host | Foreign, *, hold: bool = False) -> None:
        """Keep an adapter, in place of what is there under its digest; others have to go. hold: as `hold` does, before anything can."""
        with self._lock:
            self._drop(digest)
            self._found[digest] = content
            self.bytes += content.nbytes
            if hold:
                self._holds[digest] += 1
            self.held += content.nbytes if self._holds[digest] else 0
            self._make_room(digest)

    def hold(self, digest: str) -> bool:
        """Keep it until it is let go as often as it was held; False when it is not there."""
        with self._lock:
            if digest not in self._found:
                return False
            self._found.move_to_end(digest)
            self.held += 0 if self._holds[digest] else self._found[digest].nbytes
            self._holds[digest] += 1
            return True

    def let_go(self, digest: str) -> None:
        with self._lock:
            self._holds[digest] -= 1
            if not self._holds[digest]:
                del self._holds[digest]
                self.held -= self._found[digest].nbytes if digest in self._found else 0
                self._make_room(next(reversed(self._found), None))

    def clear(self) -> None:
        """Give up all that nobody holds."""
        with self._lock:
            for digest in [digest for digest in self._found if not self._holds[digest]]:
                self._drop(digest)

    def values(self) -> list[Host | Foreign]:
        with self._lock:
            return list(self._found.values())

    def __contains__(self, digest: object) -> bool:
        return digest in self._found

    def __len__(self) -> int:
        return len(self._found)

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._found))

    def _drop(self, digest: str) -> None:
        content = self._found.pop(digest, None)
        if content is not None:
            self.bytes -= content.nbytes
            self.held -= content.nbytes if self._holds[digest] else 0

    def _make_room(self, newest: str | None) -> None:
        if self.bytes <= self.limit:
            return
        for digest in [digest for digest in self._found if digest != newest and not self._holds[digest]]:
            self._drop(digest)
            if self.bytes <= self.limit:
                return
