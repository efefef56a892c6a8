"""What the comparisons of methods share: options, cells kept as files, the search for a learning rate, paired intervals, verdicts."""

from __future__ import annotations

import argparse
import fcntl
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch


def parser_of(doc: str | None, minutes: float = 150) -> argparse.ArgumentParser:
    """The options that every matrix has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--minutes", type=float, default=minutes)
    parser.add_argument("--table", action="store_true", help="the table of the cells that exist, run nothing")
    return parser


def unclaimed(labels: Iterable[str], out: Path) -> Iterator[str]:
    """Those that no other process is at, each claimed until the next is asked for; a process that ends, however, lets go of its own."""
    for label in labels:
        lock = out / slug(label) / "claimed"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            try:
                yield label
            finally:
                lock.unlink(missing_ok=True)


def slug(label: str) -> str:
    """A label as the name of its folder."""
    return label.replace(", ", "-").replace(" + ", "+").replace(" ", "_")


def cell(path: Path, make, *arguments, rate: float | None = None) -> Any:
    """The result in this file, or of make(*arguments), which is then written there. rate: a result of another rate is none."""
    if path.exists():
        found = json.loads(path.read_text())
        if rate is None or found["rate"] == rate:
            return found
    found = make(*arguments)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found) + "\n")
    return found


def order(mean: float | None) -> float:
    return -math.inf if mean is None or math.isnan(mean) else mean


def best_rate(tried: dict[float, float | None]) -> float:
    """The lowest of the best, whatever the order they come in."""
    return max(sorted(tried), key=lambda rate: order(tried[rate]))


def candidates(rates: Sequence[float], tried: dict[float, float | None], below: Sequence[float] = (),
               above: Sequence[float] = ()) -> Iterator[float]:
    """The rates to try: these, then those below while the best is the lowest tried, those above while it is the highest.
    Which come depends on what the caller found and put into `tried` (higher is better)."""
    yield from rates
    for further, edge in ((below, min), (above, max)):
        for rate in further:
            if best_rate(tried) != edge(tried):
                break
            yield rate


def interval(ours: list[list[float]], theirs: list[list[float]], draws: int = 2000) -> tuple[float, float, float]:
    """Mean difference and its 95 % interval; rows and seeds are drawn together, so that equal rows stay paired."""
    gains = torch.tensor(ours, dtype=torch.float64) - torch.tensor(theirs, dtype=torch.float64)  # (seeds, rows)
    generator = torch.Generator().manual_seed(0)
    seeds = torch.randint(gains.shape[0], (draws, gains.shape[0]), generator=generator)
    rows = torch.randint(gains.shape[1], (draws, gains.shape[1]), generator=generator)
    means = torch.stack([gains[s][:, r].mean() for s, r in zip(seeds, rows)]).sort().values
    return float(gains.mean()), float(means[int(0.025 * draws)]), float(means[int(0.975 * draws) - 1])


def verdict(mean: float, low: float, high: float) -> str:
    """Of scores where higher is better."""
    return "better" if low > 0 else "worse" if high < 0 else "no difference"
