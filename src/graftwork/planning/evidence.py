"""What was measured of a method's quality: the table that `benchmarks/evidence.py` makes of the committed raw results.

Each row of evidence.json is one method on one task with its relative loss against the baseline of its axis (LoRA, AdamW, dense
weights) and a 95 % interval. A recipe is judged axis by axis, and the judgements are added: nobody measured all combinations.

    doubt  0 measured on the recipe's kind of task, training what it trains (or the baseline itself), 1 elsewhere, 2 never
    gap    mean relative loss over those tasks; a difference whose interval holds 0 counts as none, and so does a gain elsewhere:
           an optimizer that does well on full weights from scratch need not on the factors of an adapter

So (doubt, gap) in this order puts methods without evidence after those with it, whatever they cost.
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("evidence.json")
#: relative loss of a run that failed
FAILED = 1.0
Kind = tuple[str, str]
NO_MEASUREMENT = "no measurement"


@dataclass(frozen=True)
class Judgement:
    """doubt and gap as above; text: one clause for a reader."""

    doubt: int
    gap: float
    text: str


class Evidence:
    """The table. kind: (task of a recipe's objective: causal_lm or sequence_classification, what it trains: adapter or full)."""

    def __init__(self, table: dict[str, Any]):
        self.tasks, self.baselines = table["tasks"], table["baselines"]
        self.rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in table["rows"]:
            self.rows.setdefault((row["axis"], row["method"]), []).append(row)

    def of(self, axis: str, method: str, kind: Kind, section: dict[str, Any] | None = None) -> tuple[list[dict[str, Any]], bool]:
        """(rows of a method, whether they are of this kind); those of the kind alone, where there are any. section: only rows measured
        with these options."""
        rows = [r for r in self.rows.get((axis, method), []) if section is None or r["section"] == section]
        own = [r for r in rows if self.tasks[r["task"]]["kind"] == kind[0] and self.tasks[r["task"]]["trains"] in (kind[1], "nothing")]
        return (own, True) if own else (rows, False)

    def judge(self, axis: str, method: str, kind: Kind, section: dict[str, Any] | None = None) -> Judgement:
        if method == self.baselines[axis]:
            return Judgement(0, 0.0, f"{method}: the baseline")
        rows, own = self.of(axis, method, kind, section)
        if not rows:
            return Judgement(2, 0.0, f"{method}: {NO_MEASUREMENT}")
        gaps = [gap_of(row) if own else max(0.0, gap_of(row)) for row in rows]
        words = [f"{'failed' if row['relative'] is None else f'{gap:+.1%} loss' if gap else 'no different'} on {row['task']}"
                 for row in rows for gap in [gap_of(row)]]
        elsewhere = "" if own else " (measured elsewhere)"
        return Judgement(0 if own else 1, statistics.mean(gaps), f"{method}: {', '.join(words)}{elsewhere}")

    def section(self, axis: str, method: str, kind: Kind) -> dict[str, Any] | None:
        """The options that a method was measured with; None where it was not."""
        rows, _ = self.of(axis, method, kind)
        return dict(rows[0]["section"]) if rows else None

    def rate(self, axis: str, method: str, kind: Kind) -> float:
        """The method's best learning rate over the baseline's, the geometric mean over tasks; 1 where that is not known."""
        rows, _ = self.of(axis, method, kind)
        base = {r["task"]: r["rate"] for r in self.rows.get((axis, self.baselines[axis]), []) if "rate" in r}
        logs = [math.log(r["rate"] / base[r["task"]]) for r in rows if r["task"] in base]
        return math.exp(statistics.mean(logs)) if logs else 1.0

    def cost(self, method: str, kind: Kind) -> tuple[float, float]:
        """(peak, step) of an adapter over LoRA's as measured, 1 where it was not."""
        rows, _ = self.of("adapter", method, kind)
        peaks = [r["peak"] for r in rows if "peak" in r]
        steps = [r["step"] for r in self.rows.get(("adapter", method), []) if "step" in r]
        return (statistics.mean(peaks) if peaks else 1.0), (statistics.mean(steps) if steps else 1.0)


def gap_of(row: dict[str, Any]) -> float:
    """Relative loss of one row; 0 where the interval holds 0."""
    if row["relative"] is None:
        return FAILED
    return 0.0 if row["low"] <= 0 <= row["high"] else row["relative"]


@cache
def packaged() -> Evidence:
    return Evidence(json.loads(TABLE.read_text(encoding="utf-8")))


__all__ = ["Evidence", "Judgement", "NO_MEASUREMENT", "gap_of", "packaged"]
