"""A base with named, saved grafts on it: what the command line calls `--model M --adapter NAME=FOLDER ...`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError, nearest


def parse_adapters(options: Sequence[str]) -> dict[str, Path]:
    """{name: folder} of `NAME=FOLDER` options. A run folder stands for its graft. Raises UsageError (form, name, twice)."""
    from ..adapters.graft import NAME

    found: dict[str, Path] = {}
    for option in options:
        name, sign, folder = option.partition("=")
        if not sign or not folder:
            raise UsageError(f"--adapter {option}: it reads NAME=FOLDER",
                             remedy=f"--adapter {Path(option).name or 'name'}={option or 'FOLDER'}")
        if not NAME.fullmatch(name) or name == "base":
            why = " (it means the bare base)" if name == "base" else ""
            raise UsageError(f"--adapter {option}: '{name}' is no name for a graft{why}",
                             remedy="letters, digits, '_', '-', '@', at most 128, beginning with a letter or digit")
        if name in found:
            raise UsageError(f"--adapter: the name '{name}' is given twice", remedy="choose another name for one of them")
        found[name] = graft_folder(folder)
    return found


def graft_folder(folder: str | Path) -> Path:
    """The artifact itself, also where its run folder was named. Raises UsageError when there is none, listing a fleet's."""
    folder = Path(folder)
    for each in (folder, folder / "graft"):
        if (each / "graft.json").is_file() or (each / "adapter_config.json").is_file():
            return each
    members = sorted(path.parent for path in (*folder.glob("*/graft.json"), *folder.glob("graft/*/graft.json")))
    if members:
        raise UsageError(f"{folder} holds {len(members)} grafts", remedy=f"name one of them, for example {members[0]}")
    if not folder.is_dir():
        around = [str(p) for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise UsageError(f"there is no folder {folder}{nearest(str(folder), around)}",
                         remedy="name a saved graft or a run folder")
    raise UsageError(f"{folder} holds no saved graft", remedy="name a folder written by `graft train`, graft.save or PEFT")


def load_with_adapters(ref: str, adapters: dict[str, Path], *, storage: str | None = None, dtype: str | None = None,
                       say: Callable[[str], None] = lambda text: None) -> tuple[Any, Any]:
    """(model, tokenizer) with the grafts attached under their names.

    storage None: the one all grafts were trained on, else dense; a folder of codes keeps them in any case. Raises
    GraftworkError for what cannot be loaded."""
    from ..api import load
    from ..modeling.models import load_config

    if storage is None:
        chosen = _common_storage(adapters)
        if chosen is not None and getattr(load_config(ref), "quantization_config", None):
            chosen = None
        if chosen is not None:
            say(f"storage {chosen['method']}, as the adapters were trained on it")
    else:
        chosen = storage
    recorded = None
    if isinstance(chosen, dict):
        from ..artifact import read_card
        from ..training.build import recorded_data

        card = read_card(next(iter(adapters.values())))
        recorded = recorded_data(chosen, card.get("provenance", {}).get("recipe"), ref)
    model, tokenizer = load(ref, storage=chosen, dtype=dtype, calibration_data=recorded)
    if tokenizer is None:
        raise UsageError(f"{ref} has no tokenizer", remedy="add the tokenizer files to the model folder")
    for name, folder in adapters.items():
        attach_quietly(model, folder, name, say)
    return model, tokenizer


def attach_quietly(model: Any, folder: Path, name: str, say: Callable[[str], None]) -> Any:
    """`attach_saved`, its warnings as notes."""
    from ..artifact import attach_saved

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        graft = attach_saved(model, folder, name=name)
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            say(f"note: {warning.message}")
    return graft


def _common_storage(adapters: dict[str, Path]) -> dict[str, Any] | None:
    """The storage that every graft names, None when they differ or it is dense."""
    from ..artifact import read_card

    storages = [read_card(folder).get("storage") if (folder / "graft.json").exists() else None for folder in adapters.values()]
    first = storages[0] if storages else None
    same = all(each == first for each in storages)
    return first if same and first is not None and first.get("method") != "dense" else None


def check_adapter(name: str | None, known: Sequence[str]) -> str | None:
    """The name itself; `base` and null are the bare base (None). Raises UsageError with the nearest name."""
    if name is None or name == "base":
        return None
    if name not in known:
        raise UsageError(f"no adapter is named {name!r}{nearest(str(name), known)}",
                         remedy=f"adapters: {', '.join(known) or 'none'}; null is the bare base")
    return name


__all__ = ["attach_quietly", "check_adapter", "graft_folder", "load_with_adapters", "parse_adapters"]
