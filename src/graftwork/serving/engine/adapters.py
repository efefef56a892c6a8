"""A folder of saved adapters as the engine's source: indexed by name, read when first asked for, kept on the host by bytes.

Only names are listed at the start. An adapter's content is known by its digest: the sums in graft.json for our artifacts,
SHA-256 of the files for PEFT's. What was read stays in host memory, least recently used out first, so that an adapter that left
the pool comes back without a disk. A name is looked up again only when `refresh` says that it changed.

A weighted sum of adapters, ((name, weight), ...), is an adapter of its own: its digest names the parts and their weights, its
pages hold the parts one behind the other, and every site adds their changes up. Only additive methods can be in it.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ...adapters.graft import NAME, Graft
from ...adapters.model_scope import PrefixAdapter
from ...adapters.slot import Route
from ...artifact import attach_read, describe, graft_tensors
from ...errors import ArtifactError, IncompatibleError, UsageError, nearest
from ...modeling.state import state_of
from ...registry import MethodInfo, lookup
from .hosts import Foreign, Host, Hosts, content_digest, read_adapter, refuse_links

Parts = tuple[tuple[str, float], ...]
Place = Callable[[int, Sequence[int], torch.dtype], Tensor]
TO_LORA = "convert it to lora (exact, rank 2r): graft convert --to lora"
FACTS = 1 << 16  # adapters of which facts are kept


class Attached:
    """The grafts that are attached to the model already, as a source: nothing of them lies in the pool."""

    def __init__(self, model: nn.Module):
        self.model = model

    def digest(self, name: str | Parts) -> str:
        """Changes whenever one of the graft's tensors is replaced or written."""
        if not isinstance(name, str):
            for part, _ in name:
                self.digest(part)
                graft = state_of(self.model).grafts[part]
                refuse_in_sum(part, why_alone(graft.info, bool(graft.trainable_tokens)))
            return sum_digest([(self.digest(part), weight) for part, weight in name])
        grafts = state_of(self.model).grafts
        if name not in grafts:
            raise UsageError(f"no graft named '{name}' is attached{nearest(name, grafts)}",
                             remedy=f"attached: {', '.join(grafts) or 'none'}")
        if grafts[name].merged:
            raise UsageError(f"graft '{name}' is merged and part of every row", remedy="unmerge it before serving")
        if grafts[name].edited_storage:
            raise IncompatibleError(f"graft '{name}' runs on an edited base that other rows cannot share", remedy=TO_LORA)
        tensors = grafts[name].named_parameters(trainable=False)
        return f"{name}/{hash(tuple((id(p), p.data_ptr(), p._version) for _, p in tensors)):x}"

    def sizes(self, digest: str) -> list[int]:
        return []

    def virtual(self, digest: str, prompt: Sequence[int]) -> tuple[int, ...]:
        if sum_of(digest):
            return ()
        prefix = prefix_of(self.model, digest.split("/")[0])
        return () if prefix is None else virtual_tokens(prefix.length, prefix.reads_prompt, prompt)

    def load(self, digest: str, place: Callable[[int, Sequence[int], torch.dtype], Tensor]) -> tuple[Route, Callable[[], None]]:
        parts = sum_of(digest)
        return tuple((part.split("/")[0], weight) for part, weight in parts) if parts else digest.split("/")[0], lambda: None


def checked_sum(adapter: Sequence[tuple[str, float]]) -> Parts:
    """((name, weight), ...) as a request may name it. Raises UsageError."""
    try:
        parts = tuple((name, float(weight)) for name, weight in adapter)
    except (TypeError, ValueError):
        parts = ()
    if not parts or not all(isinstance(name, str) and math.isfinite(weight) for name, weight in parts):
        raise UsageError(f"{adapter!r} is no sum of adapters", remedy="give pairs of a name and a finite weight: [('a', 0.5), ('b', 0.5)]")
    return parts


