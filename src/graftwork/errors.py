"""Errors that users see: one message, the remedy, no traceback (the command line prints them; see cli/main.py)."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class GraftworkError(Exception):
    """Something the user can mend. `message` says what is wrong, `remedy` what to do about it."""

    exit_code = 1

    def __init__(self, message: str, *, remedy: str | None = None):
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return self.message if self.remedy is None else f"{self.message}\n  remedy: {self.remedy}"


class UsageError(GraftworkError, ValueError):
    """The request itself is wrong (a recipe, an argument): exit code 2, nothing was started."""

    exit_code = 2


class IncompatibleError(UsageError):
    """Parts that cannot be combined; the message carries the reasons, the remedy the nearest combination that works."""


class RecipeError(UsageError):
    """All problems of one recipe at once; each problem is one line `file:line: what, nearest name, remedy`."""

    def __init__(self, problems: Iterable[str], *, remedy: str | None = None):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems), remedy=remedy)


class ModelError(GraftworkError):
    """A model file is missing, truncated or of an unsupported kind."""


class ArtifactError(GraftworkError):
    """A saved graft is damaged, of another base, or of another schema."""


class DataError(GraftworkError):
    """A data file or one of its lines is unusable; the message names file and line."""


class TrainingError(GraftworkError):
    """A run stopped: NaN loss, disk full, unwritable output."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Hint for a misspelt name: ` (did you mean 'x'?)` or an empty string."""
    match = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{match[0]}'?)" if match else ""
