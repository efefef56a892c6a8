"""Running claims: figures, bars, verdict, and the result file of each."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..files import atomic_write_text
from .cells import Cells, digest
from .claim import Claim
from .expressions import Evidence, judge
from .kinds import kind_of
from .kinds.base import Figures, NotCheckable
from .samples import Samples

HOLDS, HERE, NOT = "holds", "holds at this scale", "does not hold here"


def absent(why: str) -> str:
    return f"not checkable here ({why})"


def run_claim(claim: Claim, folder: Path, *, quick: bool = False, tell: Callable[[int, int, str], None] | None = None) -> dict[str, Any]:
    """Check one claim and write FOLDER/NAME.json (NAME.quick.json, where --quick measured less); cells lie under FOLDER/cells."""
    kind = kind_of(claim.kind)(claim, quick)
    cells, reduced = Cells(Path(folder) / "cells", tell), quick and kind.reduces
    try:
        sets = kind.figures(cells)
        verdict, evidence = decide(claim, sets, kind.full_scale)
        shown = {arm: {k: v.to_json() if isinstance(v, Samples) else v for k, v in own.items()} for arm, own in sets[0].items()}
    except NotCheckable as error:
        sets, verdict, evidence, shown = [], absent(str(error)), [], {}
    portable = verdict if claim.headline and not verdict.startswith("not checkable") else None
    result = {
        "claim": claim.name, "group": claim.group, "system": claim.system, "statement": claim.statement, "number": claim.number,
        "source": claim.source, "kind": claim.kind, "setting": claim.setting, "baseline": claim.baseline,
        "verdict": absent(claim.headline) if portable else verdict, **({"portable": portable} if portable else {}), "quick": reduced,
        "holds": claim.holds, "evidence": [e.to_json() for e in evidence], "refuted_by": claim.refuted_by,
        "refuted": refuted(claim, sets) if NOT in (verdict, portable) else None, "figures": shown,
        "seeds": max([len(sets)] + [v.seeds for v in samples(sets)]) if sets else 0, "n": max((v.rows for v in samples(sets)), default=1),
        "first": claim.first, "of": _of(claim), "command": f"graft claims run {claim.name} {'--quick' if quick else '--full'}",
        **_machine(), "seconds": round(cells.seconds, 1), "cpu_seconds": round(cells.cpu, 1)}
    atomic_write_text(_place(claim, folder, reduced), json.dumps(result, indent=1) + "\n")
    return result


def _place(claim: Claim, folder: Path, reduced: bool) -> Path:
    return Path(folder) / f"{claim.name}{'.quick' if reduced else ''}.json"


def _of(claim: Claim) -> str:
    """What a result is made from beside the code."""
    return digest([claim.common, claim.arms, claim.check, claim.holds_here])


def has_result(claim: Claim, folder: Path, *, quick: bool = False) -> bool:
    """Whether a folder holds a result of the claim as it is now: of the same bar and setting, and of the same arms."""
    try:
        made = json.loads(_place(claim, folder, quick and kind_of(claim.kind).reduces).read_text(encoding="utf-8"))
        same = all(made[key] == getattr(claim, key) for key in ("holds", "setting", "statement"))
        return same and made.get("of", _of(claim)) == _of(claim)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def decide(claim: Claim, sets: list[Figures], full_scale: bool) -> tuple[str, list[Evidence]]:
    """The verdict by the claim's bars; every set of figures must meet them. Evidence is that of the first set that does not."""
    met, evidence = _met(claim.holds, sets)
    if met:
        return HOLDS if full_scale else HERE, evidence
    if claim.holds_here:
        lower, more = _met(claim.holds_here, sets)
        return HERE if lower else NOT, [*evidence, *more]
    return NOT, evidence


def refuted(claim: Claim, sets: list[Figures]) -> bool | None:
    """Of a claim that does not hold: whether what would refute it came, or its bar was only missed. None where it has no such bar."""
    return None if claim.refuted is None else any(judge(claim.refuted, figures)[0] for figures in sets)


def _met(bar: str, sets: list[Figures]) -> tuple[bool, list[Evidence]]:
    judged = [judge(bar, figures) for figures in sets]
    return all(met for met, _ in judged), next((e for met, e in judged if not met), judged[0][1])


def samples(sets: list[Figures]) -> list[Samples]:
    return [v for figures in sets for own in figures.values() for v in own.values() if isinstance(v, Samples)]


def _machine() -> dict[str, Any]:
    import os
    from importlib.metadata import version

    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    return {"machine": platform.machine(), "cores": os.cpu_count(), "load": load, "torch": version("torch")}
