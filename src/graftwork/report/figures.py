"""Figures through matplotlib: inline SVG for a page, a file for a paper, and the numbers behind both.

On a page a figure is there twice, drawn for a wide screen and for a phone; the style sheet shows one of them. Its ink is the color of
the page's text, the other colors read on light and on dark. Text is never parsed as mathematics: it may come from a user.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from ..files import atomic_write_bytes
from .tables import table

#: coordinates of paths, of which two decimals are kept
PATH, DIGITS = re.compile(r' d="[^"]*"'), re.compile(r"(\.\d\d)\d+")
#: ids of an SVG and references to them: of those that nothing refers to a page would have many
IDS, USES = re.compile(r' id="([^"]*)"'), re.compile(r'(?:xlink:href="|url\()#([\w.-]+)')
#: stands for the color of the page's text until the SVG is written
INK = "#7d8591"
COLORS = ("#3f8cff", "#d9730d", "#2a9648", "#b36ae2", "#e5534b", "#178f8d", "#a67c00", "#8c8c8c")
LINES = ("-", "--", "-.", ":")
WIDE, NARROW = 8.4, 3.4  # inches
FORMATS = ("svg", "png")


@dataclass
class Figure:
    """name: of its file. draw(canvas, width) puts it on a matplotlib figure. rows: the numbers behind it. alt: what it shows, in words.
    height in inches. note: printed below."""

    name: str
    title: str
    draw: Callable[[Any, float], None]
    rows: list[dict[str, Any]]
    alt: str
    height: float = 2.9
    narrow_height: float | None = None
    note: str = ""

    def html(self) -> str:
        """The figure, its caption and its numbers."""
        both = "".join(f'<div class="{kind}">{self._svg(width, kind)}</div>' for kind, width in (("wide", WIDE), ("narrow", NARROW)))
        note = f"<br>{escape(self.note)}" if self.note else ""
        numbers = f"<details><summary>Numbers</summary>{table(self.rows)}</details>" if self.rows else ""
        caption = f"<figcaption><b>{escape(self.title)}</b>{note}</figcaption>"
        return f'<figure id="figure-{escape(self.name)}">{caption}{both}{numbers}</figure>\n'

    def save(self, folder: Path, format: str) -> Path:
        """Write NAME.svg or NAME.png, dark ink on white."""
        path = folder / f"{self.name}.{format}"
        atomic_write_bytes(path, self._render(WIDE, format, "#333333", "export"))
        return path

    def _svg(self, width: float, kind: str) -> str:
        text = self._render(width, "svg", INK, kind).decode()
        text = text[text.index("<svg"):].replace(INK, "currentColor")
        text = PATH.sub(lambda found: DIGITS.sub(r"\1", found[0]), text)
        used = set(USES.findall(text))
        text = IDS.sub(lambda found: found[0] if found[1] in used else "", text)
        return text.replace("<svg ", f'<svg role="img" aria-label="{escape(self.alt)}" ', 1)

    def _render(self, width: float, format: str, ink: str, salt: str) -> bytes:
        import matplotlib
        from matplotlib.figure import Figure as Canvas

        height = self.narrow_height if width == NARROW and self.narrow_height else self.height
        # ids of clips and markers come from the salt: those of two figures on a page must differ
        style = {"svg.fonttype": "none", "svg.hashsalt": f"{self.name}/{salt}", "font.size": 9, "text.color": ink, "text.parse_math": False,
                 "axes.edgecolor": ink, "axes.labelcolor": ink, "xtick.color": ink, "ytick.color": ink, "legend.frameon": False,
                 "axes.titlesize": 9, "axes.titlecolor": ink, "axes.unicode_minus": False, "grid.color": ink, "legend.fontsize": 8}
        with matplotlib.rc_context(style), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a reader's own font may have it
            canvas = Canvas(figsize=(width, height), layout="constrained", facecolor="white" if salt == "export" else "none")
            self.draw(canvas, width)
            for axes in canvas.axes:
                axes.set_facecolor("none")
            out = io.BytesIO()
            canvas.savefig(out, format=format, facecolor="auto", dpi=160, metadata={"Date" if format == "svg" else "Software": None})
        return out.getvalue()


def ink() -> str:
    """The color of text in the figure that is being drawn."""
    import matplotlib

    return matplotlib.rcParams["text.color"]


def plain_axes(axes: Any) -> Any:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, alpha=0.2, linewidth=0.6)
    return axes


def short(name: str, width: int = 30) -> str:
    """A label of bounded length; matplotlib leaves out labels that begin with an underscore."""
    name = " ".join(str(name).split())
    name = name if len(name) <= width else "..." + name[-width + 3:]
    return f" {name}" if name.startswith("_") else name


def legend(canvas: Any, axes: Any, width: float) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > 1:
        columns = 4 if width == WIDE else 2 if max(map(len, labels)) < 22 else 1
        canvas.legend(handles, labels, loc="outside upper left", ncols=min(columns, len(handles)))


def log_ticks(axis: Any) -> None:
    """0.01 rather than a power, which would need mathematics."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        """Chooses the ticks that get a label as LogFormatter does."""

        def __call__(self, x, pos=None):
            return f"{x:g}" if super().__call__(x, pos) else ""

    axis.set_major_formatter(Plain())
    axis.set_minor_formatter(Plain(labelOnlyBase=False, minor_thresholds=(1.5, 0.4)))


def whole_ticks(axis: Any) -> None:
    """No halves of a step."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))


def thinned(items: list[Any], limit: int) -> list[Any]:
    """At most about `limit` of the items, evenly, with the last."""
    every = -(-len(items) // limit)
    kept = items[::every] if every > 1 else list(items)
    return kept if not items or kept[-1] is items[-1] else [*kept, items[-1]]
