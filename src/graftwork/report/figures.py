"""Figures as inline SVG through matplotlib: transparent, in greys and hues that read on light and dark pages."""

from __future__ import annotations

import io
from typing import Any

INK = "#7d8590"
COLORS = ("#3f8cff", "#f08c2e", "#35a853", "#b36ae2", "#e5534b", "#2bb3b1", "#c9a227", "#8c8c8c")


def _figure(width: float, height: float):
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "graftwork", "font.size": 9, "text.color": INK, "axes.edgecolor": INK,
                         "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "legend.frameon": False})
    figure, axes = plt.subplots(figsize=(width, height))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, alpha=0.2, linewidth=0.6)
    return figure, axes


def _svg(figure) -> str:
    import matplotlib.pyplot as plt

    out = io.StringIO()
    figure.tight_layout()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    text = out.getvalue()
    return text[text.index("<svg"):]


def curves(series: dict[str, list[tuple[float, float]]], xlabel: str, ylabel: str, *, log: bool = False) -> str:
    """Lines {name: [(x, y)]}; a series of few points is drawn with markers."""
    figure, axes = _figure(6.4, 2.8)
    for (name, points), color in zip(series.items(), COLORS * 4):
        xs, ys = zip(*points) if points else ((), ())
        axes.plot(xs, ys, label=name, color=color, linewidth=1.4, marker="o" if len(points) < 12 else None, markersize=3)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if log:
        axes.set_yscale("log")
    if len(series) > 1:
        axes.legend()
    return _svg(figure)


def memory_bars(rows: dict[str, dict[str, int]], measured: dict[str, int] | None = None) -> str:
    """Stacked bars {run: {category: bytes}} in MiB, with a mark at the measured peak of each run."""
    figure, axes = _figure(6.4, 0.9 + 0.42 * len(rows))
    names = list(rows)[::-1]
    left = [0.0] * len(names)
    for category, color in zip(dict.fromkeys(c for r in rows.values() for c in r), COLORS * 2):
        values = [rows[n].get(category, 0) / 2**20 for n in names]
        if any(values):
            axes.barh(names, values, left=left, label=category.replace("_", " "), color=color, height=0.6)
            left = [a + b for a, b in zip(left, values)]
    for i, name in enumerate(names):
        if measured and measured.get(name):
            axes.plot([measured[name] / 2**20] * 2, [i - 0.38, i + 0.38], color=INK, linewidth=2, label="measured" if i == 0 else None)
    axes.set_xlabel("MiB of tensors at the peak")
    axes.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.45, 1.0 + 0.75 / (0.9 + 0.42 * len(rows))), fontsize=8)
    return _svg(figure)


def memory_timeline(timeline: list[Any]) -> str:
    """Live bytes by category over the events of the simulated steps: [(event, phase, {category: bytes})]."""
    figure, axes = _figure(6.4, 2.8)
    events = [point[0] for point in timeline]
    categories = [c for c in timeline[0][2] if any(p[2][c] for p in timeline)]
    axes.stackplot(events, [[p[2][c] / 2**20 for p in timeline] for c in categories], labels=[c.replace("_", " ") for c in categories],
                   colors=COLORS, alpha=0.85)
    axes.set_xlabel("operations of the simulated steps")
    axes.set_ylabel("MiB")
    axes.legend(ncols=4, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.25))
    return _svg(figure)
