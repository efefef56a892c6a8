"""The data formats: one small class each, from a raw row to an `Example`.

A format is added by adding a class here: `fields` names what the user may map with `columns`, `required` what must be
there, `recognizes` decides for `format: auto` (asked in the order of definition, the most specific first).
Errors carry the reason and the remedy only; `load_dataset_rows` puts file and line in front.
"""

from __future__ import annotations

import json
import math
from decimal import Decimal
from typing import Any, ClassVar

from ..errors import DataError, UsageError, nearest
from .example import ROLES, Example

Row = dict[str, Any]
FORMATS: dict[str, Format] = {}


def data_format(cls: type[Format]) -> type[Format]:
    """Class decorator: makes the format known under its name."""
    FORMATS[cls.name] = cls()
    return cls


class Format:
    """Base. `parse(row)` returns the Example or raises DataError. task: the kind of model that learns from such rows."""

    name: ClassVar[str]
    task: ClassVar[str] = "causal_lm"
    required: ClassVar[tuple[str, ...]]
    optional: ClassVar[tuple[str, ...]] = ()

    @property
    def fields(self) -> tuple[str, ...]:
        return (*self.required, *self.optional, "adapter")

    def recognizes(self, row: Row) -> bool:
        return all(name in row for name in self.required)

    def parse(self, row: Row) -> Example:
        raise TypeError(f"{type(self).__name__} is abstract")

    def value(self, row: Row, name: str) -> Any:
        if name not in row:
            raise DataError(f"field '{name}' of format '{self.name}' is missing{nearest(name, row)}",
                            remedy=f"add it, or map it with columns: {{{name}: NAME}}; fields here: {', '.join(row) or 'none'}")
        return row[name]

    def text(self, row: Row, name: str, *, empty: bool = False) -> str:
        return _text(self.value(row, name), f"field '{name}'", empty=empty)


def _text(value: Any, what: str, *, empty: bool) -> str:
    if not isinstance(value, str):
        raise DataError(f"{what} must be text, it is {type(value).__name__}", remedy="write it as a string")
    if not empty and not value.strip():
        raise DataError(f"{what} is empty", remedy="fill it, remove the row, or set skip_bad")
    return value


