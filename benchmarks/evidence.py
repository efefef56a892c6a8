"""The evidence table of `graft plan --advise`, made from the raw results of the other benchmarks; runs nothing.

    python benchmarks/evidence.py

Reads results/adapters (against LoRA), results/optimizers (against AdamW: optimizers, selections and estimators of full tuning) and
results/storage (against dense weights), as far as they are there, and writes src/graftwork/planning/evidence.json: one row a method
and task with the relative loss

    relative = (loss - loss of the baseline) / loss of the baseline,  low, high: its 95 % interval (paired bootstrap, matrix.py)

where loss is nats a token, or the share of rows that a classifier gets wrong. For storage it is the mean log-perplexity on two
texts, one model, no interval. A run that failed has no number. peak and step of an adapter are ratios to LoRA's, as measured (the
step on the first encoder task only). Run it again after a benchmark has new cells.
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import adapters
import optimizers
import storage
from adapter_tasks import TASKS as ADAPTER_TASKS
from matrix import interval
from optimizer_tasks import HIDDEN
from optimizer_tasks import TASKS as OPTIMIZER_TASKS

import graftwork

OUT = Path(__file__).parent.parent / "src" / "graftwork" / "planning" / "evidence.json"


def relative(ours: list[list[float]], theirs: list[list[float]], base: float) -> dict[str, float | None]:
    """Of losses by seed and row."""
    found = interval(ours, theirs)
    return {key: round(value / base, 5) for key, value in zip(("relative", "low", "high"), found)}


def of_adapters() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    rows, tasks = [], {}
    for name, task in ADAPTER_TASKS.items():
        found = adapters.read(adapters.OUT, name)
        if "lora" not in found:
            continue
        tasks[name] = {"kind": "sequence_classification" if task.classes else "causal_lm", "trains": "adapter",
                       "what": f"{task.base}, {task.steps} steps of {task.batch} rows"}
        losses = {m: [[_loss(s, task.classes) for s in f["scores"]] for f in finals] for m, finals in found.items()
                  if all(f["mean"] is not None for f in finals)}
        base = statistics.mean(map(statistics.mean, losses["lora"]))
        for method, finals in found.items():
            row = {"axis": "adapter", "method": method, "task": name, "section": finals[0]["options"], "rate": finals[0]["rate"]}
            if finals[0].get("peak_bytes"):
                row["peak"] = round(finals[0]["peak_bytes"] / found["lora"][0]["peak_bytes"], 3)
            timed = adapters.OUT / adapters.ENCODER[0] / method / "step.json"
            if timed.exists() and name == adapters.ENCODER[0]:
                row["step"] = round(json.loads(timed.read_text())["ratio"], 3)
            rows.append(row | (relative(losses[method], losses["lora"], base) if method in losses else {"relative": None}))
    return rows, tasks


def _loss(score: float, classes: int) -> float:
    return 1 - score / 100 if classes else -score / 100


def of_optimizers() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Plain methods only: variants of the benchmark (8-bit states, other formats) are no methods of the registry."""
    rows, tasks = [], {}
    axis_of = {m.name: axis for axis in ("estimator", "selection", "optimizer") for m in graftwork.methods(axis)}
    for name, task in OPTIMIZER_TASKS.items():
        sections = optimizers.sections_of(HIDDEN[name])
        found = optimizers.read(optimizers.OUT, name, list(sections), len(optimizers.SEEDS))
        if optimizers.BASELINE not in found:
            continue
        tasks[f"{name}, full tuning"] = {
            "kind": "causal_lm", "trains": "full" if task.base else "scratch",
            "what": f"{task.base or 'a Llama of 1.9M from random weights'}, {task.steps} steps of {task.batch} rows, full tuning"}
        base = found[optimizers.BASELINE]
        for method, entry in found.items():
            if method not in axis_of or sections[method].get("adapter"):
                continue
            failed = math.isinf(optimizers.mean_loss(entry))
            row = {"axis": axis_of[method], "method": method, "task": f"{name}, full tuning", "section": {}, "rate": entry["rate"]}
            rows.append(row | ({"relative": None} if failed else relative(
                [f["rows"] for f in entry["finals"]], [f["rows"] for f in base["finals"]], optimizers.mean_loss(base))))
    return rows, tasks


def of_storage() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The best section of each number of bits; the others are beaten by it in both."""
    found = storage.read(storage.OUT, list(storage.configurations()))
    if "dense" not in found:
        return [], {}
    base = storage.mean_log(found["dense"])
    rows = []
    for label in storage.front(found):
        section = dict(found[label]["section"])
        change = round((storage.mean_log(found[label]) - base) / base, 5)
        rows.append({"axis": "storage", "method": section.pop("method"), "task": "wikitext2 and c4", "section": section,
                     "bits": round(found[label]["bits"], 3), "relative": change, "low": change, "high": change})
    return rows, {"wikitext2 and c4": {"kind": "causal_lm", "trains": "nothing", "what": f"{storage.BASE}, log-perplexity, untrained"}}


def main() -> None:
    rows, tasks = [], {}
    for part in (of_adapters, of_optimizers, of_storage):
        more, named = part()
        rows, tasks = rows + more, tasks | named
    body = ",\n".join(f"  {json.dumps(row)}" for row in sorted(rows, key=lambda r: (r["axis"], r["method"], r["task"])))
    head = {"command": "python benchmarks/evidence.py", "baselines": {"adapter": "lora", "optimizer": "adamw", "storage": "dense",
                                                                      "selection": "adamw", "estimator": "adamw"}, "tasks": tasks}
    OUT.write_text(json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{body}\n ]\n}}\n', encoding="utf-8")
    print(f"{len(rows)} rows of {len(tasks)} tasks: {OUT.name}")


if __name__ == "__main__":
    main()
