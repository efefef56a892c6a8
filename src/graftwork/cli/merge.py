"""`graft merge`: a graft folded into its base, as a dense model folder."""

from __future__ import annotations

from pathlib import Path

import typer

EPILOG = "Example: graft merge runs/e2e/graft -o merged --dtype bf16"


def run(
    artifact: Path = typer.Argument(..., help="Folder of a saved graft, or of a run; ours or PEFT's."),
    output: Path = typer.Option(..., "-o", "--output", help="Folder to write; it must not exist, or be empty."),
    model: str = typer.Option(None, "--model", help="The base, where it is not what the artifact names."),
    base: str = typer.Option("trained", "--base", help="trained: what the graft was trained on; pristine: the model's files."),
    dtype: str = typer.Option(None, "--dtype", help="fp32, bf16, fp16 (default: the base's)."),
    requantize: bool = typer.Option(False, "--requantize", help="Put merged weights through the storage's quantizer once more."),
    force: bool = typer.Option(False, "--force", help="With --requantize: even if over half of the change is lost."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace the folder if it exists."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
    quiet: bool = typer.Option(False, "--quiet", help="No notes."),
) -> None:
    """Merge a graft into its base and write a Transformers folder, with tokenizer and licence; prints the rounding error."""
    from ..interchange.merged import write_merged
    from ..interchange.opening import open_saved
    from ..serving.loading import graft_folder
    from .convert import check_output, finish, quietly

    if force and not requantize:
        from ..errors import UsageError

        raise UsageError("--force goes with --requantize", remedy="leave it out")
    folder = graft_folder(artifact)
    check_output(output, overwrite)
    with quietly(quiet):
        loaded, tokenizer, graft = open_saved(folder, model=model)
        report = write_merged(graft, output, tokenizer=tokenizer, base=base, dtype=dtype, requantize=requantize, force=force,
                              overwrite=overwrite)
    finish(output, {"to": "merged", "error": report.worst, "errors": report.errors}, as_json,
           f"largest rounding error {report.worst:.2%} of the change ({len(report.errors)} weights)")
