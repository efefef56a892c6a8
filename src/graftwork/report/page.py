"""The page: sections of text, tables and figures in one HTML file (no script, no network; light and dark; phone width)."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

from ..files import atomic_write_text
from . import figures

STYLE = """
:root{color-scheme:light dark;--line:#8883;--soft:#8881}
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem;border-bottom:1px solid var(--line)}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem;min-width:50%}
th,td{padding:.3rem .6rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
td.n{text-align:right;font-variant-numeric:tabular-nums}
svg{max-width:100%;height:auto}pre{background:var(--soft);padding:.8rem;overflow-x:auto;font-size:.85rem}
code{background:var(--soft);padding:0 .2rem}.bad{color:#d1242f}.good{color:#1a7f37}
"""


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of equal keys as an HTML table; numbers to the right."""
    if not rows:
        return "<p>nothing to show</p>"
    head = "".join(f"<th>{escape(str(k))}</th>" for k in rows[0])
    body = "".join("<tr>" + "".join(_cell(v) for v in row.values()) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _cell(value: Any) -> str:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    text = f"{value:,}" if isinstance(value, int) and number else f"{value:.4g}" if number else escape(str(value))
    return f'<td class="n">{text}</td>' if number else f"<td>{text}</td>"


def write_page(path: str | Path, title: str, sections: list[tuple[str, str]]) -> Path:
    """Write the page atomically. sections: (heading, HTML)."""
    body = "".join(f"<h2>{escape(heading)}</h2>\n{html}\n" for heading, html in sections)
    atomic_write_text(path, f"<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport "
                            f'content="width=device-width,initial-scale=1"><title>{escape(title)}</title><style>{STYLE}</style></head>'
                            f"<body><h1>{escape(title)}</h1>\n{body}</body></html>\n")
    return Path(path)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()] if path.exists() else []


def loss_section(rows: list[dict[str, Any]]) -> str:
    """Training and evaluation loss and the learning rate over the steps."""
    series = {"training loss": [(r["step"], r["loss"]) for r in rows if "loss" in r],
              "evaluation loss": [(r["step"], r["eval_loss"]) for r in rows if "eval_loss" in r]}
    html = figures.curves({k: v for k, v in series.items() if v}, "step", "loss (nats)")
    rates = [(r["step"], r["lr"]) for r in rows if r.get("lr") is not None]
    return html + (figures.curves({"learning rate": rates}, "step", "learning rate") if rates else "")


def write_run_report(folder: str | Path) -> Path:
    """report.html of a run folder: summary, loss curves, memory, samples, recipe. Shows what is there."""
    folder = Path(folder)
    run = json.loads((folder / "run.json").read_text()) if (folder / "run.json").exists() else {}
    rows, sections = read_metrics(folder), []
    kept = {k: v for k, v in run.items() if not isinstance(v, (dict, list))}
    sections.append(("Summary", table([kept | {f"{k}": v for k, v in run.get("metrics", {}).items() if isinstance(v, (int, float))}])))
    if rows:
        sections.append(("Loss", loss_section(rows)))
    plan_file = folder / "plan.json"
    if plan_file.exists():
        plan = json.loads(plan_file.read_text())
        measured = {"run": run["peak_bytes"]} if run.get("peak_bytes") else None
        html = figures.memory_bars({"run": plan["categories"]}, measured)
        if plan.get("timeline"):
            html += figures.memory_timeline(plan["timeline"])
        sections.append(("Memory: planned, and measured at the heaviest step", html))
    elif run.get("peak_bytes"):
        sections.append(("Memory", f"<p>measured peak of one step: {run['peak_bytes'] / 2**20:,.1f} MiB of tensors</p>"))
    samples = folder / "samples.json"
    if samples.exists():
        sections.append(("Samples", table(json.loads(samples.read_text()))))
    if (folder / "config.yaml").exists():
        sections.append(("Recipe", f"<pre>{escape((folder / 'config.yaml').read_text())}</pre>"))
    return write_page(folder / "report.html", f"Run {folder.name}", sections)
