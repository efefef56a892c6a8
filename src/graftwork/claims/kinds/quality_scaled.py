"""Losses or scores of short real runs, every arm by the same protocol.

All arms see the same rows in the same order for the same number of steps. Each takes its best of as many learning rates (three or more)
with seed 0, judged on validation rows, and then three seeds at that rate, scored on test rows that no choice was made on; the run of seed
0 is the one of the search. Runs are shared by all claims of a folder (training.py). --quick: the middle rate, one seed, a few steps.

Figures of an arm: `loss` (nats a token, samples of seeds and rows) or `accuracy` (points, of rows), `trained`, `file` (bytes of the
artifact), `rate`; with `eval_every`, `steps_to`: the steps it needs to reach the last validation loss of the claim's baseline (ten times
all steps where it does not).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

from ..cells import Cells
from ..samples import Samples
from ..tasks import task_of
from ..training import Cell, Trained, data_files
from .base import Figures, NotCheckable, Options, merged
from .base import Kind as Base


class QualityOptions(Options):
    """rates: of every arm that has no `rates` of its own. tasks: scored together, each searched by itself."""

    tasks: list[str]
    base: str = "smollm2-135m-instruct"
    rates: list[float] = [3e-4, 1e-3, 3e-3]
    steps: int = 100
    quick_steps: int = 3
    batch: int = 8
    length: int = 128
    train: int = 800
    validation: int = 100
    test: int = 200
    quick_rows: int = 16
    eval_every: int = 0
    schedule: str = "cosine"
    width: int = 192
    blocks: int = 4


class Kind(Base):
    reduces = True
    options = QualityOptions
    about = "three rates with one seed, then three seeds, for both sides alike; paired bootstrap over seeds and rows"

    def runs_in_common(self) -> set[Any]:
        check = self.check
        shape = check.base, check.steps, check.batch, check.length, check.train
        return {(task, *shape) for task in check.tasks if self.claim.arms}

    def of_arms(self, cells: Cells) -> Figures:
        check = self.check
        for arm in self.claim.arms.values():
            searched = 1 if self.quick else len(arm.get("rates", check.rates))
            cells.expect(len(check.tasks) * (searched + len(self.seeds) - 1))
        finals: dict[str, dict[str, list[Trained]]] = {}
        for task in check.tasks:
            files = data_files(cells.folder / "data", task, check.length, check.train, check.validation, check.test)
            for name, arm in self.claim.arms.items():
                finals.setdefault(name, {})[task] = self._arm(cells, task, files, name, arm)
        baseline = finals[self.claim.baseline]
        failed = next((each.get("error", "no number") for own in baseline.values() for each in own if each["rows"] is None), None)
        if failed:
            raise NotCheckable(f"the baseline's run ended with an error: {failed}")
        return {name: self._figures(own, baseline) for name, own in finals.items()}

    def _arm(self, cells: Cells, task: str, files: dict[str, str], name: str, arm: dict[str, Any]) -> list[Trained]:
        """The finals of one arm on one task."""
        check = self.check
        rates = list(arm.get("rates", check.rates))
        sections = merged(self.claim.common, {k: v for k, v in arm.items() if k != "rates"})

        def trained(rate: float, seed: int, wanted: Callable[[float], bool] | None = None) -> Trained:
            cell = Cell(task=task, base=check.base, sections=sections, rate=rate, seed=seed, files=files,
                        steps=check.quick_steps if self.quick else check.steps, batch=check.batch, length=check.length,
                        eval_every=check.eval_every, schedule=check.schedule, width=check.width, blocks=check.blocks,
                        rows=check.quick_rows if self.quick else None)

            def enough(kept: Trained) -> bool:  # another claim may have had a better rate, and no use for the test rows of this one
                if "error" in kept or wanted is None:
                    return "error" in kept or kept["rows"] is not None
                return kept["validation"] is not None and (kept["rows"] is not None or not wanted(kept["validation"]))

            return cells.get(cell.place, cell.of(), lambda: cell.run(cells.folder / "models", wanted),
                             f"{self.claim.name} {task} {name} lr{rate:g} seed{seed}", enough)

        middle = len(rates) // 2
        if self.quick:
            return [trained(rates[middle], seed) for seed in self.seeds]
        sign = 1 if task_of(task).classes is None else -1

        def order(mean: float | None) -> float:
            return math.inf if mean is None or math.isnan(mean) else sign * mean

        best = None
        for place in sorted(range(len(rates)), key=lambda i: abs(i - middle)):  # the likely best first: few test rows are scored in vain
            lowest = math.inf if best is None else order(best["validation"])
            tried = trained(rates[place], 0, lambda mean, lowest=lowest: order(mean) < lowest)
            if best is None or order(tried["validation"]) < lowest:
                best = tried
        return [best, *(trained(best["rate"], seed) for seed in self.seeds[1:])]

    def _figures(self, own: dict[str, list[Trained]], baseline: dict[str, list[Trained]]) -> dict[str, Any]:
        first = next(iter(own.values()))[0]
        causal = task_of(self.check.tasks[0]).classes is None
        # a run that diverged has no rows: its seed counts as no number, as wide as the others, so that pairs stay pairs
        rows = [[score for task in own for score in own[task][i]["rows"] or []] for i in self.seeds]
        width = max(sum(len(finals[i]["rows"] or []) for finals in arm.values()) for arm in (own, baseline) for i in self.seeds) or 1
        rows = [r if len(r) == width else [math.nan] * width for r in rows]
        found = {"loss" if causal else "accuracy": Samples(rows), "trained": first["trained"], "file": first["file"],
                 "rate": statistics.mean(finals[0]["rate"] for finals in own.values())}
        if self.check.eval_every:
            found["steps_to"] = Samples([[statistics.mean(self._steps_to(own[t][i], baseline[t][i]) for t in own)] for i in self.seeds])
        return found

    def _steps_to(self, own: Trained, baseline: Trained) -> float:
        goal = baseline["curve"][-1][1] if baseline["curve"] else -math.inf
        return next((float(step) for step, loss in own["curve"] if loss <= goal), 10.0 * self.check.steps)
