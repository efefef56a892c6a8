"""A grid of runs over one recipe: sequential, resumable, and a table at the end.

Each cell is an ordinary run in `FOLDER/cells/NAME`, where NAME says what varies, so a grid that grows later finds the cells
that are done. A cell counts as finished when its run.json stands beside a config.yaml equal to the cell's recipe; an
interrupted one resumes from its checkpoint; a failed one is tried again. Cells that agree in base, storage, precision,
checkpointing and seed share one loaded base: their grafts are detached in between, which restores it bit for bit.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..errors import GraftworkError, TrainingError, UsageError, nearest
from ..files import FileLock, atomic_write_text, disk_errors
from ..recipe import Recipe, load_recipe
from .run import Interrupted, recipe_differences, train_recipe

#: metrics of which more is better; of all others (losses, perplexity, bytes, seconds) less is
HIGHER = ("accuracy", "exact_match", "f1", "rouge", "bleu", "chrf", "mcc", "pearson", "spearman")


@dataclass
class Cell:
    """One combination. state: finished (now or before), failed, or waiting."""

    values: dict[str, str]
    folder: Path
    recipe: Recipe | None = None
    state: str = "waiting"
    error: str | None = None
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def numbers(self) -> dict[str, float]:
        """Everything measured of a finished cell, flat."""
        own = {k: self.result[k] for k in ("loss", "peak_bytes", "seconds", "steps") if self.result.get(k) is not None}
        return {**self.result.get("metrics", {}), **own}

    def to_json(self) -> dict[str, Any]:
        return {"cell": self.values, "folder": str(self.folder), "state": self.state, "error": self.error, **self.numbers}


@dataclass
class SweepResult:
    """All cells in grid order; best: index of the best finished one, None when none is."""

    cells: list[Cell]
    metric: str
    best: int | None

    @property
    def failed(self) -> list[Cell]:
        return [c for c in self.cells if c.state == "failed"]

    def to_json(self) -> dict[str, Any]:
        return {"metric": self.metric, "best": None if self.best is None else self.cells[self.best].values,
                "cells": [c.to_json() for c in self.cells]}


def parse_grid(arguments: list[str]) -> dict[str, list[str]]:
    """`path=a,b,c` to {path: [a, b, c]}; commas inside brackets, braces and quotes belong to the value."""
    grid: dict[str, list[str]] = {}
    for argument in arguments:
        path, sign, text = argument.partition("=")
        if not sign or not path or not text:
            raise UsageError(f"'{argument}' is no axis of a grid", remedy="write dotted.path=value,value, for example adapter.r=4,8")
        if path in grid:
            raise UsageError(f"'{path}' is given twice", remedy=f"write all its values in one place: {path}=a,b")
        if path == "output_dir":
            raise UsageError("a sweep chooses the output_dir of each cell", remedy="remove output_dir; -o names the folder of the sweep")
        values = _split(text)
        if len(set(values)) < len(values):
            raise UsageError(f"'{path}' has a value twice: {text}", remedy="remove one")
        grid[path] = values
    if not grid:
        raise UsageError("the grid has no axis", remedy="write what varies: optimizer.lr=1e-4,1e-3 adapter.r=4,8")
    return grid


def _split(text: str) -> list[str]:
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append("")
            continue
        parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def cell_name(values: dict[str, str]) -> str:
    """A folder name that says what varies, with a digest so that no two cells share one."""
    readable = "_".join(f"{path.rpartition('.')[2]}-{value}" for path, value in values.items())
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:6]
    return f"{re.sub(r'[^A-Za-z0-9.-]+', '-', readable).strip('-.')[:60]}-{digest}"


def run_sweep(source: str | Path | dict[str, Any], grid: dict[str, list[str]], folder: str | Path, *, metric: str | None = None,
              overwrite: bool = False, quiet: bool = False, say: Callable[[str], None] | None = None) -> SweepResult:
    """Run all cells of a grid and write table.csv, table.tex and sweep.json into `folder`.

    metric: what `best` goes by (default: eval_loss where there is eval data, else loss). Raises UsageError when no cell is a
    valid recipe or the metric is unknown, and Interrupted on Ctrl-C (the same call continues)."""
    folder, say = Path(folder), say or (lambda text: None if quiet else print(text, file=sys.stderr, flush=True))
    cells = [_cell(source, dict(zip(grid, values)), folder) for values in itertools.product(*grid.values())]
    if all(cell.recipe is None for cell in cells):
        raise UsageError(f"no cell of the grid is a recipe that can run; the first: {cells[0].error}")
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock", what=f"the sweep in {folder}"):
        bases = _Bases(cells)
        for number, cell in enumerate(cells, 1):
            label = f"cell {number}/{len(cells)} ({', '.join(f'{k}={v}' for k, v in cell.values.items())})"
            if cell.recipe is None:
                say(f"{label}: refused: {cell.error}")
            elif not overwrite and finished(cell):
                say(f"{label}: done before")
            else:
                say(label)
                try:
                    _run_cell(cell, bases, overwrite, quiet, say)
                except Interrupted as stop:
                    write_tables(SweepResult(cells, metric or "", None), grid, folder)
                    raise Interrupted(f"{label}: {stop.message}", remedy="the same command continues the sweep") from None
        result = SweepResult(cells, *_best(cells, metric))
        write_tables(result, grid, folder)
    return result


def _cell(source: Any, values: dict[str, str], folder: Path) -> Cell:
    cell = Cell(values, folder / "cells" / cell_name(values))
    try:
        cell.recipe = load_recipe(source, [*(f"{k}={v}" for k, v in values.items()), f"output_dir={json.dumps(str(cell.folder))}"])
    except GraftworkError as error:
        cell.state, cell.error = "failed", str(error)
    return cell


def finished(cell: Cell) -> bool:
    """Whether the cell's run is complete on disk, for this very recipe; then its result is filled in."""
    try:
        result = json.loads((cell.folder / "run.json").read_text())
        config = yaml.safe_load((cell.folder / "config.yaml").read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return False
    if not isinstance(config, dict) or recipe_differences(config, cell.recipe.document()):
        return False
    cell.state, cell.result = "finished", result
    return True


def _run_cell(cell: Cell, bases: _Bases, overwrite: bool, quiet: bool, say: Callable[[str], None]) -> None:
    left = cell.folder.is_dir() and any(p.name != ".lock" for p in cell.folder.iterdir())
    try:
        model, tokenizer = bases.get(cell.recipe)
        done = train_recipe(cell.recipe, resume=left and not overwrite, overwrite=overwrite and left, quiet=quiet, say=say,
                            model=model, tokenizer=tokenizer, label="  train")
        for graft in done.grafts:
            graft.detach()
        cell.state, cell.result, cell.error = "finished", {**done.to_json(), "metrics": done.metrics}, None
    except Interrupted:
        raise
    except (GraftworkError, ArithmeticError, RuntimeError, ValueError, OSError, MemoryError) as error:
        bases.drop()  # a failure may leave grafts attached
        cell.state, cell.error = "failed", str(error).strip() or type(error).__name__
        say(f"  failed: {cell.error}")


class _Bases:
    """The loaded base that several cells share; at most one is alive."""

    def __init__(self, cells: list[Cell]):
        keys = [base_key(c.recipe) for c in cells if c.recipe is not None]
        self.shared = {key for key in keys if key is not None and keys.count(key) > 1}
        self.drop()

    def drop(self) -> None:
        self.key: str | None = None
        self.model: Any = None
        self.tokenizer: Any = None

    def get(self, recipe: Recipe) -> tuple[Any, Any]:
        """(model, tokenizer), or (None, None) for a cell whose run loads its own."""
        key = base_key(recipe)
        if key != self.key:
            self.drop()
        if key not in self.shared:
            return None, None
        if self.model is None:
            import torch

            from .build import build_model

            self.model, self.tokenizer = build_model(recipe)
            if self.tokenizer is None:
                self.drop()
                raise TrainingError(f"{recipe.model} has no tokenizer", remedy="add the tokenizer files to the model folder")
            if torch.cuda.is_available():
                self.model.cuda()
            self.key = key
        return self.model, self.tokenizer


def base_key(recipe: Recipe) -> str | None:
    """Equal for recipes that can share a loaded base; None where a run changes the base itself or its head."""
    from .build import reads_data, task_of

    if recipe.adapter is None or task_of(recipe) != "causal_lm":
        return None
    document = recipe.document()
    return json.dumps([document["model"], document["storage"], recipe.train.precision, recipe.train.gradient_checkpointing,
                       recipe.train.seed, recipe.trust_remote_code, document["data"] if reads_data(recipe.storage) else None])


def _best(cells: list[Cell], metric: str | None) -> tuple[str, int | None]:
    known = list(dict.fromkeys(name for c in cells for name in c.numbers))
    if metric is None:
        metric = "eval_loss" if "eval_loss" in known else "loss"
    elif known and metric not in known:
        raise UsageError(f"no cell has the metric '{metric}'{nearest(metric, known)}", remedy=f"metrics: {', '.join(known)}")
    have = [(c.numbers[metric], i) for i, c in enumerate(cells) if c.state == "finished" and c.numbers.get(metric) is not None]
    have = [(value, i) for value, i in have if value == value]
    if not have:
        return metric, None
    higher = any(word in metric for word in HIGHER)
    return metric, min(have, key=lambda each: (-each[0] if higher else each[0], each[1]))[1]


def rows_of(result: SweepResult, grid: dict[str, list[str]]) -> tuple[list[str], list[list[Any]]]:
    """(column names, rows) of the table: what varies, then the metric that decides, then the others."""
    grid = {path: values for path, values in grid.items() if len(values) > 1} or grid
    known = dict.fromkeys(name for c in result.cells for name in c.numbers)
    names = list(dict.fromkeys(n for n in (result.metric, "loss", *known) if n in known and n != "steps"))
    rows = [[*(cell.values[path] for path in grid), *(cell.numbers.get(name, "") for name in names),
             cell.state, "best" if i == result.best else ""] for i, cell in enumerate(result.cells)]
    return [*grid, *names, "state", "best"], rows


def text_table(result: SweepResult, grid: dict[str, list[str]]) -> str:
    """The table for a terminal; `*` marks the best cell."""
    names, rows = rows_of(result, grid)
    shown = [[*names[:-1], ""], *([*map(_short, row[:-1]), "*" if row[-1] else ""] for row in rows)]
    widths = [max(len(row[i]) for row in shown) for i in range(len(names))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in shown]
    return "\n".join([*lines, *(f"failed: {', '.join(f'{k}={v}' for k, v in c.values.items())}: {c.error}" for c in result.failed)])


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def write_tables(result: SweepResult, grid: dict[str, list[str]], folder: Path) -> None:
    """table.csv (full precision), table.tex (booktabs, the best row bold) and sweep.json."""
    names, rows = rows_of(result, grid)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([names, *rows])
    atomic_write_text(folder / "table.csv", text.getvalue())
    atomic_write_text(folder / "table.tex", latex(names[:-1], [([*map(_short, row[:-1])], bool(row[-1])) for row in rows]))
    atomic_write_text(folder / "sweep.json", json.dumps(result.to_json(), indent=1))


def latex(names: list[str], rows: list[tuple[list[str], bool]]) -> str:
    """A tabular of package booktabs."""
    def cell(text: str, bold: bool = False) -> str:
        special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
        safe = "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)
        return rf"\textbf{{{safe}}}" if bold and safe else safe

    lines = [rf"\begin{{tabular}}{{{'l' * len(names)}}}", r"\toprule", " & ".join(map(cell, names)) + r" \\", r"\midrule"]
    lines += [" & ".join(cell(text, best) for text in row) + r" \\" for row, best in rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"
