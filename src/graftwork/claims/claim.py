"""What a claim is, and where claims are found.

A claim is one file in rows/GROUP/: NAME.yaml, or NAME.py where the check is special, with the same fields in `CLAIM` and a function
`measure(seed, quick) -> {arm: {figure: number or list}}`. Fields:

    system, statement, number, source   as published
    kind        how it is checked (a file of kinds/)
    setting     scale of this check, in words
    baseline    the arm it is compared with, measured in the same run
    common      recipe sections of all arms; arms: {name: the sections of each}
    check       options of the kind
    holds       the bar, an expression over the arms' figures (expressions.py)
    holds_here  a lower bar: met without `holds`, the claim holds at this scale only
    refuted_by  what would refute it, in words; refuted: the same as an expression, so that a missed bar can be told from that
    minutes     cost of the full check alone, on one core that does nothing else
    headline    why the published number itself cannot be checked here; `holds` then judges the portable part. Without kind `absent` has
                no portable part at all
    first       its place among those to run first
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import UsageError, nearest
from .expressions import names_in

ROWS = Path(__file__).parent / "rows"
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Fields(BaseModel):
    """The content of a file; see the module docstring."""

    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)
    system: str
    statement: str
    number: str | None = None
    source: str
    kind: str
    setting: str
    baseline: str | None = None
    common: dict[str, Any] = {}
    arms: dict[str, dict[str, Any]] = {}
    check: dict[str, Any] = {}
    holds: str | None = None
    holds_here: str | None = None
    refuted: str | None = None
    refuted_by: str
    minutes: float = Field(gt=0)
    headline: str | None = None
    first: int | None = None


@dataclass(frozen=True)
class Claim:
    """A claim with its name and group, from its file. measure: of a Python file, whose text is `code`: cells are measured again when it
    has changed."""

    name: str
    group: str
    fields: Fields
    measure: Callable[[int, bool], dict[str, dict[str, Any]]] | None = None
    code: str | None = None

    def __getattr__(self, key: str) -> Any:
        return getattr(self.fields, key)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "group": self.group, **self.fields.model_dump(exclude_none=True)}


def read(path: Path, group: str | None = None) -> Claim:
    """The claim in a file. Raises UsageError with every wrong field."""
    path = Path(path)
    try:
        if path.suffix == ".py":
            module = _module(path)
            document, measure, code = dict(module.CLAIM), module.measure, path.read_text(encoding="utf-8")
        else:
            document, measure, code = yaml.load(path.read_text(encoding="utf-8"), _LOADER), None, None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError) as error:
        raise UsageError(f"{path} is no claim: {str(error).splitlines()[0]}",
                         remedy="see docs/claims.md for what a claim file holds") from None
    if not isinstance(document, dict):
        raise UsageError(f"{path} is no claim: it holds no fields", remedy="see docs/claims.md for what a claim file holds")
    try:
        fields = Fields(**document)
    except ValidationError as error:
        raise UsageError("\n".join(f"{path}: {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()),
                         remedy=f"fields: {', '.join(Fields.model_fields)}") from None
    claim = Claim(path.stem, group or path.parent.name, fields, measure, code)
    _check(claim, path)
    return claim


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"graftwork.claims.rows.{path.parent.name}.{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _check(claim: Claim, path: Path) -> None:
    from .kinds import kind_of

    kind_of(claim.kind)
    if claim.kind == "absent":
        if not claim.headline:
            raise UsageError(f"{path}: a claim of kind absent says why in `headline`")
        return
    if claim.holds is None or (claim.measure is None and not claim.arms):
        raise UsageError(f"{path}: a claim needs `holds` and arms (or, as a .py file, measure)")
    if claim.arms:
        for bar in filter(None, (claim.holds, claim.holds_here, claim.refuted)):
            strange = names_in(bar) - set(claim.arms)
            if strange:
                raise UsageError(f"{path}: '{bar}' speaks of {', '.join(sorted(strange))}{nearest(min(strange), claim.arms)}",
                                 remedy=f"arms: {', '.join(claim.arms)}")
        if claim.baseline not in claim.arms:
            raise UsageError(f"{path}: baseline '{claim.baseline}' is no arm", remedy=f"arms: {', '.join(claim.arms)}")


@cache
def claims() -> dict[str, Claim]:
    """{name: claim} of all files: those to run first before the others, then by group and name."""
    found: dict[str, Claim] = {}
    for path in sorted([*ROWS.glob("*/*.yaml"), *ROWS.glob("*/*.py")]):
        if path.stem in found:
            raise RuntimeError(f"two claims are called {path.stem}")
        found[path.stem] = read(path)
    return dict(sorted(found.items(), key=lambda item: (item[1].first or 99, item[1].group, item[0])))


def in_order(found: Iterable[Claim]) -> list[Claim]:
    """Those to run first, then the cheapest."""
    return sorted(found, key=lambda claim: (claim.first or 99, claim.minutes, claim.name))


def shares(found: Iterable[Claim], parts: int) -> list[list[Claim]]:
    """The claims for so many processes with about equal minutes, each in order. Claims with runs in common stay in one process: two
    would train them twice."""
    from .kinds import kind_of

    groups: list[tuple[set[Any], list[Claim]]] = []
    for claim in found:
        runs, members = kind_of(claim.kind)(claim, False).runs_in_common(), [claim]
        for other in [g for g in groups if g[0] & runs]:
            groups.remove(other)
            runs, members = runs | other[0], [*other[1], *members]
        groups.append((runs, members))
    made: list[list[Claim]] = [[] for _ in range(parts)]
    for _, members in sorted(groups, key=lambda g: (-sum(c.minutes for c in g[1]), g[1][0].name)):
        min(made, key=lambda part: sum(c.minutes for c in part)).extend(members)
    return [in_order(part) for part in made]


def find(name: str) -> Claim:
    """A claim by name, or from a .yaml file of the user's own. Raises UsageError with the nearest name."""
    if name.endswith(".yaml"):
        return read(Path(name))
    known = claims()
    if name not in known:
        raise UsageError(f"there is no claim '{name}'{nearest(name, known)}", remedy="graft claims list; or the path of a .yaml file")
    return known[name]
