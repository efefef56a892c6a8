"""Rows with choices, and rows with tests: what they hold beside a prompt, and how they become training rows for the loss.

    {"prompt" | "question", "choices": [...], "answer": index, letter, or the choice}        multiple choice
    {"prompt", "test" | "test_list", "entry_point"?, "canonical_solution"? | "code"?}          a program that tests judge

`choices` may be ARC's {"text": [...], "label": [...]}. The loss and exact match of such rows are those of the right choice, or of the
given solution. Between a raw prompt and a choice stands a space, unless one of them brings white space. Tests of HumanEval define
check(candidate); `entry_point` names the function that it is called with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import DataError, nearest

Row = dict[str, Any]
CHOICES = ("choices", "options", "endings")
ANSWERS = ("answer", "answerKey", "gold", "label", "answer_index")
SOLUTIONS = ("canonical_solution", "solution", "completion")
#: what stands for the answer of a row that has none, so that its prompt can be rendered
PLACEHOLDER = "?"


@dataclass(frozen=True)
class Choices:
    """Texts of the choices and the place of the right one; separator: what stands between the prompt and a choice."""

    texts: tuple[str, ...]
    right: int
    separator: str = ""


@dataclass(frozen=True)
class Tests:
    """A program's tests. source: Python that raises unless the program passes. entry_point: the function that is asked for."""

    source: str
    entry_point: str | None = None


def choices_of(row: Row, *, raw: bool = True) -> tuple[Row, Choices | None]:
    """(the row as prompt and completion, its choices); the row itself and None where it has none. raw: whether a prompt is rendered as
    text, not as a message. Raises DataError."""
    field = next((name for name in CHOICES if isinstance(row.get(name), (list, dict))), None)
    if field is None:
        return row, None
    value, names = row[field], None
    if isinstance(value, dict):
        value, names = value.get("text"), value.get("label")
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(text, str) and text.strip() for text in value):
        raise DataError(f"'{field}' must be a list of at least two texts", remedy='write "choices": ["yes", "no"], "answer": 0')
    key = next((name for name in ANSWERS if row.get(name) is not None), None)
    if key is None:
        raise DataError("a row with choices has no answer", remedy=f"add one of {', '.join(ANSWERS)}: index, letter, or the choice")
    prompt = {name: row[name] for name in ("messages", "prompt") if name in row} or {"prompt": row.get("question")}
    right = _place(row[key], value, names, key)
    if "messages" in prompt:
        if not isinstance(prompt["messages"], list):
            raise DataError("'messages' must be a list of messages")
        return {"messages": [*prompt["messages"], {"role": "assistant", "content": value[right]}], **_kept(row)}, Choices(
            tuple(value), right)
    if not isinstance(prompt["prompt"], str) or not prompt["prompt"]:
        raise DataError("a row with choices has no 'prompt' or 'question'", remedy="add the text that stands before the choices")
    spaced = prompt["prompt"][-1].isspace() or any(text[0].isspace() for text in value)
    separator = " " if raw and not spaced else ""
    return {**prompt, "completion": separator + value[right], **_kept(row)}, Choices(tuple(value), right, separator)


def _kept(row: Row) -> Row:
    return {"adapter": row["adapter"]} if "adapter" in row else {}


def _place(answer: Any, texts: list[str], names: list | None, key: str) -> int:
    """Which choice an answer means: its text, its name, its index, its letter."""
    if isinstance(answer, str) and answer in texts:
        return texts.index(answer)
    if isinstance(names, list) and answer in names:
        return names.index(answer)
    index = answer
    if isinstance(answer, str) and answer.strip().isdecimal():
        index = int(answer)
    elif isinstance(answer, str) and len(answer) == 1 and "A" <= answer.upper() <= "Z":
        index = ord(answer.upper()) - ord("A")
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(texts):
        raise DataError(f"'{key}' is {answer!r}, which is none of the {len(texts)} choices{nearest(str(answer), texts)}",
                        remedy="write the index (from 0), the letter, or the choice itself")
    return index


def tests_of(row: Row) -> tuple[Row, Tests | None]:
    """(the row as prompt and completion, its tests); the row itself and None where it has none. Raises DataError."""
    source, entry = row.get("test"), row.get("entry_point")
    if source is None and isinstance(row.get("test_list"), list):
        source = "\n".join(map(str, row["test_list"]))
    if source is None or "prompt" not in row:
        return row, None
    if not isinstance(source, str) or not source.strip():
        raise DataError("'test' must be Python source", remedy='write "test": "assert f(1) == 2"')
    if entry is not None and not (isinstance(entry, str) and entry.isidentifier()):
        raise DataError(f"'entry_point' is {entry!r}, which is no name of a function")
    if "def check(" in source and entry is None:
        raise DataError("the test defines check(candidate), and 'entry_point' does not say what to call it with",
                        remedy='add "entry_point": "name_of_the_function"')
    if "def check(" in source and "\ncheck(" not in source:
        source += f"\ncheck({entry})\n"
    solution = next((row[name] for name in SOLUTIONS if isinstance(row.get(name), str) and row[name].strip()), None)
    return {"prompt": row["prompt"], "completion": solution or PLACEHOLDER, **_kept(row)}, Tests(source, entry)
