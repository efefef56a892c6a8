"""Identities with a tolerance: the claim's function is run once a seed, and the bar must be met by every one."""

from __future__ import annotations

from ..cells import Cells
from .base import Figures
from .base import Kind as Base


class Kind(Base):
    full_scale, reduces = True, False
    about = "an identity, with a tolerance, by a function of the claim; every seed must meet the bar"

    def measured(self, cells: Cells) -> list[Figures]:
        return self.runs(cells)

    @property
    def seeds(self) -> range:
        return range(self.check.seeds)
