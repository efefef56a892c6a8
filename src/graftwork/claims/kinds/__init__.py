"""The kinds of checks, one file each; a file is found by listing this package."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from ...errors import UsageError, nearest


def kinds() -> list[str]:
    """Names of all kinds."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_") and m.name != "base")


def kind_of(name: str) -> type[Any]:
    """The class of a kind. Raises UsageError with the nearest name."""
    known = kinds()
    if name not in known:
        raise UsageError(f"there is no kind of claim '{name}'{nearest(name, known)}", remedy=f"kinds: {', '.join(known)}")
    return importlib.import_module(f"{__name__}.{name}").Kind