def why_alone(info: MethodInfo, tokens: bool) -> str | None:
    """Why a method's change cannot be added to others; None where it can. tokens: it trains rows of tokens."""
    reason = ("changes the frozen product itself" if info.traits["multiplicative"] else
              {"model": "puts virtual tokens before the text", "block": "routes tokens"}.get(info.traits["scope"]) or
              ("trains rows of tokens" if tokens else None))
    return None if reason is None else f"({info.name}) {reason}"


def refuse_in_sum(name: str, reason: str | None) -> None:
    """Raises IncompatibleError for an adapter that `why_alone` has a reason for."""
    if reason is not None:
        raise IncompatibleError(f"adapter '{name}' {reason}: it cannot be part of a sum", remedy="name it alone")


def sum_digest(parts: Sequence[tuple[str, float]]) -> str:
    return ";".join(f"{weight!r}*{digest}" for digest, weight in parts)


def sum_of(digest: str) -> Parts | None:
    """[(digest, weight), ...] of a sum, None for a single adapter. Neither names nor digests hold the signs that divide them."""
    if "*" not in digest:
        return None
    return tuple((part, float(weight)) for weight, part in (each.split("*", 1) for each in digest.split(";")))


def prefix_of(model: nn.Module, name: str) -> PrefixAdapter | None:
    """What a graft puts before the text, or None."""
    found = state_of(model).grafts[name].adapters.get("prefix")
    return found if isinstance(found, PrefixAdapter) else None


def virtual_tokens(length: int, reads_prompt: bool, prompt: Sequence[int]) -> tuple[int, ...]:
    """Stand-ins below zero for virtual tokens. The prefix cache tells them apart by prompt where the adapter does."""
    if not reads_prompt:
        return (-1,) * length
    content = struct.pack(f"<{len(prompt)}q", *prompt)
    return (-2 - int.from_bytes(hashlib.blake2b(content, digest_size=7).digest(), "little"),) * length


@dataclass(frozen=True)
class Facts:
    """What is asked of an adapter before it runs. sizes: bytes of its tensors. length: of its virtual tokens; by_prompt: they depend on
    the prompt. alone: why it cannot be part of a sum."""

    sizes: tuple[int, ...]
    length: int
    by_prompt: bool
    alone: str | None


