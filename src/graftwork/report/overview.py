"""What the runs are: the summary, their recipes and how these differ."""

from __future__ import annotations

from html import escape

from .page import notes
from .recipes import differences
from .runs import Run
from .section import Section, missing
from .tables import table

MIB = 2**20


def method_of(run: Run) -> str:
    parts = []
    for key in ("storage", "adapter", "optimizer", "estimator"):
        section = (run.recipe or {}).get(key)
        name = section.get("method") or section.get("from") if isinstance(section, dict) else section
        parts += [str(name)] if name else ["full tuning"] if key == "adapter" and run.recipe else []
    chosen = [str(s.get("method")) for s in (run.recipe or {}).get("selection") or [] if isinstance(s, dict)]
    return ", ".join(parts + chosen)


def summary(runs: list[Run]) -> Section:
    rows = []
    for run in runs:
        losses, evals = run.series("loss"), run.series("eval_loss")
        rows.append({"run": run.name, "model": (run.recipe or {}).get("model"), "parts": method_of(run),
                     "steps": run.info.get("steps", losses[-1][0] if losses else None), "last loss": losses[-1][1] if losses else None,
                     "last eval loss": evals[-1][1] if evals else None, "lowest eval loss": min(v for _, v in evals) if evals else None,
                     "measured MiB": round(run.info["peak_bytes"] / MIB, 1) if run.info.get("peak_bytes") else None,
                     "seconds": run.info.get("seconds")})
    kept = [key for key in rows[0] if any(row[key] not in (None, "") for row in rows)]
    rows = [{key: row[key] for key in kept} for row in rows]
    left = [f"{run.name}: {why}." for run in runs for why in run.gaps.values()]
    left += missing(runs, [r for r in runs if r.info], "there is no run.json: the run has not finished")
    failed = [f"{run.name}: {name}: {why}" for run in runs for name, why in (run.info.get("failed") or {}).items()]
    shown = table(rows) if len(rows) > 1 else table([{"": key, "value": value} for key, value in rows[0].items()])
    return Section("Summary", shown + notes(failed), left_out=left, rows=rows)


def recipes(runs: list[Run]) -> Section:
    section = Section("Recipes" if len(runs) > 1 else "Recipe")
    known = [run for run in runs if run.recipe is not None]
    if len(known) > 1:
        section.rows = differences({run.name: run.recipe for run in known})
        section.html = f"<h3>What differs</h3>{table(section.rows)}" if section.rows else notes(["All recipes are the same."])
    for run in [run for run in runs if run.recipe_text]:
        text = f"<pre>{escape(run.recipe_text)}</pre>"
        section.html += f"<details><summary>Resolved recipe of {escape(run.name)}</summary>{text}</details>" if len(runs) > 1 else text
    section.left_out = missing(runs, [r for r in runs if r.recipe_text], "there is no config.yaml")
    return section
