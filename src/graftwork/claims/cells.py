"""Measured cells as files: one per arm, rate and seed, so that a run that was ended goes on where it was.

A cell's file holds what it was made from (`of`), as a digest; where the claim has changed since, it is measured again. It also holds
what it took, so that a claim's cost is known however often its run was ended.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..files import atomic_write_text


def digest(thing: Any) -> str:
    return hashlib.sha256(json.dumps(thing, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Cells:
    """A folder of cells. tell(done, total, label): progress, total is what `expect` announced. seconds, cpu: wall and processor seconds
    that all cells took which were asked for, when they were made."""

    def __init__(self, folder: Path, tell: Callable[[int, int, str], None] | None = None):
        self.folder, self.tell = Path(folder), tell or (lambda done, total, label: None)
        self.done, self.total = 0, 0
        self.seconds, self.cpu = 0.0, 0.0

    def expect(self, cells: int) -> None:
        self.total += cells

    def get(self, name: str, of: Any, make: Callable[[], Any], label: str | None = None,
            enough: Callable[[Any], bool] = lambda result: True) -> Any:
        """The result kept under a name, or of make(), which is then kept. label: what progress calls it. enough: whether a kept result
        holds what is needed here; else it is made again."""
        if not re.fullmatch(r"[\w.+-]+(/[\w.+-]+)*", name) or ".." in name:
            raise UsageError(f"'{name}' cannot be the name of a cell", remedy="names of arms are letters, digits, _ - .")
        path, made_of = self.folder / f"{name}.json", digest(of)
        self.tell(self.done, self.total, label or name)
        kept = self._kept(path, made_of)
        if kept is None or not enough(kept["result"]):
            wall, cpu = time.monotonic(), time.process_time()
            kept = {"of": made_of, "result": make()}
            kept |= {"seconds": round(time.monotonic() - wall, 2), "cpu": round(time.process_time() - cpu, 2)}
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_text(path, json.dumps(kept) + "\n")
        self.seconds += kept.get("seconds", 0.0)
        self.cpu += kept.get("cpu", 0.0)
        self.done += 1
        self.tell(self.done, max(self.total, self.done), label or name)
        return kept["result"]

    @staticmethod
    def _kept(path: Path, made_of: str) -> dict[str, Any] | None:
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return kept if isinstance(kept, dict) and kept.get("of") == made_of and kept.get("result") is not None else None
