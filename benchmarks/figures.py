"""Scatter plots of methods with a name beside every dot: what the pages of the comparisons show."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path


def scatter(path: Path, panels: list[tuple[str, str, Mapping[str, tuple[float, float]]]], ylabel: str, *, marked: Collection[str] = (),
            yscale: str = "linear", xlim: tuple[float, float] | None = None, size: tuple[float, float] = (11, 7)) -> None:
    """panels: (label of x, its scale, {name: (x, y)}), side by side, which share the y axis. marked: names of the red dots."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    for axis, (xlabel, xscale, points) in zip(axes[0], panels):
        for name, (x, y) in points.items():
            axis.plot(x, y, "o", color="tab:red" if name in marked else "tab:blue")
            axis.annotate(name, (x, y), fontsize=7, xytext=(4, 2), textcoords="offset points")
        axis.set_xscale(xscale)
        axis.set_yscale(yscale)
        axis.set_xlabel(xlabel)
        if xlim:
            axis.set_xlim(*xlim)
    axes[0][0].set_ylabel(ylabel)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
