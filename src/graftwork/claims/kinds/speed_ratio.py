"""Seconds of one training step, both sides interleaved in one process: what one side's neighbours on the machine take, the other loses too.

Figures of an arm: `seconds` (samples, one a repeat; their middle value counts) and `trained`. Speed holds at this scale only, and only for
the processor that the result names.
"""

from __future__ import annotations

import time

from ..cells import Cells
from ..samples import Samples
from ._real import RealOptions, real_step
from .base import Figures, merged
from .base import Kind as Base


class SpeedOptions(RealOptions):
    repeats: int = 15
    quick_repeats: int = 3


class Kind(Base):
    reduces = True
    options = SpeedOptions
    about = "seconds a step, arms interleaved in one process, middle of the repeats"

    def of_arms(self, cells: Cells) -> Figures:
        cells.expect(1)
        of = [self.claim.to_json(), self.quick]
        found = cells.get(f"{self.claim.name}/times", of, lambda: self._times(cells))
        return {name: {"seconds": Samples(own["seconds"], "median"), "trained": own["trained"]} for name, own in found.items()}

    def _times(self, cells: Cells) -> dict[str, dict[str, object]]:
        steps = {name: real_step(self.check, merged(self.claim.common, arm), cells.folder / "models")
                 for name, arm in self.claim.arms.items()}
        found = {name: {"seconds": [], "trained": sum(p.numel() for _, p in step.parameters)} for name, (step, _) in steps.items()}
        for repeat in range(1 + (self.check.quick_repeats if self.quick else self.check.repeats)):
            for name, (step, batch) in steps.items():
                start = time.perf_counter()
                step.run([batch], repeat)
                if repeat:  # the first one allocates
                    found[name]["seconds"].append(time.perf_counter() - start)
        return found