def _decoded(value: Any, what: str) -> Any:
    """CSV and Parquet files keep nested values as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise DataError(f"{what} is text but not JSON: {error.msg} at column {error.colno}",
                        remedy="write it as a JSON value") from None


def _list(value: Any, what: str) -> list:
    value = _decoded(value, what)
    if not isinstance(value, (list, tuple)) or not value:
        raise DataError(f"{what} must be a list with at least one item", remedy="remove the row, or set skip_bad")
    return list(value)


def _tools(row: Row) -> tuple[dict, ...] | None:
    if row.get("tools") in (None, "", []):
        return None
    tools = _list(row["tools"], "'tools'")
    if not all(isinstance(tool, dict) for tool in tools):
        raise DataError("'tools' must hold objects", remedy='each tool is {"type": "function", "function": {...}}')
    return tuple(tools)


def _tool_call(call: Any, what: str) -> dict:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"{what} has no function name", remedy='write {"function": {"name": ..., "arguments": {...}}}')
    # OpenAI sends arguments as JSON text, templates print them with tojson: text would come out quoted twice.
    arguments = _decoded(function.get("arguments", {}), f"arguments of {what}")
    extra = {k: call[k] for k in ("id",) if k in call}
    return {**extra, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _content(content: Any, what: str) -> str:
    if content is None:
        return ""
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type", "text") == "text" for part in content):
            raise DataError(f"{what} has parts that are not text", remedy="only text can be trained on; remove the other parts")
        return "".join(_text(part.get("text", ""), f"a part of {what}", empty=True) for part in content)
    return _text(content, what, empty=True)


def parse_message(message: Any, number: int) -> dict[str, Any]:
    """One message in OpenAI's form. `reasoning` becomes `reasoning_content`, the name that templates read."""
    what = f"message {number}"
    if not isinstance(message, dict) or "role" not in message:
        known = list(message) if isinstance(message, dict) else []
        raise DataError(f"{what} has no 'role'{nearest('role', known)}",
                        remedy="messages have 'role' and 'content'; 'from' and 'value' are format sharegpt")
    role = {"function": "tool"}.get(message["role"], message["role"])
    if role not in ROLES:
        raise DataError(f"{what} has the unknown role {role!r}{nearest(str(role), ROLES)}",
                        remedy=f"roles: {', '.join(ROLES)}")
    parsed = {"role": role, "content": _content(message.get("content"), f"the content of {what}")}
    calls = message.get("tool_calls")
    if calls:
        parsed["tool_calls"] = [_tool_call(c, f"tool call {n} of {what}") for n, c in enumerate(_list(calls, "'tool_calls'"), 1)]
    thought = message.get("reasoning_content") or message.get("reasoning")
    if thought:
        parsed["reasoning_content"] = _text(thought, f"the reasoning of {what}", empty=False)
    parsed.update({k: message[k] for k in ("name", "tool_call_id") if message.get(k) is not None})
    if role == "assistant" and message.get("weight") is not None:
        if message["weight"] not in (0, 1):
            raise DataError(f"the weight of {what} is {message['weight']!r}", remedy="weight is 1 (trained) or 0 (not trained)")
        parsed["weight"] = int(message["weight"])
    if role == "assistant" and not parsed["content"].strip() and not calls:
        raise DataError(f"{what} is an empty answer of the assistant", remedy="fill it, remove the row, or set skip_bad")
    return parsed


def _conversation(messages: list[dict], *, tools=None, completion_start: int | None = None) -> Example:
    if not any(m["role"] == "assistant" for m in messages[completion_start or 0:]):
        raise DataError("the conversation has no answer of the assistant", remedy="add one, remove the row, or set skip_bad")
    return Example(messages=tuple(messages), tools=tools, completion_start=completion_start)


@data_format
class Messages(Format):
    """OpenAI chat: `messages` [{role, content, tool_calls, reasoning_content, weight}], optional `tools`."""

    name, required, optional = "messages", ("messages",), ("tools",)

    def parse(self, row: Row) -> Example:
        messages = [parse_message(m, n) for n, m in enumerate(_list(self.value(row, "messages"), "'messages'"), 1)]
        return _conversation(messages, tools=_tools(row))


@data_format
class ShareGPT(Format):
    """`conversations` [{from, value}], optional `system` and `tools`."""

    name, required, optional = "sharegpt", ("conversations",), ("system", "tools")
    roles = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
             "chatgpt": "assistant", "system": "system", "tool": "tool", "observation": "tool", "function_response": "tool",
             "function_call": "assistant"}

    def parse(self, row: Row) -> Example:
        turns = _list(self.value(row, "conversations"), "'conversations'")
        messages = [self.turn(turn, number) for number, turn in enumerate(turns, 1)]
        if row.get("system"):
            messages.insert(0, {"role": "system", "content": self.text(row, "system")})
        return _conversation(messages, tools=_tools(row))

    def turn(self, turn: Any, number: int) -> dict[str, Any]:
        if not isinstance(turn, dict) or not {"from", "value"} <= set(turn):
            raise DataError(f"turn {number} lacks 'from' or 'value'",
                            remedy="turns with 'role' and 'content' are format messages: set columns: {messages: conversations}")
        if turn["from"] not in self.roles:
            hint = nearest(str(turn["from"]), self.roles)
            raise DataError(f"turn {number} is from {turn['from']!r}, which is unknown{hint}",
                            remedy=f"known: {', '.join(self.roles)}")
        message = {"role": self.roles[turn["from"]], "content": turn["value"]}
        if turn["from"] == "function_call":
            calls = _decoded(turn["value"], f"the function call of turn {number}")
            message.update(content=None, tool_calls=calls if isinstance(calls, list) else [calls])
        return parse_message(message, number)


