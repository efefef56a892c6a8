"""A folder of saved adapters as the engine's source: indexed by name, read when first asked for, kept on the host by bytes.

Only names are listed at the start. An adapter's content is known by its digest: the sums in graft.json for our artifacts,
SHA-256 of the files for PEFT's. What was read stays in host memory, least recently used out first, so that an adapter that left
the pool comes back without a disk. A name is looked up again only when `refresh` says that it changed.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters.graft import NAME, Graft
from ...artifact import CARD, TENSORS, attach_read, attach_saved, describe, graft_tensors, read_card, read_tensors, seal
from ...errors import ArtifactError, UsageError, nearest
from ...modeling.state import state_of

PEFT_CARD, PEFT_TENSORS = "adapter_config.json", "adapter_model.safetensors"


class Attached:
    """The grafts that are attached to the model already, as a source: nothing of them lies in the pool."""

    def __init__(self, model: nn.Module):
        self.model = model

    def digest(self, name: str) -> str:
        """Changes whenever one of the graft's tensors is replaced or written."""
        grafts = state_of(self.model).grafts
        if name not in grafts:
            raise UsageError(f"no graft named '{name}' is attached{nearest(name, grafts)}",
                             remedy=f"attached: {', '.join(grafts) or 'none'}")
        tensors = grafts[name].named_parameters(trainable=False)
        return f"{name}/{hash(tuple((id(p), p.data_ptr(), p._version) for _, p in tensors)):x}"

    def sizes(self, digest: str) -> list[int]:
        return []

    def load(self, digest: str, place: Callable[[int, Sequence[int], torch.dtype], Tensor]) -> tuple[str, Callable[[], None]]:
        return digest.split("/")[0], lambda: None


def content_digest(path: Path) -> str:
    """Of what a folder's adapter computes. Raises ArtifactError for a folder without an adapter."""
    if (path / CARD).is_file():
        card = read_card(path)
        return hashlib.sha256(f"{seal(card)}/{card['sha256']}".encode()).hexdigest()[:32]
    if (path / PEFT_CARD).is_file() and (path / PEFT_TENSORS).is_file():
        return hashlib.sha256((path / PEFT_CARD).read_bytes() + (path / PEFT_TENSORS).read_bytes()).hexdigest()[:32]
    raise ArtifactError(f"adapter '{path.name}' has neither {CARD} nor {PEFT_CARD} with {PEFT_TENSORS}",
                        remedy="put a folder written by graft.save or PEFT there")


def refuse_links(name: str, path: Path) -> Path:
    """The folder itself. Raises ArtifactError where one of its files is a link, which could lead anywhere."""
    for file in (CARD, TENSORS, PEFT_CARD, PEFT_TENSORS):
        if (path / file).is_symlink():
            raise ArtifactError(f"adapter '{name}': {file} is a link", remedy="put the file itself there")
    return path


@dataclass
class Host:
    """An adapter in host memory: the card and the tensors of an artifact."""

    card: dict[str, Any]
    tensors: dict[str, Tensor]
    folder: Path

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


class AdapterFolder:
    """root: a folder with one adapter a subfolder (ours or PEFT's). host_bytes: of adapters kept in host memory."""

    def __init__(self, model: nn.Module, root: str | Path, *, host_bytes: int = 1 << 30):
        self.model, self.root, self.host_bytes = model, Path(root).resolve(), host_bytes
        if not self.root.is_dir():
            raise UsageError(f"there is no folder {root}", remedy="name a folder whose subfolders are saved adapters")
        self.hosts: OrderedDict[str, Host] = OrderedDict()
        self._digests: dict[str, str] = {}
        self._folders: dict[str, Path] = {}
        self._sizes: dict[str, list[int]] = {}
        self.reads = 0

    def names(self) -> list[str]:
        """Every subfolder with a name that an adapter may have; nothing is read."""
        with os.scandir(self.root) as entries:
            return sorted(e.name for e in entries if NAME.fullmatch(e.name) and e.is_dir(follow_symlinks=False))

    def refresh(self, name: str) -> None:
        """Its files were replaced: requests from now on get the new content."""
        self._digests.pop(name, None)

    def folder(self, name: str) -> Path:
        """Where an adapter lies. Raises UsageError for a name that is none or is not there; links out of the root are refused."""
        path = self.root / name
        if not NAME.fullmatch(name) or path.is_symlink() or not path.is_dir():
            raise UsageError(f"there is no adapter '{name}'{nearest(name, self.names())}", remedy="GET /v1/models lists them")
        return refuse_links(name, path)

    # -- what the engine's memory asks ----------------------------------------------------------------------------------------------
    def digest(self, name: str) -> str:
        found = self._digests.get(name)
        if found is None:
            path = self.folder(name)
            found = content_digest(path)
            self._digests[name], self._folders[found] = found, path
        return found

    def sizes(self, digest: str) -> list[int]:
        found = self._sizes.get(digest)
        if found is None:
            tensors = self.host(digest).tensors
            found = self._sizes[digest] = [tensors[key].numel() * tensors[key].element_size() for key in sorted(tensors)]
        return found

    def load(self, digest: str, place: Callable[[int, Sequence[int], torch.dtype], Tensor]) -> tuple[str, Callable[[], None]]:
        host, route = self.host(digest), f"d{digest}"
        graft = attach_read(self.model, host.card, host.tensors, host.folder, name=route)
        try:
            owned = dict(graft.named_parameters(trainable=False))
            with torch.no_grad():
                for i, key in enumerate(sorted(host.tensors)):
                    if key in owned:  # what a method makes of its tensors when it loads stays where it made it
                        view = place(i, owned[key].shape, owned[key].dtype)
                        view.copy_(owned[key])
                        owned[key].data = view
        except BaseException:
            graft.detach()
            raise
        return route, graft.detach

    # -- host memory ----------------------------------------------------------------------------------------------------------------
    def host(self, digest: str) -> Host:
        """The adapter in host memory, read if it is not there."""
        found = self.hosts.get(digest)
        if found is None:
            found = self.hosts[digest] = self._read(self._folders[digest])
            self.reads += 1
            while len(self.hosts) > 1 and sum(h.nbytes for h in self.hosts.values()) > self.host_bytes:
                self.hosts.popitem(last=False)
        self.hosts.move_to_end(digest)
        return found

    def _read(self, folder: Path) -> Host:
        if (folder / CARD).is_file():
            card = read_card(folder)
            return Host(card, read_tensors(folder, card), folder)
        graft: Graft = attach_saved(self.model, folder, name="reading")
        try:
            tensors, card = graft_tensors(graft), describe(graft)
        finally:
            graft.detach()
        card["tensors"] = {k: [list(t.shape), str(t.dtype).removeprefix("torch.")] for k, t in tensors.items()}
        return Host(card, tensors, folder)
