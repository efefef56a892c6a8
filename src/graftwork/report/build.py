"""A report of one run or many: the page, its figures as files, and the numbers as JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError, nearest
from . import course, learned, overview, samples, spectra
from .figures import FORMATS
from .page import write_page
from .runs import Run, read_runs
from .section import Section

#: a section each, top to bottom
SECTIONS: tuple[Callable[[list[Run]], Section], ...] = (
    overview.summary, course.loss, course.throughput, course.memory, learned.sites, learned.spectra, learned.evaluations, learned.samples,
    overview.recipes)


def write_report(folders: Sequence[str | Path], path: str | Path, *, figures: str | Path | None = None,
                 format: str = "svg") -> dict[str, Any]:
    """Write the page of these runs, and its figures into a folder. Returns what `graft report --json` prints.

    Raises UsageError (no run, unknown format, a folder in the place of the page), ImportError without matplotlib."""
    import matplotlib  # noqa: F401 - before anything is read

    path = Path(path)
    if format not in FORMATS:
        raise UsageError(f"there is no figure format '{format}'{nearest(format, FORMATS)}", remedy=f"--format {' or '.join(FORMATS)}")
    if path.is_dir():
        raise UsageError(f"{path} is a folder", remedy="name a file: -o report.html")
    runs = read_runs(list(folders))
    made = [make(runs) for make in SECTIONS]
    drawn = [figure for section in made for figure in section.figures]
    for i, figure in enumerate(drawn):  # names are those of files
        if figure.name in [each.name for each in drawn[:i]]:
            figure.name += f"-{i}"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_page(path, title_of(runs), [(section.heading, section.body()) for section in made], contents=True)
    saved: dict[str, str] = {}
    if figures is not None:
        Path(figures).mkdir(parents=True, exist_ok=True)
        saved = {figure.name: str(figure.save(Path(figures), format)) for figure in drawn}
    by_heading = {section.heading: section for section in made}
    return {"report": str(path), "runs": by_heading["Summary"].rows, "scores": by_heading["Scores"].rows,
            "recipe_differences": by_heading["Recipes"].rows if len(runs) > 1 else [],
            "figures": [{"name": f.name, "title": f.title, "file": saved.get(f.name)} for f in drawn],
            "left_out": [f"{section.heading}: {line}" for section in made for line in section.left_out]}


def title_of(runs: list[Run]) -> str:
    return f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs: {', '.join(run.name for run in runs)}"


def write_run_report(folder: str | Path) -> Path:
    """report.html inside a run folder."""
    return Path(write_report([folder], Path(folder) / "report.html")["report"])


def add_plan(folder: Path, say: Callable[[str], None]) -> None:
    """plan.json of a run: its recipe simulated on fake tensors, with the ledger over the step."""
    import json

    from ..files import atomic_write_text
    from ..planning.simulate import plan
    from ..recipe import load_recipe

    say(f"simulating two steps of {folder} on fake tensors")
    made = plan(load_recipe(folder / "config.yaml", check=False), estimate_time=False)
    atomic_write_text(folder / "plan.json", json.dumps({**made.to_json(), "timeline": made.timeline}))


def finish_run(folder: str | Path, recipe: Any, result: Any, *, rows: int, say: Callable[[str], None]) -> None:
    """What a report shows of a model that has just been trained: spectra (of low-rank changes) and, if rows > 0, samples. The run is
    saved by then, so a failure here is a remark."""
    def attempt(what: str, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:
            say(f"note: no {what} in the report: {getattr(error, 'message', None) or f'{type(error).__name__}: {error}'}")

    folder = Path(folder)
    live = [graft for graft in result.grafts if graft.name not in result.failed]
    if live:
        attempt("spectra", lambda: spectra.write_spectra(folder, live, dense=False))
    if rows and (recipe.data.eval is not None or recipe.data.eval_fraction):
        names = [graft.name for graft in live]
        attempt("samples", lambda: samples.write_samples(folder, recipe, result.model, result.tokenizer, names, count=rows))
