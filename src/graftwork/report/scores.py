"""Scores of a run's evaluations with bootstrap intervals: the files in RUN/eval/.

`graft eval RUN --data F --output RUN/eval/TASK.jsonl` leaves one line a row, with `correct` (true, false) or `score` (a number); the
mean's 95 % interval is drawn here by resampling rows. Rows with a real `label` and `prediction` give Pearson's correlation instead.
RUN/eval/TASK.json may hold what `graft eval --json` printed; its intervals are taken as they are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .runs import is_number

#: of a printed result without intervals the first of these is shown
SHOWN = ("exact_match", "accuracy", "macro_f1", "loss")


def read_scores(folder: Path, run: str) -> tuple[list[dict[str, Any]], list[str]]:
    """(rows {task, run, score, low, high, n}, notes on files that say nothing) of RUN/eval."""
    rows, notes = [], []
    kept = sorted((folder / "eval").iterdir()) if (folder / "eval").is_dir() else []
    for path in [p for p in kept if p.suffix in (".jsonl", ".json") and p.is_file()]:
        try:
            text = path.read_text(encoding="utf-8")
            found = _of_rows(text) if path.suffix == ".jsonl" else _of_summary(json.loads(text))
        except (OSError, ValueError):
            found = None
        if found is None:
            notes.append(f"eval/{path.name} of {run} holds no rows with `correct`, `score` or a real `label`, and no metrics")
        else:
            rows += [{"task": path.stem + more, "run": run, **numbers} for more, numbers in found]
    return rows, notes


def _of_rows(text: str) -> list[tuple[str, dict[str, Any]]] | None:
    from ..evaluation.metrics import bootstrap_interval

    by_member: dict[str, list[float]] = {}
    pairs: dict[str, list[dict[str, Any]]] = {}
    for row in map(json.loads, filter(str.strip, text.splitlines())):
        if not isinstance(row, dict):
            continue
        value, member = row.get("score", row.get("correct")), str(row.get("target") or row.get("adapter") or "")
        if isinstance(value, (bool, int, float)):
            by_member.setdefault(member, []).append(float(value))
        elif is_number(row.get("label")) and is_number(row.get("prediction")):
            pairs.setdefault(member, []).append({"compared": row["prediction"], "references": [row["label"]]})
    found = [(f" / {member}" * (len(pairs) > 1) + " (pearson)", numbers) for member, own in pairs.items()
             if (numbers := _correlation(own)) is not None]
    if not by_member:
        return found or None
    for member, values in by_member.items():
        low, high = bootstrap_interval(values)
        found.append((f" / {member}" if len(by_member) > 1 and member else "",
                      {"score": sum(values) / len(values), "low": low, "high": high, "n": len(values)}))
    return found


def _correlation(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Pearson's of predictions and labels; None where it is undefined."""
    from ..evaluation.bootstrap import interval, resampled
    from ..evaluation.families.correlation import Pearson

    judge = Pearson()
    statistics = judge.statistics([row for row in rows if judge.usable(row)])
    value = judge.value(statistics)["pearson"] if len(statistics) else float("nan")
    if value != value:
        return None
    bounds = interval(resampled(judge, statistics, 2000, 0)["pearson"], len(statistics)) or (None, None)
    return {"score": value, "low": bounds[0], "high": bounds[1], "n": len(statistics)}


def _of_summary(document: Any) -> list[tuple[str, dict[str, Any]]] | None:
    targets = document.get("targets") or {"": document.get("metrics")} if isinstance(document, dict) else None
    found = []
    for target, metrics in targets.items() if isinstance(targets, dict) else ():
        if not isinstance(metrics, dict):
            continue
        known = [name for name in metrics if is_number(metrics[name])]
        for name in [n for n in known if f"{n}_interval" in metrics] or [n for n in SHOWN if n in known][:1]:
            bounds = metrics.get(f"{name}_interval")
            low, high = bounds if isinstance(bounds, list) and len(bounds) == 2 and all(map(is_number, bounds)) else (None, None)
            found.append((f" / {target}" * bool(target) + f" ({name})",
                          {"score": float(metrics[name]), "low": low, "high": high, "n": metrics.get("n")}))
    return found or None
