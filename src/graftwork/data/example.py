"""One training example in the only form the rest of the package knows, whatever file and format it came from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")


class Source(NamedTuple):
    """Where a row came from. `number` is a line for text files and a 1-based row for Parquet and hub sets."""

    file: str
    number: int
    unit: str = "line"

    def __str__(self) -> str:
        return f"{self.file}:{self.number}" if self.unit == "line" else f"{self.file}, {self.unit} {self.number}"


@dataclass(frozen=True)
class Example:
    """A normalized row. Exactly one of these is complete, except that alpaca rows carry the first two:

    messages [+ tools]   a conversation in OpenAI's form; `completion_start` is the index of the first message of the
                         completion where the row itself says so (None: what follows the last user message)
    prompt, completion   raw text
    text                 raw text without a prompt
    texts, label         one text or a pair, to be classified (a whole number or a name) or given a number (a float)
    """

    messages: tuple[dict[str, Any], ...] | None = None
    tools: tuple[dict[str, Any], ...] | None = None
    completion_start: int | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    texts: tuple[str, ...] | None = None
    label: int | str | float | None = None
    adapter: str | None = None
    source: Source | None = None

    @property
    def is_real(self) -> bool:
        """Whether the row's target is a real number."""
        return isinstance(self.label, float)

    def content_key(self) -> str:
        """Canonical text of everything but the source: equal rows have equal keys."""
        fields = {k: v for k, v in self.__dict__.items() if k != "source" and v is not None}
        return json.dumps(fields, sort_keys=True, ensure_ascii=False, default=str)


def located(error: DataError, source: Source) -> DataError:
    """The same error, its message led by file and line."""
    return DataError(f"{source}: {error.message}", remedy=error.remedy)
