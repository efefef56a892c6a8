"""What a report draws: curves, memory, maps over sites and steps, spectra, scores. Each gives a Figure with its numbers."""

from __future__ import annotations

import math
from typing import Any

from .figures import COLORS, LINES, WIDE, Figure, ink, legend, log_ticks, plain_axes, short, thinned, whole_ticks

#: points of a line that are drawn, and rows of its table
POINTS, TABLE = 1000, 60
MIB = 2**20


def curves(name: str, title: str, series: dict[str, list[tuple[float, float]]], xlabel: str, ylabel: str, *, log: bool = False,
           marks: dict[str, list[tuple[float, float]]] | None = None, smooth: bool = False) -> Figure:
    """Lines {name: [(x, y)]}; marks are drawn as points only; smooth adds a running mean to long lines. Long lines are thinned."""
    marks = marks or {}
    kept = {label: thinned([p for p in points if math.isfinite(p[1])], POINTS) for label, points in {**series, **marks}.items()}
    xs_drawn = {x for points in kept.values() for x, _ in points}

    def draw(canvas: Any, width: float) -> None:
        axes = plain_axes(canvas.subplots())
        for i, (label, points) in enumerate(kept.items()):
            xs, ys = [p[0] for p in points], [p[1] for p in points]
            color, means = COLORS[i % len(COLORS)], running_mean(ys) if smooth and len(points) >= 50 and label in series else None
            if label in marks:
                axes.plot(xs, ys, label=short(label), color=color, linestyle="none", marker="D", markersize=5)
                continue
            axes.plot(xs, ys, label=None if means else short(label), color=color, linewidth=0.7 if means else 1.5,
                      alpha=0.4 if means else 1.0, linestyle=LINES[0] if means else LINES[i % len(LINES)],
                      marker="o" if len(points) < 12 else None, markersize=3)
            if means:
                axes.plot(xs, means, label=short(label), color=color, linewidth=1.7, linestyle=LINES[i % len(LINES)])
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        if all(float(x).is_integer() for x in xs_drawn):
            whole_ticks(axes.xaxis)
        if log:
            axes.set_yscale("log")
            log_ticks(axes.yaxis)
        legend(canvas, axes, width)

    every = {**series, **marks}
    steps = thinned(sorted({x for points in every.values() for x, _ in points}), TABLE)
    found = {label: dict(points) for label, points in every.items()}
    rows = [{xlabel: x, **{label: found[label].get(x) for label in every}} for x in steps]
    whole = len({x for points in every.values() for x, _ in points})
    notes = []
    if smooth and any(len(points) >= 50 for points in kept.values()):
        notes.append("Bold: running mean.")
    if whole > len(steps):
        notes.append(f"The table has {len(steps)} of {whole} points; all are in metrics.jsonl.")
    said = "; ".join(f"{label}: {len(points)} points from {points[0][1]:.4g} to {points[-1][1]:.4g}" for label, points in every.items()
                     if points)
    return Figure(name, title, draw, rows, f"{title}. {ylabel} over {xlabel}. {said}", note=" ".join(notes))


