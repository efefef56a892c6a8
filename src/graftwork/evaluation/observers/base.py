"""What observers work on: a model, rows, targets, settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ...data import DataConfig
from ...errors import UsageError
from ..journal import Journal
from ..tasks import Task

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Code:
    """How programs are run. allowed: the user agreed that code of a model is run here."""

    allowed: bool = False
    seconds: float = 10.0
    memory_mib: int = 1024
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    workers: int = 1


@dataclass
class Settings:
    """Options of an evaluation; see `evaluate`."""

    config: DataConfig = field(default_factory=lambda: DataConfig(train="-"))
    batch_size: int = 16
    max_new_tokens: int | None = None
    finder: Any = None
    stop: Sequence[str] = ()
    labels: Sequence[str] | None = None
    stride: int | None = None
    window: int | None = None
    code: Code = Code()
    seed: int = 0
    journal: Path | None = None
    identity: str = ""


@dataclass
class View:
    """tasks: the rows of the data. targets: {name: graft of each task, or None: the model as it stands}. rows: {target: one mapping a
    task}, which observers fill. also: further scores of all targets. seen: the observers that have run."""

    model: nn.Module
    tokenizer: Any
    objective: Any
    tasks: list[Task]
    targets: dict[str, Sequence[str | None] | None]
    settings: Settings
    progress: Progress | None = None
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    also: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        if self.settings.window is not None and self.settings.stride is None:
            raise UsageError(f"windows of {self.settings.window} tokens do not say by how much they move",
                             remedy="add --stride; to cut rows: max_length=N")
        if len(self.targets) > 1 and any(routes is None for routes in self.targets.values()):
            raise UsageError("several targets are told apart by the grafts of their rows, and one names none")
        for name, routes in self.targets.items():
            if routes is not None and len(routes) != len(self.tasks):
                raise UsageError(f"{len(routes)} adapters are named for {len(self.tasks)} rows")
            self.rows[name] = [{"source": task.source, "adapter": routes[i] if routes else None, "prediction": None,
                                "references": list(task.answers)} for i, task in enumerate(self.tasks)]

    @property
    def routed(self) -> bool:
        return next(iter(self.targets.values())) is not None

    def jobs(self) -> list[tuple[int, dict[str, Any], str | None]]:
        """(task number, row to fill, graft) of every task under every target, a task's targets one after the other."""
        return [(i, self.rows[name][i], routes[i] if routes else None) for i in range(len(self.tasks))
                for name, routes in self.targets.items()]

    def names(self, grafts: Sequence[str | None]) -> list[str | None] | None:
        """The grafts themselves; None where the model answers as it stands."""
        return list(grafts) if self.routed else None

    def say(self, stage: str) -> Callable[[int, int], None] | None:
        return None if self.progress is None else lambda done, total: self.progress(stage, done, total)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def open_journal(self) -> Journal:
        return Journal(self.settings.journal, self.settings.identity)
