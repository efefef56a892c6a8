"""`graft merge`: a graft folded into its base as a dense model folder, or several grafts combined into one."""

from __future__ import annotations

from pathlib import Path

import typer

EPILOG = ("Examples: graft merge runs/e2e/graft -o merged --dtype bf16 | "
          "graft merge runs/a runs/b --method ties --weights 1,0.5 --rank 16 -o both")


def run(
    artifacts: list[Path] = typer.Argument(..., help="Folder of a saved graft, or of a run; ours or PEFT's. Several with --method."),
    output: Path = typer.Option(..., "-o", "--output", help="Folder to write; it must not exist, or be empty."),
    model: str = typer.Option(None, "--model", help="The base, where it is not what the artifact names."),
    base: str = typer.Option("trained", "--base", help="trained: what the graft was trained on; pristine: the model's files."),
    dtype: str = typer.Option(None, "--dtype", help="fp32, bf16, fp16 (default: the base's)."),
    requantize: bool = typer.Option(False, "--requantize", help="Put merged weights through the storage's quantizer once more."),
    force: bool = typer.Option(False, "--force", help="With --requantize: even if over half of the change is lost."),
    method: str = typer.Option(None, "--method", help="Combine the grafts into one graft: linear, ties or dare, on their exact changes."),
    weights: str = typer.Option(None, "--weights", help="With --method: one number per graft, 0.7,0.3 (default: 1 each)."),
    density: float = typer.Option(None, "--density", help="With ties and dare: the share of entries kept (default 0.5)."),
    rank: int = typer.Option(None, "--rank", help="With --method: rank of the result, where it is not exact; the error is printed."),
    seed: int = typer.Option(None, "--seed", help="With dare: which entries are dropped (default 0)."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace the folder if it exists."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
    quiet: bool = typer.Option(False, "--quiet", help="No notes."),
) -> None:
    """Merge a graft into its base and write a Transformers folder, with tokenizer and licence; prints the rounding error."""
    from ..errors import UsageError
    from ..serving.loading import graft_folder
    from .convert import check_output

    given = {"--base": base != "trained", "--dtype": dtype is not None, "--requantize": requantize, "--force": force}
    combining = {"--weights": weights is not None, "--density": density is not None, "--rank": rank is not None, "--seed": seed is not None}
    wrong = [name for name, there in (given if method else combining).items() if there]
    if wrong:
        raise UsageError(f"{wrong[0]} does nothing {'with' if method else 'without'} --method", remedy="leave it out")
    if force and not requantize:
        raise UsageError("--force goes with --requantize", remedy="leave it out")
    if len(artifacts) > 1 and not method:
        raise UsageError(f"{len(artifacts)} grafts are named", remedy="say how to combine them: --method linear, ties or dare")
    if method != "dare" and seed is not None:
        raise UsageError(f"--seed does nothing for {method}", remedy="it goes with dare")
    folders = [graft_folder(each) for each in artifacts]
    check_output(output, overwrite)
    if method:
        _combine(folders, output, method, weights, density, rank, seed or 0, model, overwrite, as_json, quiet)
    else:
        _fold(folders[0], output, model, base, dtype, requantize, force, overwrite, as_json, quiet)


def _fold(folder: Path, output: Path, model, base, dtype, requantize, force, overwrite, as_json, quiet) -> None:
    from ..interchange.merged import write_merged
    from ..interchange.opening import open_saved
    from .convert import finish, quietly

    with quietly(quiet):
        loaded, tokenizer, graft = open_saved(folder, model=model)
        report = write_merged(graft, output, tokenizer=tokenizer, base=base, dtype=dtype, requantize=requantize, force=force,
                              overwrite=overwrite)
    finish(output, {"to": "merged", "error": report.worst, "errors": report.errors}, as_json,
           f"largest rounding error {report.worst:.2%} of the change ({len(report.errors)} weights)")


def _combine(folders: list[Path], output: Path, method, weights, density, rank, seed, model, overwrite, as_json, quiet) -> None:
    from ..artifact import attach_saved, save_graft
    from ..errors import UsageError
    from ..interchange.combine import combine
    from ..interchange.opening import open_saved
    from .convert import finish, quietly

    try:
        numbers = None if weights is None else [float(part) for part in weights.split(",")]
    except ValueError:
        raise UsageError(f"--weights {weights} are no numbers", remedy="write them as 0.7,0.3") from None
    with quietly(quiet):
        loaded, _, first = open_saved(folders[0], model=model)
        grafts = [first, *(attach_saved(loaded, folder, name=f"graft{i}") for i, folder in enumerate(folders[1:], 2))]
        made, error = combine(grafts, method, weights=numbers, density=density, rank=rank, seed=seed)
        save_graft(made, output, overwrite=overwrite)
    finish(output, {"to": "lora" if made is not first else first.method, "method": method, "rank": getattr(made.config, "r", None),
                    "error": error}, as_json,
           f"{len(grafts)} grafts by {method}: {made.method}, " + (f"error {error:.2%} of the change" if error else "exact"))
