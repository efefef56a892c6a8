"""`graft sweep`: a grid of runs over one recipe."""

from __future__ import annotations

from pathlib import Path

import typer

EPILOG = "Example: graft sweep recipe.yaml optimizer.lr=1e-4,1e-3 adapter.r=4,8 -o runs/sweep --metric eval_loss"


def run(
    recipe: Path = typer.Argument(..., help="Recipe (YAML)."),
    grid: list[str] = typer.Argument(..., help="What varies: dotted.path=value,value (one value: a plain override)."),
    output: Path = typer.Option(..., "-o", "--output", help="Folder of the cells and of table.csv, table.tex, sweep.json."),
    metric: str = typer.Option(None, "--metric", help="What `best` goes by (default: eval_loss with eval data, else loss)."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Run all cells anew, also finished ones."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
    quiet: bool = typer.Option(False, "--quiet", help="No progress."),
) -> None:
    """Run a grid; finished cells are skipped, an interrupted one resumes, a failing one does not stop the others."""
    import json

    from ..training.sweep import parse_grid, run_sweep, text_table

    axes = parse_grid(grid)
    result = run_sweep(recipe, axes, output, metric=metric, overwrite=overwrite, quiet=quiet)
    print(json.dumps(result.to_json()) if as_json else f"{text_table(result, axes)}\ntables: {output}/table.csv, {output}/table.tex")
    if result.failed:
        raise typer.Exit(1)
