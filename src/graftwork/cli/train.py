"""`graft train`: run a recipe."""

from __future__ import annotations

import json
from pathlib import Path

import typer

EPILOG = "Example: graft train recipe.yaml train.max_steps=20 optimizer.lr=1e-3 --json"


def run(
    recipe: Path = typer.Argument(..., help="Recipe (YAML)."),
    overrides: list[str] = typer.Argument(None, help="Overrides by dotted path: train.max_steps=20"),
    resume: bool = typer.Option(False, "--resume", help="Continue from the newest checkpoint in output_dir."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Start anew in a non-empty output_dir."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Check the recipe and the data, do not train."),
    samples: int = typer.Option(4, "--samples", min=0, help="Held-out rows that the report shows before and after; 0: none."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON line at the end."),
    quiet: bool = typer.Option(False, "--quiet", help="No progress."),
) -> None:
    """Train a recipe; resumable after a kill at any moment."""
    import sys

    from ..recipe import load_recipe
    from ..training.run import train_recipe

    notes: list[str] = []
    loaded = load_recipe(recipe, overrides, notes=notes)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if dry_run:
        from .validate import check

        return check(loaded, as_json=as_json)
    result = train_recipe(loaded, resume=resume, overwrite=overwrite, quiet=quiet)
    report = write_report(loaded, result, samples, quiet=quiet)
    if as_json:
        print(json.dumps(result.to_json()))
    else:
        print(f"{result.steps} steps, loss {result.loss:.4f}, {result.seconds:.0f} s\ngraft: {result.graft}")
        if report:
            print(f"report: {report}")


def write_report(recipe, result, samples: int, *, quiet: bool) -> Path | None:
    """report.html of a run, where the report extra is installed."""
    import sys

    try:
        from ..report import finish_run, write_run_report

        finish_run(recipe.output_dir, recipe, result, rows=samples, say=lambda text: None if quiet else print(text, file=sys.stderr))
        return write_run_report(recipe.output_dir)
    except ImportError as missing:
        print(f"note: no report.html ({missing.name} is not installed: pip install 'graftwork[report]')", file=sys.stderr)
        return None