@data_format
class Alpaca(Format):
    """`instruction`, optional `input`, `output`; LLaMA-Factory's `system` and `history` ([[question, answer], ...]) too.

    Rendered as a chat; without a chat template as raw text under the headings Instruction, Input, Response.
    """

    name, required, optional = "alpaca", ("instruction", "output"), ("input", "system", "history")

    def parse(self, row: Row) -> Example:
        instruction, output = self.text(row, "instruction"), self.text(row, "output")
        given = self.text(row, "input", empty=True) if row.get("input") is not None else ""
        messages = [{"role": "system", "content": self.text(row, "system")}] if row.get("system") else []
        for pair in _list(row["history"], "'history'") if row.get("history") else []:
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise DataError("'history' must hold pairs of question and answer", remedy='write [["q", "a"], ...]')
            messages += [{"role": role, "content": _text(part, "a part of 'history'", empty=False)}
                         for role, part in zip(("user", "assistant"), pair)]
        simple = not messages
        messages += [{"role": "user", "content": f"{instruction}\n\n{given}" if given.strip() else instruction},
                     {"role": "assistant", "content": output}]
        middle = f"### Input:\n{given}\n\n" if given.strip() else ""
        prompt = f"### Instruction:\n{instruction}\n\n{middle}### Response:\n"
        return Example(messages=tuple(messages), prompt=prompt if simple else None, completion=output if simple else None)


@data_format
class Completion(Format):
    """`prompt` and `completion`: two texts, or two lists of messages (then optional `tools`)."""

    name, required, optional = "completion", ("prompt", "completion"), ("tools",)

    def parse(self, row: Row) -> Example:
        prompt, completion = self.value(row, "prompt"), self.value(row, "completion")
        if isinstance(prompt, list) and isinstance(completion, list):
            messages = [parse_message(m, n) for n, m in enumerate([*prompt, *completion], 1)]
            return _conversation(messages, tools=_tools(row), completion_start=len(prompt))
        return Example(prompt=self.text(row, "prompt", empty=True), completion=self.text(row, "completion"))


class _Labelled(Format):
    """`label`, and one text or two."""

    required = ("label",)
    first, second = ("text", "sentence", "text1", "sentence1"), ("text2", "sentence2")
    optional = (*first, *second)

    def recognizes(self, row: Row) -> bool:
        return "label" in row and any(name in row for name in self.first)

    def parse(self, row: Row) -> Example:
        label = self.label(self.value(row, "label"))
        texts = [self.text(row, next((n for n in self.first if n in row), "text"))]
        texts += [self.text(row, name) for name in self.second if row.get(name) is not None][:1]
        return Example(texts=tuple(texts), label=label)

    def label(self, value: Any) -> int | str | float:
        raise TypeError(f"{type(self).__name__} is abstract")


#: above it a number is infinite in single precision, in which losses are computed
_LARGEST = 3.4e38


@data_format
class Regression(_Labelled):
    """`label` (a real number, also as text, as CSV has it) and `text` or `sentence`; a second text in `text2` or `sentence2`."""

    name, task = "regression", "regression"

    def recognizes(self, row: Row) -> bool:
        return isinstance(row.get("label"), float) and super().recognizes(row)

    def label(self, value: Any) -> float:
        if value is None or value == "":
            raise DataError("'label' is empty: the row has no number to learn", remedy="fill it, remove the row, or set skip_bad")
        if isinstance(value, bool) or not isinstance(value, (int, float, str, Decimal)):
            raise DataError(f"'label' must be a number, it is {value!r}", remedy="write a number such as 3.8, or set skip_bad")
        try:
            number = float("none" if isinstance(value, str) and "_" in value else value)
        except ValueError:
            comma = " with a point, not a comma" if isinstance(value, str) and value.count(",") == 1 else ""
            raise DataError(f"'label' is {value!r}, which is no number",
                            remedy=f"write a number such as 3.8{comma}; labels that are names belong to objective: classification "
                                   "(data.format: classification)") from None
        except OverflowError:
            number = math.inf
        if not abs(number) <= _LARGEST:
            raise DataError(f"'label' is {str(value)[:40]}, and what is learned must be a finite number below {_LARGEST:.1e}",
                            remedy="mend or remove the row, or set skip_bad")
        return number


