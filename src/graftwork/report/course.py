"""How the runs went: loss, rates, throughput, memory."""

from __future__ import annotations

from . import drawings
from .figures import Figure
from .runs import Run
from .section import Section, missing

MIB = 2**20


def loss(runs: list[Run]) -> Section:
    section, many = Section("Loss"), len(runs) > 1

    def curve(key: str, name: str, title: str, ylabel: str, smooth: bool = False, log: bool = False) -> bool:
        found = {run.name if many else title.lower(): points for run in runs if (points := run.series(key))}
        if found:
            section.figures.append(drawings.curves(name, title, found, "step", ylabel, smooth=smooth, log=log))
        return bool(found)

    if not many and runs[0].series("loss"):
        both = {"training": runs[0].series("loss"), "validation": runs[0].series("eval_loss")}
        section.figures.append(drawings.curves("loss", "Training and validation loss", {k: v for k, v in both.items() if v}, "step",
                                               "loss (nats)", smooth=True))
    else:
        curve("loss", "loss", "Training loss", "loss (nats)", smooth=True)
        curve("eval_loss", "validation-loss", "Validation loss", "loss (nats)")
    section.left_out += missing(runs, [r for r in runs if r.series("loss")], "metrics.jsonl has no loss")
    section.left_out += missing(runs, [r for r in runs if r.series("eval_loss")], "no validation loss (data.eval or data.eval_fraction)")
    curve("lr", "learning-rate", "Learning rate", "learning rate")
    positive = all(norm > 0 for run in runs for _, norm in run.series("grad_norm"))
    curve("grad_norm", "gradient-norm", "Gradient norm before clipping", "norm", log=positive)
    return section


def throughput(runs: list[Run]) -> Section:
    section, many = Section("Throughput"), len(runs) > 1
    speed = {run.name if many else "tokens per second": run.series("tokens_per_second") for run in runs if run.series("tokens_per_second")}
    seconds = {run.name if many else "seconds per step": points for run in runs if (points := step_seconds(run))}
    if speed:
        section.figures.append(drawings.curves("tokens-per-second", "Tokens per second", speed, "step", "tokens/s"))
    if seconds:
        section.figures.append(drawings.curves("step-seconds", "Seconds per step", seconds, "step", "seconds"))
    section.left_out = missing(runs, [r for r in runs if r.series("tokens_per_second")], "metrics.jsonl has no times")
    return section


def step_seconds(run: Run) -> list[tuple[int, float]]:
    """Seconds of a window over its steps; where a line does not count them (older runs), over the steps since the line before."""
    found, before = [], 0
    for row in run.rows:
        if "seconds" in row and "loss" in row:
            found.append((row["step"], row["seconds"] / max(1, row.get("steps") or row["step"] - before)))
            before = row["step"]
    return found


def memory(runs: list[Run]) -> Section:
    section = Section("Memory")
    planned = [run for run in runs if run.plan]
    if planned:
        section.figures.append(drawings.memory_bars(
            "memory-peak", "Planned bytes at the peak of a step, and the measured peak", {r.name: r.plan["categories"] for r in planned},
            {r.name: r.info.get("peak_bytes") or 0 for r in planned}))
    section.figures += [figure for i, run in enumerate(runs) for figure in _over_run(run, i + 1 if len(runs) > 1 else None)]
    for run in planned:
        if run.plan.get("timeline"):
            name, of = (f"memory-step-{runs.index(run) + 1}", f" of {run.name}") if len(runs) > 1 else ("memory-step", "")
            title = f"The planned ledger over two steps{of}, by category"
            section.figures.append(drawings.memory_timeline(name, title, run.plan["timeline"]))
    why = "there is no plan in the run folder (graft report RUN --plan simulates it)"
    section.left_out = missing(runs, planned, why)
    section.left_out += missing(runs, [r for r in runs if _sizes(r)], "metrics.jsonl has no memory of its steps (an older run)")
    return section


def _sizes(run: Run) -> dict[str, list[tuple[int, float]]]:
    named = {"tensors on the device, measured": "device_bytes", "process, measured": "process_bytes"}
    return {label: [(s, v / MIB) for s, v in points] for label, key in named.items() if (points := run.series(key))}


def _over_run(run: Run, number: int | None) -> list[Figure]:
    """Measured bytes over the steps with the plan as level lines. number: of the run among several."""
    lines, marks = _sizes(run), {}
    if not lines:
        return []
    steps = [p[0] for points in lines.values() for p in points]
    ends = (min(steps), max(steps))
    if run.plan:
        device = run.plan.get("device") or {}
        lines["tensors at the peak, planned"] = [(s, run.plan["peak_bytes"] / MIB) for s in ends]
        if "process, measured" in lines and "device_bytes" not in (run.rows[0] if run.rows else {}) and device.get("total_bytes"):
            lines["process, planned with reserve"] = [(s, device["total_bytes"] / MIB) for s in ends]
    measured = run.info.get("measured") or {}
    if measured.get("peak_bytes") and measured.get("step"):
        marks["heaviest step, measured"] = [(measured["step"], measured["peak_bytes"] / MIB)]
    of, end = ("", "") if number is None else (f" of {run.name}", f"-{number}")
    figure = drawings.curves(f"memory-run{end}", f"Memory over the run{of}", lines, "step", "MiB", marks=marks)
    figure.note = (figure.note + " The process holds interpreter and libraries too; the step that is measured exactly is larger by the "
                                 "records of that measurement.").strip()
    return [figure]
