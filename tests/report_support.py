"""Run folders made by hand, and a reader of pages, for the tests of reports."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import yaml

CATEGORIES = ("weights", "adapters", "gradients", "optimizer_state", "activations", "logits", "kv", "other")
SITES = [f"model.layers.{layer}.self_attn.{name}" for layer in range(3) for name in ("q_proj", "v_proj")]


def metrics(steps: int = 20, scale: float = 1.0) -> list[dict]:
    rows = []
    for step in range(1, steps + 1):
        rows.append({"step": step, "loss": scale * math.exp(-step / 8) + 0.01 * (step % 3), "lr": 1e-3 * (1 - step / steps),
                     "grad_norm": 0.5 + 1 / step, "tokens": 100 + step, "seconds": 0.5 + 0.01 * (step % 4), "steps": 1,
                     "tokens_per_second": 200.0 + step, "process_bytes": (900 + step) << 20})
        if step % 5 == 0:
            rows[-1]["sites"] = {"rank": {site: (7 * i + step) % 5 for i, site in enumerate(SITES)}}
            rows.append({"step": step, "eval_loss": scale * math.exp(-step / 9) + 0.2, "eval_perplexity": 2.0})
    return rows


def made_run(folder: Path, *, steps: int = 20, scale: float = 1.0, recipe: dict | None = None, bare: bool = False) -> Path:
    """A run folder with every part that a report shows; bare: with metrics only."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics(steps, scale)))
    if bare:
        return folder
    document = {"model": "tiny", "adapter": {"method": "adalora", "r": 4}, "selection": [{"method": "adalora", "target_r": 2}],
                "optimizer": {"method": "adamw", "lr": 1e-3}, "output_dir": str(folder), **(recipe or {})}
    (folder / "config.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    peak = {name: (i + 1) << 20 for i, name in enumerate(CATEGORIES)}
    timeline = [[i, "forward", {name: (i % 7 + k) << 18 for k, name in enumerate(CATEGORIES)}] for i in range(40)]
    (folder / "plan.json").write_text(json.dumps({"peak_bytes": sum(peak.values()), "categories": peak, "timeline": timeline,
                                                  "device": {"total_bytes": 950 << 20}}))
    (folder / "run.json").write_text(json.dumps({"steps": steps, "loss": 0.1, "peak_bytes": 35 << 20, "seconds": 12.5,
                                                 "measured": {"peak_bytes": 35 << 20, "step": 3}}))
    found = {site: {"shape": [64, 64], "values": [2.0 / (k + 1) for k in range(8)], "frobenius": 2.4, "stable_rank": 1.5,
                    "effective_rank": 5.0} for site in SITES}
    (folder / "spectra.json").write_text(json.dumps({"sites": found, "of": 2 * len(SITES)}))
    (folder / "samples.json").write_text(json.dumps([{"prompt": "one", "right": "1", "before": "two", "after": "1"}]))
    (folder / "eval").mkdir()
    (folder / "eval" / "dates.jsonl").write_text("".join(json.dumps({"correct": i % 4 > 0}) + "\n" for i in range(40)))
    return folder


class Page(HTMLParser):
    """tags: [(name, {attribute: value})]; text: everything that is shown; tables: rows of cells."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.text, self.tables, self._cell, self._hidden = [], "", [], None, False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._hidden = tag == "style"
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._cell = True

    def handle_endtag(self, tag):
        self._cell = None if tag in ("td", "th") else self._cell
        self._hidden = self._hidden and tag != "style"

    def handle_data(self, data):
        if not self._hidden:
            self.text += data
            if self._cell:
                self.tables[-1][-1][-1] += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)
