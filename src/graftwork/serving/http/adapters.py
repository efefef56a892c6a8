"""The adapters a server offers: subfolders of one folder (adapters or run folders), and what the book beside them says.

The book (registry.py) is shared: what one server on the folder loads, unloads or points elsewhere, all of them offer at the next
request, and so does the next start. A name is first looked up (`target`: an alias, the book, the subfolder, its files' times; cheap,
nothing is opened) and then opened (`open`: read, from a URL if need be; slow, in a thread of its own). From there on a request is
tied to the content that it got, by its digest, whatever happens to the name, the folder or the URL.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ...adapters.graft import NAME
from ...errors import ArtifactError, UsageError
from ..engine.adapters import FACTS, AdapterFolder, Parts, sum_of
from ..engine.hosts import Foreign, Host, read_adapter, refuse_links
from ..registry import BOOK, Book, State, Where
from ..sources import Reference, Sources, is_url
from .errors import UnknownAdapter
from .targets import PINNED, Foreigner, Names, Target, adapter_in, stamps_of


class Catalog(AdapterFolder):
    """base: the base model's name, which no adapter may have. roots: folders beside `root` that adapters may be loaded from. sources:
    URLs that they may be loaded from.

    `digest`, `sizes`, `virtual`, `host` and `load` belong to the engine's thread, all else may be used by any."""

    def __init__(self, model: nn.Module, root: str | Path, *, base: str, roots: Sequence[str | Path] = (), host_bytes: int = 1 << 30,
                 sources: Sources | None = None):
        super().__init__(model, root, host_bytes=host_bytes)
        self.base, self.sources = base, sources
        self.roots = [self.root, *(Path(each).resolve() for each in roots)]
        self.book = Book(self.root / BOOK)
        self.asked = Names(FACTS)
        self._lock = threading.Lock()
        self._digests: OrderedDict[Target, str] = OrderedDict()
        self._places: dict[str, dict[Target, None]] = {}  # digest -> where it was found
        self._offered: tuple[State | None, dict[str, Where]] = (None, {})

    # -- which there are ----------------------------------------------------------------------------------------------------------
    def names(self) -> list[str]:
        """Subfolders, what the book adds to them, and aliases."""
        state = self.book.read()
        offered = self._of_book(state)
        found = {name for name in super().names() if offered.get(name, "") is not None}
        found |= {name for name, where in offered.items() if where is not None}
        return sorted((found | {name for name, target in state.aliases.items() if target in found}) - {self.base})

    def alias(self, name: str) -> str | None:
        """What a name is an alias of, or None."""
        return self.book.read().aliases.get(name)

    def where(self, name: str) -> str:
        """Folder or URL of a name, for people."""
        found = self._where(self.book.read(), name)
        return str(found if isinstance(found, Reference) else self.root / (found or name))

    def target(self, name: str) -> Target:
        """What a name stands for. Raises UnknownAdapter, and ArtifactError for one whose files are links."""
        found = None
        try:
            found = self._look_up(name)
        finally:
            self.asked.put(name, found)
        return found

    def _look_up(self, name: str) -> Target:
        state = self.book.read()
        own = state.aliases.get(name, name)
        where = self._where(state, name) if NAME.fullmatch(name) and name != self.base else None
        if isinstance(where, Reference):
            return Target(where, name=own)
        path = None if where is None else self.root / where
        if path is None or path.is_symlink() or not path.is_dir():
            raise UnknownAdapter(f"there is no adapter '{name[:200]}'", remedy="GET /v1/models lists them")
        path = refuse_links(own, adapter_in(path))
        return Target(path, stamps_of(path), own)

    def allowed(self, text: str) -> Path | Reference:
        """The URL that a client named, or the folder, absolute or inside the folder of adapters. Raises UsageError for one outside of
        what is allowed, links followed, and for a folder that is not there."""
        if is_url(text):
            if self.sources is None:
                raise UsageError("lora_path is a URL, and this server reads none", remedy="start it with --allow-source")
            return self.sources.reference(text)
        try:
            path = (self.root / text).resolve()
            inside = self._inside(path)
            there = inside and path.is_dir()
        except (OSError, ValueError, RuntimeError):  # too long, a zero byte, links in a circle
            inside = there = False
        if not inside:
            raise UsageError("lora_path does not lie in a folder that adapters may be loaded from",
                             remedy="name a folder inside --adapters, or start the server with --allow-path")
        if not there:
            raise UsageError(f"there is no folder {text}", remedy="name a folder written by graft.save or PEFT")
        return path

    def at(self, name: str, place: Path | Reference) -> Target:
        """What a name would stand for. Raises UsageError for a name that no adapter may have. Blocks where a URL's sum is not known."""
        self._check_name(name)
        if isinstance(place, Reference):
            if place.sha256 is None:
                with Foreigner(name):
                    place = self.sources.fetch(place)[1]
            return Target(place, name=name)
        path = refuse_links(name, adapter_in(place))
        return Target(path, stamps_of(path), name)

    def free(self, name: str) -> None:
        """Raises UsageError for a name that is taken, before anything is read."""
        self._check_name(name)
        self._check_free(self.book.read(), name)

    # -- changes ------------------------------------------------------------------------------------------------------------------
    def put(self, name: str, place: Path | Reference, *, replace: bool = False) -> bool:
        """A name stands for the adapter in this folder or at this URL from now on; whether it stood for one before. Raises UsageError
        for a name that is taken (and not to be replaced), or is an alias."""
        there = False

        def edit(state: State) -> State:
            nonlocal there
            there = self._check_free(state, name, replace)
            if place == self.root / name:
                return state.without_adapter(name)
            inside = isinstance(place, Path) and place.is_relative_to(self.root)
            where = place if isinstance(place, Reference) else str(place.relative_to(self.root) if inside else place)
            return state.with_adapter(name, where)

        target = self.at(name, place)
        self.book.change(edit)
        self.asked.put(name, target)
        return there

    def remove(self, name: str) -> None:
        """A name stands for nothing from now on; its files stay. Raises UnknownAdapter, and UsageError while an alias points to it."""

        def edit(state: State) -> State:
            if name in state.aliases:
                return state.with_alias(name, None)
            if not self._there(state, name):
                raise UnknownAdapter(f"there is no adapter '{name[:200]}'", remedy="GET /v1/models lists them")
            used = sorted(alias for alias, target in state.aliases.items() if target == name)
            if used:
                raise UsageError(f"the alias '{used[0]}' points to '{name}'", remedy="point it elsewhere first, or unload it")
            return state.with_adapter(name, None) if (self.root / name).is_dir() else state.without_adapter(name)

        self.book.change(edit)
        self.asked.put(name, None)

    def point(self, name: str, version: str) -> str | None:
        """`name` is an alias of `name@version` from now on; what it was an alias of before. Raises UsageError for a name that is an
        adapter's own, and UnknownAdapter for a version that is not there."""
        before, target = None, f"{name}@{version}"

        def edit(state: State) -> State:
            nonlocal before
            before = state.aliases.get(name)
            if before is None and self._there(state, name):
                raise UsageError(f"'{name}' is the name of an adapter", remedy="unload it, or choose another name for the alias")
            if target in state.aliases or not self._there(state, target):
                raise UnknownAdapter(f"there is no adapter '{target[:200]}'", remedy="load it first; GET /v1/models lists what there is")
            return state.with_alias(name, target)

        self._check_name(name)
        self._check_name(target)
        if "@" in name:
            raise UsageError(f"'{name[:200]}' is no name for an alias", remedy="an alias has no '@'; its versions do")
        self.book.change(edit)
        self.asked.put(name, None)
        return before

    # -- contents -----------------------------------------------------------------------------------------------------------------
    def known(self, target: Target) -> str | None:
        """The digest of what a target holds, if it was opened before."""
        with self._lock:
            if target in self._digests:
                self._digests.move_to_end(target)
            return self._digests.get(target)

    def open(self, target: Target, *, hold: bool = False) -> str:
        """Read a target's adapter into host memory; its digest. hold: it stays there until it is let go. Blocks. Raises ArtifactError."""
        with Foreigner(target.name):
            for again in (True, False):
                folder = self.sources.fetch(target.place)[0] if isinstance(target.place, Reference) else target.place
                try:
                    digest, content = read_adapter(folder)
                    break
                except ArtifactError:  # another server may have made room in the cache of URLs
                    if not again or folder == target.place or folder.is_dir():
                        raise
        with self._lock:
            self.reads += 1
            self._forget(target)
            self._digests[target] = digest
            self._places.setdefault(digest, {})[target] = None
            if len(self._digests) > FACTS:
                self._forget(next(iter(self._digests)))
        self.hosts.put(digest, content, hold=hold)
        return digest

    def reopen(self, digest: str, *, hold: bool = False) -> str:
        """Read a content again, wherever it was found before. Blocks. Raises ArtifactError when it is nowhere any more."""
        with self._lock:  # several names may stand for the same content, and one of the copies may be damaged
            places = list(self._places.get(digest, ()))
        problem: ArtifactError | None = None
        for target in reversed(places):
            try:
                if self.open(target, hold=hold) == digest:
                    return digest
                if hold:
                    self.hosts.let_go(self.known(target))
            except ArtifactError as error:
                problem = problem or error
        raise problem or ArtifactError("the adapter's files were replaced or deleted while a request waited for it",
                                       remedy="send the request again")

    def pin(self, name: str) -> str:
        """What to ask the engine for: the content that the name stands for now. Blocks if it was not opened before."""
        target = self.target(name)
        return PINNED + (self.known(target) or self.open(target))

    # -- what the engine asks -----------------------------------------------------------------------------------------------------
    def called(self, name: str) -> str:
        return self._named(name.removeprefix(PINNED)) if name.startswith(PINNED) else name

    def there(self, digest: str) -> bool:
        """Whether what it takes to load this is in host memory."""
        return all(part in self.hosts for part, _ in sum_of(digest) or ((digest, 1.0),))

    def digest(self, name: str | Parts) -> str:
        if not isinstance(name, str):
            return super().digest(name)
        return name.removeprefix(PINNED) if name.startswith(PINNED) else self.pin(name).removeprefix(PINNED)

    def read(self, digest: str) -> Host | Foreign:
        self.reopen(digest, hold=True)
        content = self.hosts.get(digest)
        self.hosts.let_go(digest)
        return content

    def host(self, digest: str) -> Host:
        with Foreigner(self._named(digest)):
            return super().host(digest)

    def load(self, digest: str, place: Callable[[int, Sequence[int], torch.dtype], Tensor]) -> tuple[str, Callable[[], None]]:
        with Foreigner(self._named(digest)):
            return super().load(digest, place)

    def names_of(self, digests: Iterable[str]) -> dict[str, list[str]]:
        """{digest: the names that stand for it, aliases among them, of those that were asked for}."""
        with self._lock:
            places = {digest: list(self._places.get(digest, ())) for digest in digests}
        return {digest: self.asked.of(targets) for digest, targets in places.items()}

    # -- inside -------------------------------------------------------------------------------------------------------------------
    def _forget(self, target: Target) -> None:
        digest = self._digests.pop(target, None)
        if digest is not None:
            del self._places[digest][target]
            if not self._places[digest]:
                del self._places[digest]

    def _named(self, digest: str) -> str:
        """For messages: the name under which a content was found; those of a sum's parts."""
        parts = sum_of(digest)
        if parts:
            return " + ".join(self._named(part) for part, _ in parts)
        with self._lock:
            return next((target.name for target in self._places.get(digest, ())), digest)

    def _check_name(self, name: str) -> None:
        if not NAME.fullmatch(name) or name == self.base:
            raise UsageError(f"'{name[:200]}' is no name for an adapter",
                             remedy="letters, digits, '_', '-', '@', at most 128, beginning with a letter or digit, not the base's name")

    def _check_free(self, state: State, name: str, replace: bool = False) -> bool:
        """Whether a name stands for an adapter, which is to be replaced."""
        if name in state.aliases:
            raise UsageError(f"'{name}' is an alias of '{state.aliases[name]}'", remedy="load a version, and point the alias to it")
        there = self._there(state, name)
        if there and not replace:
            raise UsageError(f"the lora adapter '{name}' has already been loaded", remedy="to replace it, send load_inplace: true")
        return there

    def _inside(self, path: Path) -> bool:
        return any(path != root and path.is_relative_to(root) for root in self.roots)

    def _offers(self, where: Where) -> bool:
        """Whether what the book says may still be read: a server may be started with other folders and URLs."""
        if isinstance(where, Reference):
            return self.sources is not None and self.sources.allows(where)
        try:
            return where is None or self._inside((self.root / where).resolve())
        except (OSError, ValueError, RuntimeError):
            return False

    def _of_book(self, state: State) -> dict[str, Where]:
        seen, offered = self._offered
        if seen is not state:
            offered = {name: where if self._offers(where) else None for name, where in state.adapters.items()}
            self._offered = (state, offered)
        return offered

    def _where(self, state: State, name: str) -> Where:
        """What a name (or what it is an alias of) stands for: the book's word, else the subfolder."""
        own = state.aliases.get(name, name)
        return self._of_book(state).get(own, own)

    def _there(self, state: State, name: str) -> bool:
        where = self._where(State(state.adapters), name)
        if where is None or isinstance(where, Reference):
            return where is not None
        path = self.root / where
        return NAME.fullmatch(name) is not None and not path.is_symlink() and path.is_dir()
