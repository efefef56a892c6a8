"""The adapter that is merged at present: whether its copies of the weights are there, and what they take."""

from __future__ import annotations

import weakref

from torch import nn

from ...adapters.merged_copy import merge_beside, unmerge_beside
from ...adapters.slot import Route, parts_of
from ...errors import GraftworkError, IncompatibleError
from ...modeling.protocols import StoredWeight
from ...modeling.state import state_of
from .merging import Merging
from .scheduler import Step


class MergedCopy:
    """At most one adapter at a time; its copies stay until another one is merged or the adapter leaves the model.

    Raises IncompatibleError for a base that is not kept dense: a merged copy would take more memory than all of it."""

    def __init__(self, model: nn.Module):
        stored = next((m for m in model.modules() if isinstance(m, StoredWeight) and not m.info.traits.get("lossless")), None)
        if stored is not None:
            raise IncompatibleError(f"the base is kept as {stored.info.name}, and an adapter is merged into dense weights only",
                                    remedy="leave out --merge (merge=True), or serve the base with --storage dense")
        self.model = model
        self._digest: str | None = None
        self._grafts: tuple[weakref.ref, ...] = ()
        self._bytes = 0

    @property
    def nbytes(self) -> int:
        """Of the copies."""
        return self._bytes if all(ref() is not None for ref in self._grafts) else 0

    def holds(self, digest: str, route: Route) -> bool:
        """Whether the copies of this content are there, under this route."""
        return self._digest == digest and [ref() for ref in self._grafts] == [graft for graft, _ in self._parts(route)]

    def ready(self, step: Step, rule: Merging) -> Route | None:
        """The route whose weights this step is to be computed with, merged if they are not yet. An adapter that cannot be merged is
        not tried again, and the step is as any other."""
        if step.merged is None:
            return None
        resident = step.work[0][0].resident
        if not self.holds(resident.digest, resident.route):
            try:
                self.make(resident.digest, resident.route)
            except (GraftworkError, RuntimeError) as error:  # a RuntimeError: no memory for the copies
                rule.refuse(resident.digest, str(error))
                step.merged = None
                return None
        return resident.route

    def make(self, digest: str, route: Route) -> None:
        """Merge an adapter that is attached. Raises IncompatibleError for one that cannot be, and RuntimeError where there is no
        memory; nothing is merged then."""
        self.drop()
        parts = self._parts(route)
        self._bytes = merge_beside(route, parts)
        self._digest, self._grafts = digest, tuple(weakref.ref(graft) for graft, _ in parts)

    def drop(self) -> None:
        """Give the copies up."""
        if self._digest is not None:
            unmerge_beside(self.model)
        self._digest, self._grafts, self._bytes = None, (), 0

    def _parts(self, route: Route) -> list[tuple]:
        grafts = state_of(self.model).grafts
        return [(grafts[name], weight) for name, weight in parts_of(route)]
