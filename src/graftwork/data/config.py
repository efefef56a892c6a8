"""The `data` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ..errors import UsageError, nearest
from ..registry import MethodConfig
from .formats import FORMATS, check_columns

Paths = str | list[str]


class DataConfig(MethodConfig):
    """Where the examples are and how they become tokens.

    train, eval      a file, a glob, a list of them, or (online: true) a hub name org/name[config]:split
    format           auto, or one of messages, sharegpt, alpaca, completion, classification, regression, text; auto is regression
                     with objective: regression
    train_on         assistant, last_assistant, completion, all: whose tokens are learned (see rendering.py)
    max_length       tokens per row; longer rows are cut at the end, and the share of them is reported
    packing          several examples a row, computed as if separate
    system           system message for conversations without one
    chat             true: prompt/completion rows as a chat; false: alpaca rows as raw text; null: by format
    columns          {field of the format: name in the file}
    skip_bad         count unusable rows instead of stopping at the first
    limit            use the first so many rows of train and of eval
    eval_fraction    hold out this share of the training rows when there is no eval; equal rows stay on one side
    calibration_rows rows of train that a storage reads whose codes depend on data (storage: {method: int4, calibration: gptq})
    online           allow hub names
    """

    train: Paths
    eval: Paths | None = None
    format: str = "auto"
    train_on: Literal["assistant", "last_assistant", "completion", "all"] = "assistant"
    max_length: Annotated[int, Field(ge=2)] = 1024
    packing: bool = False
    system: str | None = None
    chat: bool | None = None
    columns: dict[str, str] = Field(default_factory=dict)
    skip_bad: bool = False
    limit: Annotated[int, Field(ge=1)] | None = None
    eval_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    calibration_rows: Annotated[int, Field(ge=1)] = 128
    online: bool = False

    @field_validator("train", "eval")
    @classmethod
    def _some_path(cls, value: Paths | None) -> Paths | None:
        if value is not None and (not value or not all(value)):
            raise ValueError("names no file")
        return value

    @field_validator("format")
    @classmethod
    def _known_format(cls, value: str) -> str:
        if value != "auto" and value not in FORMATS:
            raise ValueError(f"there is no data format '{value}'{nearest(value, FORMATS)}; formats: auto, {', '.join(FORMATS)}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        try:
            check_columns(self.columns, self.format)
        except UsageError as error:
            raise ValueError(f"{error.message}; {error.remedy}") from None
        if self.eval is not None and self.eval_fraction:
            raise ValueError("eval and eval_fraction exclude each other: remove one")
        return self
