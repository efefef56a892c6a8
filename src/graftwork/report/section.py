"""A section of the page: its figures, its HTML, and a line for what is missing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .figures import Figure
from .page import notes
from .runs import Run


@dataclass
class Section:
    """heading, then html, figures and left_out below each other; rows: the section's numbers where it is no figure."""

    heading: str
    html: str = ""
    figures: list[Figure] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def body(self) -> str:
        return self.html + "".join(figure.html() for figure in self.figures) + notes(self.left_out)


def missing(runs: list[Run], have: list[Run], why: str) -> list[str]:
    """A line that says which runs lack something."""
    lacking = [run.name for run in runs if run not in have]
    if not lacking:
        return []
    return [f"Left out{'' if len(runs) == 1 else ' for ' + ', '.join(lacking)}: {why}."]
