"""Evaluation rows: the examples of a data file with all answers that count as right.

The formats are those of training. In addition a row may give several accepted answers: a list in place of the answer
(`completion`, `output`) or in one of ANSWER_LISTS. The answer that stands in the row for the loss is then the first.
Rows with choices or with tests are read by kinds.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..data import DataConfig, Example, Renderer, Statistics, detect_format, read_rows
from ..data.example import located
from ..data.formats import check_columns, get_format, map_columns
from ..errors import DataError
from .kinds import PLACEHOLDER, Choices, Tests, choices_of, tests_of

#: fields of a row that may hold further accepted answers
ANSWER_LISTS = ("refs", "references", "outputs", "answers", "targets")
_ANSWERS = {"completion": "prompt", "output": "instruction"}  # the answer of a format, and what it answers


@dataclass(frozen=True)
class Task:
    """One row: the example (for the loss) and every accepted answer, its own included. Rows to classify, plain texts and
    tests without a solution have no answers."""

    example: Example
    answers: tuple[str, ...] = ()
    choices: Choices | None = None
    tests: Tests | None = None

    @property
    def source(self) -> str:
        return str(self.example.source)


def read_tasks(path: Any, config: DataConfig | None = None, *, limit: int | None = None,
               statistics: Statistics | None = None) -> list[Task]:
    """The rows of a file, glob or list, read with the options of a recipe's data section (format, columns, skip_bad ...).

    Raises DataError with file and line at the first bad row, unless skip_bad (then counted in `statistics`)."""
    config = config or DataConfig(train="-")
    statistics = statistics if statistics is not None else Statistics()
    fixed = None if config.format == "auto" else get_format(config.format)
    check_columns(config.columns, config.format)
    chosen: dict[str, Any] = {}
    tasks: list[Task] = []
    for source, row in read_rows(path, online=config.online):
        if limit is not None and len(tasks) >= limit:
            break
        try:
            if isinstance(row, DataError):
                raise row
            row, choices = choices_of(row, raw=not config.chat)
            row, tests = tests_of(row) if choices is None else (row, None)
            row, answers = _answers(row, config.columns)
            reader = fixed or chosen.get(source.file) or chosen.setdefault(source.file, detect_format(row))
            example = replace(reader.parse(row), adapter=row.get("adapter"), source=source)
            if not isinstance(example.adapter, str | None):
                raise DataError("'adapter' must be a name", remedy="write it as a string, or null")
            own = _own_answer(example)
            if tests is not None and own == PLACEHOLDER:
                own = None
            tasks.append(Task(example, tuple(dict.fromkeys([own, *answers])) if own is not None else (), choices, tests))
        except DataError as error:
            if not config.skip_bad:
                raise located(error, source) from None
            statistics.skip(located(error, source))
    if not tasks:
        raise DataError(f"no row of {path} is usable ({statistics.skipped} skipped)", remedy="mend the rows")
    return tasks


def _own_answer(example: Example) -> str | None:
    if example.messages is not None:
        return next((m["content"] for m in reversed(example.messages) if m["role"] == "assistant"), None)
    return example.completion


def _answers(row: dict[str, Any], columns: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
    """(the row under the format's names with one answer, all answers that it lists)."""
    listed: list[str] = []
    for name in ANSWER_LISTS:
        value = row.get(name)
        listed += [v for v in value if isinstance(v, str)] if isinstance(value, list) else []
    for field, prompt in _ANSWERS.items():
        name = columns.get(field, field)
        value = row.get(name)
        if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
            listed = [*value, *listed]
            row = {**row, name: value[0]}
        elif value is None and listed and columns.get(prompt, prompt) in row:
            row = {**row, name: listed[0]}
    return map_columns(row, columns), listed


def prompt_and_answer(renderer: Renderer, example: Example) -> tuple[list[int], list[int]]:
    """Token ids up to the last answer, exactly as training renders them, and those of the answer. `renderer` trains on the
    last answer only. Raises DataError with file and line."""
    try:
        ids, trained = renderer.encode(example)
    except DataError as error:
        raise (located(error, example.source) if example.source else error) from None
    start = trained.index(True)
    return ids[:start], [token for token, learned in zip(ids[start:], trained[start:]) if learned]


def label_names(tasks: Sequence[Task]) -> tuple[str, ...] | None:
    """Labels that occur, sorted, where the rows are to be classified; None otherwise."""
    first = tasks[0].example
    return None if first.label is None or first.is_real else tuple(sorted({str(t.example.label) for t in tasks}))
