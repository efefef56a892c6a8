"""Files to normalized examples, and the counts that a user sees of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import DataError
from .example import Example, located
from .files import read_rows
from .formats import Format, check_columns, detect_format, get_format, map_columns

Progress = Callable[[str, int], None]
REASONS_KEPT = 5


@dataclass
class Statistics:
    """Counts of one data set. Lengths are in tokens; `longest` and `truncated` are of the rows before cutting."""

    examples: int = 0       # usable examples
    rows: int = 0           # rows of the data set; fewer than the examples when packed
    tokens: int = 0         # after cutting
    trained_tokens: int = 0  # targets of the loss: the first token of an example is never one; with classes, the labels
    truncated: int = 0
    longest: int = 0
    skipped: int = 0        # bad rows, with skip_bad
    dropped: int = 0        # cut so short that nothing trained was left
    reasons: list[str] = field(default_factory=list)  # the first few of the skipped and dropped
    notes: list[str] = field(default_factory=list)    # what the user should know

    @property
    def share_truncated(self) -> float:
        return self.truncated / max(self.examples + self.dropped, 1)

    def skip(self, error: DataError) -> None:
        self.skipped += 1
        self._because(error.message)

    def drop(self, reason: str) -> None:
        self.dropped += 1
        self._because(reason)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _because(self, reason: str) -> None:
        if len(self.reasons) < REASONS_KEPT:
            self.reasons.append(reason)

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "share_truncated": self.share_truncated}


@contextmanager
def terminal_progress() -> Iterator[Progress | None]:
    """A counter of rows on stderr if that is a terminal, else None."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress as Bar
    from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn("{task.description}: {task.completed} rows"), TimeElapsedColumn()
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=None)
            bar.update(tasks[stage], completed=done)

        yield show


def load_dataset_rows(path, *, format: str = "auto", columns: dict[str, str] | None = None, skip_bad: bool = False,
                      limit: int | None = None, online: bool = False, adapter: str | None = None,
                      statistics: Statistics | None = None, progress: Progress | None = None) -> list[Example]:
    """Normalized examples of a path, glob or list, in file order. `adapter` names one for rows that name none.

    Raises DataError with file, line, reason and remedy at the first bad row; with skip_bad it is counted in `statistics`
    instead, and only a set without a usable row is an error. `format: auto` is decided by the first readable row of
    each file. Raises UsageError for an unknown format or field.
    """
    chosen: dict[str, Format] = {}
    fixed = None if format == "auto" else get_format(format)
    check_columns(columns, format)
    statistics, examples = statistics if statistics is not None else Statistics(), []
    for source, row in read_rows(path, online=online):
        if limit is not None and len(examples) >= limit:
            break
        try:
            if isinstance(row, DataError):
                raise row
            row = map_columns(row, columns)
            reader = fixed or chosen.get(source.file) or chosen.setdefault(source.file, detect_format(row))
            own = row.get("adapter", adapter)
            if own is not None and not isinstance(own, str):
                raise DataError(f"'adapter' must be a name, it is {type(own).__name__}", remedy="write it as a string")
            examples.append(replace(reader.parse(row), adapter=own or None, source=source))
        except DataError as error:
            error = located(error, source)
            if not skip_bad:
                raise error from None
            statistics.skip(error)
        if progress:
            progress("reading", len(examples) + statistics.skipped)
    if not examples:
        raise nothing_usable(path, statistics)
    return examples


def nothing_usable(path, statistics: Statistics) -> DataError:
    lines = "".join(f"\n  {reason}" for reason in statistics.reasons)
    return DataError(f"no row of {path} is usable ({statistics.skipped} skipped, {statistics.dropped} dropped){lines}",
                     remedy="mend the rows; if all were cut, raise max_length or shorten the prompts")
