"""Claims that need hardware, scale or data which are absent, and have no part that could be carried over."""

from __future__ import annotations

from ..cells import Cells
from .base import Figures, NotCheckable
from .base import Kind as Base


class Kind(Base):
    about = "needs what is absent here; no part of it can be checked"

    def figures(self, cells: Cells) -> list[Figures]:
        raise NotCheckable(self.claim.headline)
