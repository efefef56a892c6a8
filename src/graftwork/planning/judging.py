"""A planned candidate as a reader compares it: memory, time, evidence of quality, size of the file, whether it merges and serves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..registry import lookup
from .evidence import NO_MEASUREMENT, Evidence, Judgement
from .pareto import coarse
from .space import Candidate, baseline_estimator

BITS = {"bf16": 16, "fp32": 32}


@dataclass
class Quality:
    """doubt and gap summed over the axes; bits a weight of the frozen part: of equal evidence, more bits are safer."""

    doubt: int
    gap: float
    bits: float
    judgements: list[Judgement]

    @property
    def key(self) -> tuple[int, float, float]:
        return self.doubt, round(self.gap, 3), -self.bits

    @property
    def text(self) -> str:
        told = [j.text for j in self.judgements if j.doubt or j.gap or "baseline" not in j.text]
        return "; ".join(told) or "the baselines themselves"


def quality(candidate: Candidate, evidence: Evidence, task: str, bits: float) -> Quality:
    """task: of the objective. bits: of the storage, 0 for a lossless one."""
    arm, found = candidate.arm, []
    kind = (task, "adapter" if arm.adapter else "full")
    found.append(evidence.judge("adapter", arm.adapter["method"], kind) if arm.adapter
                 else Judgement(2, 0.0, f"full tuning: {NO_MEASUREMENT} against an adapter"))
    if arm.optimizer:
        found.append(evidence.judge("optimizer", arm.optimizer["method"], kind))
    if bits:
        options = {k: v for k, v in candidate.storage.items() if k != "method"}
        measured = ("storage", candidate.storage["method"]) in evidence.rows and evidence.of(
            "storage", candidate.storage["method"], kind, options)[0]
        found.append(evidence.judge("storage", candidate.storage["method"], kind, options) if measured
                     else Judgement(2, 0.0, f"{candidate.storage['method']}: {NO_MEASUREMENT}"))
    if arm.estimator["method"] != baseline_estimator():
        found.append(evidence.judge("estimator", arm.estimator["method"], kind))
    partner = arm.adapter and lookup("adapter", arm.adapter["method"]).traits.get("selection")
    found += [evidence.judge("selection", s["method"], kind) for s in arm.selection if s["method"] != partner]
    return Quality(sum(j.doubt for j in found), sum(j.gap for j in found), bits or BITS[candidate.precision], found)


def mergeable(candidate: Candidate) -> tuple[int, str]:
    """(2 exact, 1 with conditions, 0 no; in words) of folding the change into the weights."""
    if candidate.arm.adapter is None:
        return 2, "is the model"
    traits = lookup("adapter", candidate.arm.adapter["method"]).traits
    if not traits["mergeable"]:
        return 0, "no"
    if lookup("storage", candidate.storage["method"]).traits["lossless"] or traits["position"] != "outside":
        return 2, "yes"
    return 1, "into dense weights"


def servable(candidate: Candidate) -> tuple[int, str]:
    """(2 many beside one base, also in weighted sums; 1 beside others, not in sums; 0 as a model of its own; in words)."""
    if candidate.arm.adapter is None:
        return 0, "as its own model"
    traits = lookup("adapter", candidate.arm.adapter["method"]).traits
    return (1, "yes, not in sums") if traits["multiplicative"] or traits["scope"] != "site" else (2, "yes")


@dataclass
class Row:
    """One candidate with its plan (a mapping as `search.planned` returns it). reason: why it is in the Pareto set."""

    candidate: Candidate
    plan: dict[str, Any]
    seconds: float
    quality: Quality
    reason: str = ""
    document: dict[str, Any] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return self.plan["device"]["total_bytes"]

    @property
    def saved(self) -> int:
        return self.plan["saved_bytes"]

    def vector(self) -> tuple:
        """Lower is better."""
        return (coarse(self.total), coarse(self.seconds), self.quality.key, coarse(self.saved), -mergeable(self.candidate)[0],
                -servable(self.candidate)[0])

    def to_json(self) -> dict[str, Any]:
        c = self.candidate
        return {**c.names(), "rows": c.rows, "grad_accumulation": c.accumulation, "gradient_checkpointing": c.checkpointing,
                "precision": c.precision, "peak_bytes": self.plan["peak_bytes"], "device_bytes": self.total,
                "seconds_per_step": self.seconds, "flops": self.plan["flops"], "saved_bytes": self.saved, "trained": self.plan["trained"],
                "bits_per_weight": round(self.quality.bits, 3),
                "quality": {"doubt": self.quality.doubt, "relative_loss": self.quality.gap,
                            "evidence": [j.text for j in self.quality.judgements]},
                "mergeable": mergeable(c)[1], "servable": servable(c)[1], "reason": self.reason, "recipe": self.document}


#: what --for may name, in the order that holds without it -> what is compared first
WISHES: dict[str, Callable[[Any], Any]] = {
    "quality": lambda row: row.quality.key,
    "speed": lambda row: coarse(row.seconds, 0.1),
    "file-size": lambda row: coarse(row.saved, 0.1),
    "mergeable": lambda row: -mergeable(row.candidate)[0],
    "servable": lambda row: -servable(row.candidate)[0],
}


def order(wishes: Sequence[str]) -> Callable[[Any], tuple]:
    """The sort key of a list of wishes; what they leave equal goes by memory, then by time. Differences under a tenth count as none."""
    return lambda row: (*(WISHES[wish](row) for wish in wishes), coarse(row.total, 0.1), row.seconds)


def reasons(rows: Sequence[Row]) -> None:
    """Writes each row's reason: what no other row does better, else what it trades for what against the first row."""
    from .measure import format_bytes, format_seconds

    if not rows:
        return
    told = {"least memory": lambda r: coarse(r.total), "quickest step": lambda r: coarse(r.seconds),
            "best evidence of quality": lambda r: r.quality.key, "smallest file": lambda r: coarse(r.saved)}
    first = rows[0]
    for row in rows:
        bests = [text for text, key in told.items() if len(rows) > 1 and key(row) == min(map(key, rows))]
        if bests:
            row.reason = f"{', '.join(bests)} of these"
        elif len(rows) == 1:
            row.reason = "the only one that fits and that no other beats"
        else:
            gains, pays = [], []
            for text, value, mine, theirs in (("memory", format_bytes, row.total, first.total), ("a step", format_seconds, row.seconds,
                                              first.seconds), ("the file", format_bytes, row.saved, first.saved)):
                if coarse(mine) != coarse(theirs):
                    (gains if mine < theirs else pays).append(f"{value(mine)} of {text}" if text == "memory" else f"{value(mine)} {text}")
            if row.quality.key < first.quality.key:
                gains.append("better evidence")
            row.reason = f"against row 1: {', '.join(gains) or 'another balance'}" + (f", for {', '.join(pays)}" if pays else "")


__all__ = ["Quality", "Row", "WISHES", "mergeable", "order", "quality", "reasons", "servable"]
