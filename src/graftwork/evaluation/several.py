"""`graft eval RUN|MODEL --graft A --graft B`: several grafts on one base, each of which answers every row.

A --graft is a folder (a run's stands for its graft) or NAME=FOLDER. A run that is named beside them is a target too, the first; the bare
base is one with --base, the last. Base, data options and objective are the run's, else those that the first graft records.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..serving.loading import _common_storage, graft_folder
from .targets import Target, _grafts, _labels, find_target

BASE = "base"


def find_targets(run: str | None, grafts: Sequence[str], *, model: str | None = None, storage: str | None = None,
                 dtype: str | None = None, base: bool = False) -> tuple[Target, dict[str, str | None]]:
    """(what is to be loaded, {name shown: graft attached, None for the bare base}) in the order of the options.

    Raises UsageError: a name given twice, no graft in a folder, a fleet among them, grafts with different labels or tasks."""
    named = parse(grafts)
    own = find_target(run, model=model) if run is not None else None
    shown: dict[str, str | None] = {}
    if own is not None and own.fleet:
        raise UsageError(f"{run} is a fleet, whose rows are answered by its members", remedy="name its members one by one with --graft")
    if own is not None and own.grafts:
        first = _unique(Path(run).resolve().name, named)
        found, shown = own, {first: next(iter(own.grafts))}
    else:
        found = _grafts(named)
        found.storage = _common_storage(named)
        found.model = model or (own.model if own is not None else found.model)
    if own is None or not own.grafts:
        found.grafts = {}
    for name, folder in named.items():
        if name in found.grafts:
            raise UsageError(f"the name '{name}' is that of the run's own graft", remedy="choose another: --graft NAME=FOLDER")
        found.grafts[name], shown[name] = folder, name
    if base:
        shown[BASE] = None
    labels = {name: _labels({name: folder}).get(name) for name, folder in found.grafts.items()}
    if len({tuple(each) if each else None for each in labels.values()}) > 1:
        raise UsageError(f"the grafts have different labels: {labels}", remedy="compare grafts of one task")
    kinds = {name: each.task for name, folder in found.grafts.items() if (each := _grafts({name: folder})).recipe is not None}
    if len(set(kinds.values())) > 1:
        told = ", ".join(f"{name} {kind}" for name, kind in kinds.items())
        raise UsageError(f"the grafts belong to different kinds of models: {told}", remedy="compare grafts of one task")
    found.labels = {name: each for name, each in labels.items() if each}
    found.storage = {"method": storage} if storage is not None else found.storage
    found.dtype = dtype or found.dtype
    return found, shown


def parse(options: Sequence[str]) -> dict[str, Path]:
    """{name: folder of a saved graft}. Raises UsageError."""
    from ..adapters.graft import NAME

    found: dict[str, Path] = {}
    for option in options:
        name, sign, folder = option.partition("=")
        if not sign:
            name, folder = "", option
        place = graft_folder(folder)
        if not name:
            path = place.resolve()
            name = path.parent.name if path.name == "graft" else path.name
        if not NAME.fullmatch(name) or name == BASE:
            raise UsageError(f"--graft {option}: '{name}' is no name for a graft", remedy=f"--graft NAME={folder}")
        if name in found:
            raise UsageError(f"--graft: two grafts are called '{name}'", remedy=f"name them: --graft other={folder}")
        found[name] = place
    return found


def _unique(name: str, taken: dict[str, Any]) -> str:
    while name in taken or name == BASE:
        name += "+"
    return name


def identity(target: Target) -> str:
    """A digest of what answers: the base, its storage, the contents of the grafts, the files of a model folder by size and time."""
    digest = hashlib.sha256(repr((target.model, target.storage, target.dtype)).encode())
    for name, folder in sorted(target.grafts.items()):
        digest.update(name.encode())
        for path in sorted(folder.glob("*.safetensors")):
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    base = Path(target.model)
    for path in sorted(base.iterdir()) if base.is_dir() else [base] if base.is_file() else []:
        digest.update(f"{path.name}:{path.stat().st_size}:{path.stat().st_mtime_ns}".encode())
    return digest.hexdigest()
