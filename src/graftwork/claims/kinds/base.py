"""What all kinds of checks have in common.

A kind turns a claim into figures, {arm: {figure: number or Samples}}; the bars of the claim are judged on these. Several sets of figures
(one a seed, for identities) must all meet the bar.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ...errors import UsageError, nearest
from ..cells import Cells
from ..samples import Samples

Figures = dict[str, dict[str, Any]]


class NotCheckable(Exception):
    """Raised by a check that lacks something on this machine; the verdict is `not checkable here (why)`."""


class Options(BaseModel):
    """Options of a kind (`check` of a claim)."""

    model_config = ConfigDict(extra="forbid")
    seeds: int = 3


class Kind:
    """full_scale: a met bar `holds`, else `holds at this scale`. reduces: --quick measures less, and the verdict says so."""

    full_scale = False
    reduces = False
    options = Options
    about = ""

    def __init__(self, claim: Any, quick: bool):
        self.claim, self.quick = claim, quick
        try:
            self.check = self.options(**claim.check)
        except ValidationError as error:
            wrong = error.errors()[0]
            key = ".".join(map(str, wrong["loc"]))
            raise UsageError(f"claim {claim.name}, check.{key}: {wrong['msg']}{nearest(key, self.options.model_fields)}",
                             remedy=f"options of {claim.kind}: {', '.join(self.options.model_fields)}") from None

    @property
    def seeds(self) -> range:
        return range(1 if self.quick else self.check.seeds)

    def runs_in_common(self) -> set[Any]:
        """What other claims may share runs by; a claim that has one of these in common with another should run in the same process."""
        return set()

    def figures(self, cells: Cells) -> list[Figures]:
        """Measure everything. A claim with a function of its own is measured by that."""
        if self.claim.measure is not None:
            return self.measured(cells)
        return [self.of_arms(cells)]

    def of_arms(self, cells: Cells) -> Figures:
        """Figures of the claim's arms."""
        raise UsageError(f"a claim of kind {self.claim.kind} is measured by a function",
                         remedy="write it as a .py file with CLAIM and measure(seed, quick)")

    def measured(self, cells: Cells) -> list[Figures]:
        """The claim's own function, once a seed; numbers and lists of all seeds together become samples."""
        runs = self.runs(cells)
        together: Figures = {}
        for arm in runs[0]:
            together[arm] = {name: Samples([value if isinstance(value, list) else [value] for value in (r[arm][name] for r in runs)])
                             for name in runs[0][arm]}
        return [together]

    def runs(self, cells: Cells) -> list[dict[str, dict[str, Any]]]:
        """What the claim's function gave for each seed."""
        cells.expect(len(self.seeds))
        of = [self.claim.to_json(), self.claim.code, self.quick]
        return [cells.get(f"{self.claim.name}/seed{seed}", [*of, seed], lambda seed=seed: self.claim.measure(seed, self.quick))
                for seed in self.seeds]


def merged(*parts: dict[str, Any]) -> dict[str, Any]:
    """Recipe sections over one another; mappings are merged key by key, but a section of another method replaces the former."""
    out: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            old = out.get(key)
            same = isinstance(old, dict) and isinstance(value, dict) and (
                "method" not in old or value.get("method", old["method"]) == old["method"])
            out[key] = merged(old, value) if same else value
    return out
