"""The registry of methods: one decorator per class, one record per method, lookup with nearest-name hints.

A method is one source file in the package of its axis. The file is found by listing that package, so
adding a method means adding a file; nothing else has to be edited.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

from .errors import UsageError, nearest

#: axis -> the package whose modules register methods of that axis
AXES = {
    "storage": "graftwork.storage",
    "calibration": "graftwork.storage.calibration",
    "adapter": "graftwork.adapters",
    "initializer": "graftwork.initializers",
    "optimizer": "graftwork.optim",
    "estimator": "graftwork.estimators",
    "selection": "graftwork.selection",
    "objective": "graftwork.objectives",
}


class MethodConfig(BaseModel):
    """Base of every method's options. Unknown keys are errors; numbers written as strings (YAML's 1e-4) are coerced."""

    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=())


@dataclass(frozen=True)
class MethodInfo:
    """One registered method. `traits` are facts from which combinations are judged (see recipe.reasons_against)."""

    axis: str
    name: str
    cls: type
    config: type[MethodConfig]
    title: str
    summary: str
    paper: str | None = None  # arXiv id
    bibtex: str | None = None
    aliases: tuple[str, ...] = ()
    traits: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "axis": self.axis, "name": self.name, "paper": self.paper, "title": self.title,
            "summary": self.summary, "traits": self.traits, "aliases": list(self.aliases),
            "config": {k: _default(f) for k, f in self.config.model_fields.items()},
        }


def _default(model_field) -> Any:
    value = model_field.get_default(call_default_factory=True)
    return value if isinstance(value, (int, float, str, bool, list, dict, type(None))) else str(value)


_METHODS: dict[str, dict[str, MethodInfo]] = {axis: {} for axis in AXES}
_ALIASES: dict[str, dict[str, str]] = {axis: {} for axis in AXES}
_LOADED: set[str] = set()
C = TypeVar("C", bound=type)


def register(axis: str, name: str, *, config: type[MethodConfig], title: str, summary: str, paper: str | None = None,
             bibtex: str | None = None, aliases: tuple[str, ...] = (), **traits: Any) -> Callable[[C], C]:
    """Class decorator. Names and aliases are unique within an axis.

    A class may offer `derived_traits(cls) -> dict` (a classmethod); what it returns is added to `traits`.
    """

    def decorate(cls: C) -> C:
        table = _METHODS[axis]
        for taken in (name, *aliases):
            if taken in table or taken in _ALIASES[axis]:
                raise RuntimeError(f"{axis} '{taken}' is registered twice")
        derived = cls.derived_traits() if hasattr(cls, "derived_traits") else {}
        info = MethodInfo(axis, name, cls, config, title, summary, paper, bibtex, tuple(aliases), {**derived, **traits})
        table[name] = info
        _ALIASES[axis].update({alias: name for alias in aliases})
        cls.method, cls.info, cls.config_class = name, info, config
        config.method = name
        return cls

    return decorate


def _load(axis: str) -> None:
    if axis in _LOADED:
        return
    package = importlib.import_module(AXES[axis])
    for module in pkgutil.iter_modules(package.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"{AXES[axis]}.{module.name}")
    _LOADED.add(axis)


def methods(axis: str | None = None) -> list[MethodInfo]:
    """All registered methods, of one axis or of all, by axis and name."""
    if axis is not None and axis not in AXES:
        raise UsageError(f"there is no axis '{axis}'{nearest(axis, AXES)}", remedy=f"axes: {', '.join(AXES)}")
    axes = [axis] if axis else list(AXES)
    for each in axes:
        _load(each)
    return [info for each in axes for _, info in sorted(_METHODS[each].items())]


def lookup(axis: str, name: str) -> MethodInfo:
    """The method of that name or alias. Raises UsageError with the nearest name and the list."""
    _load(axis)
    table, aliases = _METHODS[axis], _ALIASES[axis]
    key = aliases.get(name, name)
    if key not in table:
        raise UsageError(f"there is no {axis} '{name}'{nearest(name, [*table, *aliases])}",
                         remedy=f"{axis} methods: {', '.join(sorted(table))}")
    return table[key]


def make_config(axis: str, name: str, **options: Any) -> MethodConfig:
    """Validated options of one method. Raises UsageError naming each wrong key with its nearest neighbour."""
    from pydantic import ValidationError

    info = lookup(axis, name)
    try:
        return info.config(**options)
    except ValidationError as error:
        raise UsageError("; ".join(describe_problem(p, info) for p in error.errors())) from None


def describe_problem(problem: dict[str, Any], info: MethodInfo) -> str:
    """One pydantic problem in the words of the user."""
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = info.config.model_fields
        return f"{info.axis} '{info.name}' has no option '{key}'{nearest(key, known)}; options: {', '.join(known)}"
    return f"{info.axis} '{info.name}', option '{key}': {problem['msg']} (given: {problem['input']!r})"