class AdapterFolder:
    """root: a folder with one adapter a subfolder (ours or PEFT's). host_bytes: of adapters kept in host memory."""

    def __init__(self, model: nn.Module, root: str | Path, *, host_bytes: int = 1 << 30):
        self.model, self.root = model, Path(root).resolve()
        if not self.root.is_dir():
            raise UsageError(f"there is no folder {root}", remedy="name a folder whose subfolders are saved adapters")
        self.hosts = Hosts(host_bytes)
        self._digests: dict[str, str] = {}
        self._folders: dict[str, Path] = {}
        self._facts: OrderedDict[str, Facts] = OrderedDict()
        self._alike: dict[Facts, Facts] = {}
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
    def digest(self, name: str | Parts) -> str:
        if not isinstance(name, str):
            digests = [self.digest(part) for part, _ in name]
            for (part, _), digest in zip(name, digests):
                refuse_in_sum(self.called(part), self._known(digest).alone)
            return sum_digest([(digest, weight) for digest, (_, weight) in zip(digests, name)])
        found = self._digests.get(name)
        if found is None:
            path = self.folder(name)
            found = content_digest(path)
            self._digests[name], self._folders[found] = found, path
        return found

    def called(self, name: str) -> str:
        """What people call an adapter that is asked for under this name."""
        return name

    def sizes(self, digest: str) -> Sequence[int]:
        parts = sum_of(digest)
        if parts:
            return tuple(size for part, _ in parts for size in self.sizes(part))
        return self._known(digest).sizes

    def virtual(self, digest: str, prompt: Sequence[int]) -> tuple[int, ...]:
        if sum_of(digest):
            return ()
        facts = self._known(digest)
        return virtual_tokens(facts.length, facts.by_prompt, prompt)

    def _known(self, digest: str) -> Facts:
        """Kept for the adapters that were asked for last: many of them look alike, and one that left is asked for again."""
        found = self._facts.get(digest)
        if found is None:
            host = self.host(digest)
            info = lookup("adapter", host.card["method"])
            cls = info.cls
            length = host.card["config"]["num_virtual_tokens"] if issubclass(cls, PrefixAdapter) else 0
            found = Facts(tuple(host.tensors[key].numel() * host.tensors[key].element_size() for key in sorted(host.tensors)), length,
                          length > 0 and cls.reads_prompt, why_alone(info, bool(host.card["config"].get("trainable_tokens"))))
            found = self._facts[digest] = self._alike.setdefault(found, found)
            if len(self._facts) > FACTS:
                self._facts.popitem(last=False)
            if len(self._alike) > FACTS:
                self._alike.clear()
        return found

    def load(self, digest: str, place: Place) -> tuple[Route, Callable[[], None]]:
        parts = sum_of(digest)
        if not parts:
            graft = self._attach(digest, f"d{digest}", place, 0)
            return graft.name, graft.detach
        grafts: list[Graft] = []

        def unload() -> None:
            for graft in grafts:
                graft.detach()

        own, first = hashlib.sha256(digest.encode()).hexdigest()[:32], 0
        try:
            for part, _ in parts:
                grafts.append(self._attach(part, f"s{own}-{len(grafts)}", place, first))
                first += len(self.sizes(part))
        except BaseException:
            unload()
            raise
        return tuple((graft.name, weight) for graft, (_, weight) in zip(grafts, parts)), unload

    def _attach(self, digest: str, name: str, place: Place, first: int) -> Graft:
        """Attach one adapter with its tensors at the places from number `first` on."""
        host = self.host(digest)
        if host.card.get("edited_storage"):
            raise IncompatibleError(f"'{host.folder.name}' runs on an edited base that other rows cannot share", remedy=TO_LORA)
        graft = attach_read(self.model, host.card, host.tensors, host.folder, name=name)
        try:
            owned = dict(graft.named_parameters(trainable=False))
            with torch.no_grad():
                for i, key in enumerate(sorted(host.tensors), first):
                    parameter = owned.get(key)
                    # what a method makes of its tensors when it loads stays where it made it
                    if parameter is not None and parameter.nbytes == host.tensors[key].nbytes:
                        values = parameter.data
                        parameter.data = place(i, values.shape, values.dtype)
                        parameter.copy_(values)  # a write that counts: nothing that was made of the old tensor is kept
        except BaseException:
            graft.detach()
            raise
        return graft

    # -- host memory ----------------------------------------------------------------------------------------------------------------
    def host(self, digest: str) -> Host:
        """The adapter in host memory, read if it is not there."""
        found = self.hosts.get(digest) or self.read(digest)
        if isinstance(found, Foreign):
            found = self._as_artifact(found)
            self.hosts.put(digest, found)
        return found

    def read(self, digest: str) -> Host | Foreign:
        """Read an adapter into host memory. Raises ArtifactError when its files are no longer what its digest is of."""
        folder = self._folders[digest]
        found, content = read_adapter(folder)
        if found != digest:
            raise ArtifactError(f"adapter '{folder.name}' was replaced while it was served under its old content",
                                remedy="load it again, so that requests get the new one")
        self.hosts.put(digest, content)
        self.reads += 1
        return content

    def _as_artifact(self, found: Foreign) -> Host:
        from ...interchange.peft import attach_peft

        graft = attach_peft(self.model, found.folder, name="reading", files=found.files)
        try:
            tensors, card = graft_tensors(graft), describe(graft)
        finally:
            graft.detach()
        card["tensors"] = {k: [list(t.shape), str(t.dtype).removeprefix("torch.")] for k, t in tensors.items()}
        return Host(card, tensors, found.folder)