@data_format
class Classification(_Labelled):
    """`label` (a number or a name) and `text` or `sentence`; a second text in `text2` or `sentence2`."""

    name, task = "classification", "classification"

    def label(self, value: Any) -> int | str:
        if isinstance(value, float):
            raise DataError(f"'label' is {value!r}, and a class is a whole number or a name",
                            remedy="objective: regression (data.format: regression) learns real numbers; classes are written 1, not 1.0")
        if not isinstance(value, (int, str)) or value == "":
            raise DataError(f"'label' must be a whole number or a name, it is {value!r}",
                            remedy="remove the row, or set skip_bad")
        if isinstance(value, int) and value < 0:
            raise DataError(f"'label' is {value}, which stands for no label",
                            remedy="remove the row, or set skip_bad; numbers that are no classes are learned by objective: regression")
        return value if isinstance(value, str) else int(value)


@data_format
class Text(Format):
    """`text`: everything is trained, whatever `train_on` says, as there is no prompt."""

    name, required = "text", ("text",)

    def parse(self, row: Row) -> Example:
        return Example(text=self.text(row, "text"))


def detect_format(row: Row) -> Format:
    """The first format that recognizes the row; DataError lists what each needs and the nearest field."""
    for each in FORMATS.values():
        if each.recognizes(row):
            return each
    needs = "; ".join(f"{f.name}: {', '.join(f.required)}" for f in FORMATS.values())
    known = [name for f in FORMATS.values() for name in f.fields]
    hints = [f"'{name}'{hint}" for name in row if (hint := nearest(name, known))]
    raise DataError(f"no format is recognized from the fields {', '.join(map(str, row)) or '(none)'}"
                    + (f": {'; '.join(hints)}" if hints else ""),
                    remedy=f"map names with columns: {{FIELD: NAME}}; formats and their fields are {needs}")


def get_format(name: str) -> Format:
    """The format of that name. Raises UsageError with the nearest name."""
    if name not in FORMATS:
        raise UsageError(f"there is no data format '{name}'{nearest(name, [*FORMATS, 'auto'])}",
                         remedy=f"formats: auto, {', '.join(FORMATS)}")
    return FORMATS[name]


def check_columns(columns: dict[str, str] | None, format: str = "auto") -> None:
    """Raises UsageError when a key of `columns` is no field of the format (of any format for auto)."""
    formats = FORMATS.values() if format == "auto" else [get_format(format)]
    known = list(dict.fromkeys(name for f in formats for name in f.fields))
    for name in columns or {}:
        if name not in known:
            raise UsageError(f"columns maps '{name}', which is no field of format '{format}'{nearest(name, known)}",
                             remedy=f"fields: {', '.join(known)}; columns reads FIELD: NAME IN THE FILE")


def map_columns(row: Row, columns: dict[str, str] | None) -> Row:
    """The row with the user's names replaced by the format's. Raises DataError when a named column is not there."""
    if not columns:
        return row
    for field, name in columns.items():
        if name not in row:
            raise DataError(f"column '{name}' (for '{field}') is missing{nearest(name, row)}",
                            remedy=f"columns here: {', '.join(row)}")
    taken = {*columns, *columns.values()}
    return {**{k: v for k, v in row.items() if k not in taken}, **{field: row[name] for field, name in columns.items()}}
