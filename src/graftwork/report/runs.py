"""Run folders, read for a report: only files, no model. What is missing or unreadable is None or empty, with the reason in `gaps`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..errors import UsageError, nearest
from .files import FILES

#: what makes a folder a run
PARTS = ("config.yaml", "metrics.jsonl", "run.json")


@dataclass(eq=False)
class Run:
    """name: its label on the page. rows: of metrics.jsonl. info: run.json. recipe: the resolved document. plan: plan.json (`timeline` in
    it may be empty). spectra, samples: what training or `graft report` wrote. gaps: {file: why it is not shown}."""

    name: str
    folder: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] | None = None
    recipe_text: str = ""
    plan: dict[str, Any] | None = None
    spectra: dict[str, Any] | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)
    gaps: dict[str, str] = field(default_factory=dict)

    def series(self, key: str) -> list[tuple[int, float]]:
        """[(step, number)] of a key of metrics.jsonl."""
        return [(row["step"], row[key]) for row in self.rows if is_number(row.get(key)) and is_number(row.get("step"))]

    def maps(self) -> dict[str, dict[int, dict[str, float]]]:
        """{what is shown: {step: {site or layer: number}}}."""
        found: dict[str, dict[int, dict[str, float]]] = {}
        for row in self.rows:
            shown = row.get("sites")
            for what, numbers in shown.items() if isinstance(shown, dict) else ():
                if isinstance(numbers, dict) and numbers and all(map(is_number, numbers.values())):
                    found.setdefault(what, {})[row["step"]] = numbers
        return found


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def read_runs(folders: list[str | Path]) -> list[Run]:
    """The runs in these folders, with labels that differ. Raises UsageError for a folder that is none."""
    paths = [Path(folder) for folder in folders]
    for path in paths:
        if not any((path / part).is_file() for part in PARTS):
            around = [str(p) for p in path.parent.iterdir()] if not path.exists() and path.parent.is_dir() else []
            what = "is no run folder" if path.is_dir() else "does not exist"
            raise UsageError(f"{path} {what}{nearest(str(path), around)}", remedy="name the output_dir of a `graft train`")
    resolved = [path.resolve() for path in paths]
    twice = next((p for i, p in enumerate(resolved) if p in resolved[:i]), None)
    if twice is not None:
        raise UsageError(f"{twice} is named twice", remedy="name each run once")
    return [_read(path, name) for path, name in zip(paths, labels(resolved))]


def labels(paths: list[Path]) -> list[str]:
    """The shortest ends of the paths that differ from each other."""
    for depth in range(1, max(len(p.parts) for p in paths) + 1):
        names = ["/".join(p.parts[-depth:]) for p in paths]
        if len(set(names)) == len(names):
            break
    return names


def _read(folder: Path, name: str) -> Run:
    run = Run(name, folder)
    run.rows = _lines(folder / "metrics.jsonl", run)
    run.info = _json(run, "run.json") or {}
    run.plan, run.spectra = _json(run, "plan.json"), _json(run, "spectra.json")
    run.samples = (_json(run, "samples.json") or {"rows": []})["rows"]
    try:
        run.recipe_text = (folder / "config.yaml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        run.gaps["config.yaml"] = "there is no readable config.yaml"
        return run
    import yaml

    try:
        document = yaml.safe_load(run.recipe_text)
        run.recipe = document if isinstance(document, dict) else None
    except yaml.YAMLError:
        run.gaps["config.yaml"] = "config.yaml is not YAML"
    return run


def _lines(path: Path, run: Run) -> list[dict[str, Any]]:
    """Complete lines only: a run may be writing."""
    rows = []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        run.gaps["metrics.jsonl"] = "there is no readable metrics.jsonl"
        return rows
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and is_number(row.get("step")):
            rows.append(row)
    return rows


def _json(run: Run, name: str) -> dict[str, Any] | None:
    try:
        value = json.loads((run.folder / name).read_text(encoding="utf-8"))
        made = FILES[name](**({"rows": value} if isinstance(value, list) else value))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors()[0]
        run.gaps[name] = f"{name} is not as expected ({'.'.join(map(str, first['loc']))}: {first['msg']})"
    except (OSError, ValueError, TypeError) as error:
        run.gaps[name] = f"{name} cannot be read ({type(error).__name__})"
    else:
        return made.model_dump()
    return None
