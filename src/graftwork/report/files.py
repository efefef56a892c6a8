"""What the JSON files of a run folder must hold to be drawn; more is let through."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow")


class Measured(_Open):
    peak_bytes: int
    step: int | None = None


class RunFile(_Open):
    """run.json"""

    steps: int | None = None
    seconds: float | None = None
    peak_bytes: int | None = None
    measured: Measured | None = None
    failed: dict[str, str] = {}


class PlanFile(_Open):
    """plan.json; timeline: (event, phase, {category: bytes})"""

    peak_bytes: int
    categories: dict[str, int]
    device: dict[str, Any] = {}
    timeline: list[tuple[int, str, dict[str, int]]] = []


class Spectrum(_Open):
    shape: tuple[int, int]
    values: list[float] = Field(min_length=1)
    frobenius: float
    stable_rank: float
    effective_rank: float


class SpectraFile(_Open):
    """spectra.json"""

    sites: dict[str, Spectrum]
    of: int | None = None
    note: str | None = None
    left_out: str | None = None


class SamplesFile(BaseModel):
    """samples.json, a list there"""

    rows: list[dict[str, Any]]


FILES: dict[str, type[BaseModel]] = {"run.json": RunFile, "plan.json": PlanFile, "spectra.json": SpectraFile, "samples.json": SamplesFile}
