"""`graft demo`: the whole of it in a few minutes, on a CPU."""

from __future__ import annotations

from pathlib import Path

import typer

EPILOG = "Example: graft demo --output /tmp/graft-demo"


def run(
    output: Path = typer.Option(Path("demo"), "--output", "-o", help="Folder for recipes, runs, adapters and the report."),
    quiet: bool = typer.Option(False, "--quiet", help="Only the table at the end."),
) -> None:
    """Adapt one NF4 base to four tasks by four methods, and answer one mixed batch with all of them."""
    from ..demo.run import Demo

    raise typer.Exit(Demo(output, quiet=quiet).run())
