"""`graft report`: one page about one run or many."""

from __future__ import annotations

import json
from pathlib import Path

import typer

EPILOG = ("Examples: graft report runs/dates -o report.html | graft report runs/lora runs/dora -o compare.html --figures figures "
          "--format png | graft report runs/dates --plan --spectra 24 --samples 4 --json")


def run(
    runs: list[Path] = typer.Argument(..., metavar="RUN...", help="Run folders (output_dir of `graft train`), finished or not."),
    output: Path = typer.Option(Path("report.html"), "--output", "-o", help="The page: one file, no network, no script."),
    figures: Path = typer.Option(None, "--figures", help="Also write each figure into this folder."),
    format: str = typer.Option("svg", "--format", help="Of these files: svg or png."),
    plan: bool = typer.Option(False, "--plan", help="Simulate each run's memory first and keep plan.json in its folder."),
    spectra: int = typer.Option(None, "--spectra", min=1, help="Decompose this many learned changes first: loads the base of a graft; of "
                                "full tuning reads both models tensor by tensor."),
    samples: int = typer.Option(None, "--samples", min=1, help="Answer this many held-out rows without and with the graft first."),
    as_json: bool = typer.Option(False, "--json", help="Print what is on the page as one JSON line."),
    quiet: bool = typer.Option(False, "--quiet", help="No progress."),
) -> None:
    """Loss, learning rate, throughput, memory against the plan, ranks, spectra, scores, samples and recipes on one page."""
    import sys

    from ..errors import UsageError

    def say(text: str) -> None:
        if not quiet:
            print(text, file=sys.stderr, flush=True)

    try:
        from ..report.build import add_plan, write_report
        from ..report.runs import read_runs

        read_runs(list(runs))  # a wrong name is found before anything is simulated
        if figures is not None and figures.is_file():
            raise UsageError(f"{figures} is a file", remedy="name a folder: --figures figures")
        for folder in runs:
            if plan:
                add_plan(folder, say)
            if spectra is not None:
                from ..report.spectra import of_saved as spectra_of

                spectra_of(folder, sites=spectra, say=say)
            if samples is not None:
                from ..report.samples import of_saved as samples_of

                samples_of(folder, count=samples, say=say)
        made = write_report(list(runs), output, figures=figures, format=format)
    except ImportError as missing:
        raise UsageError(f"a report needs {missing.name}, which is not installed", remedy="pip install 'graftwork[report]'") from None
    if as_json:
        print(json.dumps(made))
        return
    for line in made["left_out"]:
        say(line)
    print(f"report: {made['report']}" + (f"\nfigures: {len(made['figures'])} in {figures}" if figures is not None else ""))