def running_mean(values: list[float]) -> list[float]:
    """Centered mean over a twentieth of the values."""
    reach, sums = max(1, len(values) // 40), [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    bounds = [(max(0, i - reach), min(len(values), i + reach + 1)) for i in range(len(values))]
    return [(sums[high] - sums[low]) / (high - low) for low, high in bounds]


def colors_of(categories: Any) -> dict[str, str]:
    """The same color for a category of the ledger in every figure: plans list all of them, in one order."""
    return {category: COLORS[i % len(COLORS)] for i, category in enumerate(categories)}


def memory_bars(name: str, title: str, planned: dict[str, dict[str, int]], measured: dict[str, int]) -> Figure:
    """Stacked bars {run: {category: bytes}} in MiB, with a mark at the measured peak of each run."""
    runs = list(planned)

    def draw(canvas: Any, width: float) -> None:
        axes, names, left = plain_axes(canvas.subplots()), [short(n, 16) for n in runs][::-1], [0.0] * len(runs)
        for category, color in colors_of(dict.fromkeys(c for r in planned.values() for c in r)).items():
            values = [planned[n].get(category, 0) / MIB for n in runs[::-1]]
            if any(values):
                axes.barh(range(len(runs)), values, left=left, label=category.replace("_", " "), color=color, height=0.6)
                left = [a + b for a, b in zip(left, values)]
        label = "measured"
        for i, run in enumerate(runs[::-1]):
            if measured.get(run):
                axes.plot([measured[run] / MIB] * 2, [i - 0.4, i + 0.4], color=ink(), linewidth=2.5, label=label)
                label = None
        axes.set_yticks(range(len(runs)), names)
        axes.set_xlabel("MiB of tensors at the peak")
        legend(canvas, axes, width)

    rows = [{"run": run, **{f"{c.replace('_', ' ')} MiB": round(n / MIB, 2) for c, n in planned[run].items() if n},
             "planned MiB": round(sum(planned[run].values()) / MIB, 2),
             "measured MiB": round(measured[run] / MIB, 2) if measured.get(run) else None} for run in runs]
    said = "; ".join(f"{r['run']}: planned {r['planned MiB']:,} MiB"
                     + (f", measured {r['measured MiB']:,} MiB" if r["measured MiB"] else "") for r in rows)
    return Figure(name, title, draw, rows, f"{title}. {said}", height=1.3 + 0.4 * len(runs), narrow_height=1.8 + 0.4 * len(runs))


def memory_timeline(name: str, title: str, timeline: list[Any]) -> Figure:
    """Live bytes by category over the events of the simulated steps: [(event, phase, {category: bytes})]."""
    categories, colors = [c for c in timeline[0][2] if any(p[2].get(c) for p in timeline)], colors_of(timeline[0][2])

    def draw(canvas: Any, width: float) -> None:
        axes = plain_axes(canvas.subplots())
        axes.stackplot([p[0] for p in timeline], [[p[2].get(c, 0) / MIB for p in timeline] for c in categories],
                       labels=[c.replace("_", " ") for c in categories], colors=[colors[c] for c in categories])
        axes.set_xlabel("operations of the simulated steps")
        axes.set_ylabel("MiB")
        legend(canvas, axes, width)

    rows = [{"operation": e, "phase": phase, **{f"{c.replace('_', ' ')} MiB": round(live.get(c, 0) / MIB, 2) for c in categories}}
            for e, phase, live in thinned(timeline, TABLE)]
    top = max(timeline, key=lambda p: sum(p[2].values()))
    return Figure(name, title, draw, rows, f"{title}. Highest {sum(top[2].values()) / MIB:,.1f} MiB, in phase {top[1]}", narrow_height=3.2)


def heat(name: str, title: str, lines: list[str], columns: list[Any], values: list[list[float | None]], xlabel: str, unit: str,
         labels: list[str] | None = None) -> Figure:
    """A map: one line a site or layer, one column a step (or role); None where there is no value. labels: shorter names to draw."""
    import numpy as np

    grid = np.array([[np.nan if v is None else v for v in line] for line in values], dtype=float)

    def draw(canvas: Any, width: float) -> None:
        axes = canvas.subplots()
        image = axes.imshow(np.ma.masked_invalid(grid), aspect="auto", interpolation="nearest", cmap="viridis",
                            vmin=min(0.0, float(np.nanmin(grid))), vmax=max(float(np.nanmax(grid)), 1e-9))
        axes.spines[:].set_visible(False)
        room = 30 if width == WIDE else 15
        every = max(1, -(-len(lines) // 32))
        axes.set_yticks(range(0, len(lines), every), [short(line, room) for line in (labels or lines)[::every]], fontsize=7)
        ticks = thinned(list(range(len(columns))), 8 if width == WIDE else 4)[:9]
        axes.set_xticks(ticks if len(columns) > 9 else range(len(columns)),
                        [str(columns[i]) for i in (ticks if len(columns) > 9 else range(len(columns)))])
        axes.set_xlabel(xlabel)
        canvas.colorbar(image, ax=axes, label=unit, fraction=0.05, pad=0.02).outline.set_visible(False)

    chosen = thinned(list(range(len(columns))), 12)
    rows = [{"": line, **{f"{xlabel} {columns[i]}": values[n][i] for i in chosen}} for n, line in enumerate(lines)]
    present = grid[np.isfinite(grid)]
    alt = (f"{title}. {len(lines)} lines and {len(columns)} columns; {unit} from {present.min():.4g} to {present.max():.4g}, "
           f"mean of the last column {np.nanmean(grid[:, -1]):.4g}")
    note = f"The table has {len(chosen)} of {len(columns)} columns." if len(chosen) < len(columns) else ""
    return Figure(name, title, draw, rows, alt, height=min(9.0, 1.2 + 0.17 * max(8, min(len(lines), 40))), note=note)


def spectra(name: str, title: str, panels: dict[str, dict[str, list[float]]], rows: list[dict[str, Any]]) -> Figure:
    """Singular values over their index: one panel a role, one line a site, {role: {site: values}}."""
    def draw(canvas: Any, width: float) -> None:
        across = min(len(panels), 4 if width == WIDE else 2)
        grid = canvas.subplots(-(-len(panels) // across), across, squeeze=False, sharey=True)
        from matplotlib import colormaps

        for axes in grid.flat[len(panels):]:
            axes.set_visible(False)
        for axes, (role, lines) in zip(grid.flat, panels.items()):
            plain_axes(axes).set_title(short(role, 22))
            for i, values in enumerate(lines.values()):
                color = colormaps["viridis"](0.15 + 0.75 * i / max(1, len(lines) - 1)) if len(lines) > 1 else COLORS[0]
                drawn = [v if v > 0 else math.nan for v in values]
                axes.plot(range(1, len(values) + 1), drawn, color=color, linewidth=1.2, marker="o" if len(values) < 17 else None,
                          markersize=2.5)
            axes.set_yscale("log")
            log_ticks(axes.yaxis)
            whole_ticks(axes.xaxis)
        canvas.supxlabel("index of the singular value", fontsize=9)
        canvas.supylabel("singular value", fontsize=9)

    lines = -(-len(panels) // 4), -(-len(panels) // 2)
    largest = max((max(v, default=0.0) for p in panels.values() for v in p.values()), default=0.0)
    return Figure(name, title, draw, rows, f"{title}. {sum(map(len, panels.values()))} sites of {len(panels)} kinds; the largest singular "
                  f"value is {largest:.4g}", height=0.8 + 1.9 * lines[0], narrow_height=0.8 + 1.7 * lines[1],
                  note="One line a site, from the first layer (dark) to the last (light).")


def scores(name: str, title: str, rows: list[dict[str, Any]]) -> Figure:
    """Means with their intervals: rows with task, run, score, low, high, n."""
    tasks, runs = list(dict.fromkeys(r["task"] for r in rows)), list(dict.fromkeys(r["run"] for r in rows))

    def draw(canvas: Any, width: float) -> None:
        axes = plain_axes(canvas.subplots())
        for k, run in enumerate(runs):
            own = [(r, tasks[::-1].index(r["task"]) + 0.5 * ((len(runs) - 1) / 2 - k) / len(runs)) for r in rows if r["run"] == run]
            bars = [[max(0.0, r["score"] - r["low"]) if r["low"] is not None else 0.0 for r, _ in own],
                    [max(0.0, r["high"] - r["score"]) if r["high"] is not None else 0.0 for r, _ in own]]
            axes.errorbar([r["score"] for r, _ in own], [y for _, y in own], xerr=bars, fmt="osD^v"[k % 5], color=COLORS[k % len(COLORS)],
                          capsize=3, markersize=5, label=short(run))
        axes.set_yticks(range(len(tasks)), [short(t, 30 if width == WIDE else 15) for t in tasks[::-1]])
        axes.set_ylim(-0.6, len(tasks) - 0.4)
        axes.set_xlabel("score")
        legend(canvas, axes, width)

    said = "; ".join(f"{r['task']}, {r['run']}: {r['score']:.3f}" + ("" if r["low"] is None else f" ({r['low']:.3f} to {r['high']:.3f})")
                     for r in rows)
    size = 1.1 + 0.3 * len(tasks) + 0.12 * len(rows)
    return Figure(name, title, draw, rows, f"{title}. {said}", height=size, narrow_height=size + 0.3)
