"""`graft convert`: a graft in the format of another tool."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

EPILOG = "Examples: graft convert runs/e2e --to peft -o peft | graft convert runs/e2e --to gguf-merged -o gguf --dtype f16"
TARGETS = ("peft", "lora", "merged", "gguf", "gguf-merged", "mlx", "vllm")


def run(
    artifact: Path = typer.Argument(..., help="Folder of a saved graft, or of a run; ours or PEFT's."),
    to: str = typer.Option(..., "--to", help="peft, lora (an artifact of method lora), merged, gguf (the adapter), gguf-merged, "
                                             "mlx, vllm (PEFT with one rank and scale 1)."),
    output: Path = typer.Option(..., "-o", "--output", help="Folder to write; it must not exist, or be empty."),
    rank: int = typer.Option(None, "--rank", help="Adapter formats: largest rank; truncates, and reports the error. Needed "
                                                  "for methods that are not low-rank."),
    model: str = typer.Option(None, "--model", help="The base, where it is not what the artifact names."),
    base: str = typer.Option(None, "--base", help="Merged formats: trained (default) or pristine; see graft merge --help."),
    dtype: str = typer.Option(None, "--dtype", help="Merged formats: fp32, bf16, fp16 (default: the base's; gguf-merged: f16)."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace the folder if it exists."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
    quiet: bool = typer.Option(False, "--quiet", help="No notes."),
) -> None:
    """Write a graft for PEFT, vLLM, llama.cpp and Ollama (GGUF and Modelfile), mlx-lm, or as a merged model."""
    from ..errors import UsageError, nearest
    from ..serving.loading import graft_folder

    if to not in TARGETS:
        raise UsageError(f"there is no target '{to}'{nearest(to, TARGETS)}", remedy=f"targets: {', '.join(TARGETS)}")
    merged = to in ("merged", "gguf-merged")
    wrong = ["--rank"] * (merged and rank is not None) + ["--base"] * (not merged and base is not None) + \
        ["--dtype"] * (not merged and dtype is not None)
    if wrong:
        fit = [t for t in TARGETS if (t in ("merged", "gguf-merged")) != merged]
        raise UsageError(f"{wrong[0]} does nothing for --to {to}", remedy=f"it goes with {', '.join(fit)}")
    folder = graft_folder(artifact)
    check_output(output, overwrite)
    with quietly(quiet):
        result = write(folder, to, output, rank=rank, model=model, base=base or "trained", dtype=dtype, overwrite=overwrite)
    if merged:
        words = f"largest rounding error {result['error']:.2%} of the change"
    else:
        words = "" if result["rank"] is None else f"rank {result['rank']}, "
        words += f"error {result['error']:.2%} of the change" if result["error"] else "exact"
    finish(output, {"to": to, **result}, as_json, words)


def write(folder: Path, to: str, output: Path, *, rank: int | None, model: str | None, base: str, dtype: str | None,
          overwrite: bool) -> dict[str, Any]:
    """Open the artifact and write it in one of TARGETS; {"error", "notes", ...}."""
    from ..interchange import gguf, lora, merged, mlx, peft
    from ..interchange.opening import open_saved

    _, tokenizer, graft = open_saved(folder, model=model)
    if to in ("peft", "vllm"):
        return peft.write_peft(graft, output, style="exact" if to == "peft" else "baked", rank=rank, overwrite=overwrite)
    if to == "lora":
        return lora.write_lora(graft, output, rank=rank, overwrite=overwrite)
    if to == "mlx":
        return mlx.write_mlx(graft, output, rank=rank, overwrite=overwrite)
    if to == "gguf":
        return gguf.write_gguf_adapter(graft, output, tokenizer=tokenizer, rank=rank, overwrite=overwrite)
    writer = merged.write_merged if to == "merged" else gguf.write_gguf_merged
    report = writer(graft, output, tokenizer=tokenizer, base=base, dtype=dtype, overwrite=overwrite)
    return {"error": report.worst, "errors": report.errors, "notes": []}


def check_output(output: Path, overwrite: bool) -> None:
    """Refuses a folder that holds something, before a model is loaded for nothing."""
    from ..errors import GraftworkError

    if not overwrite and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise GraftworkError(f"{output} exists already", remedy="choose another folder, or give --overwrite")


@contextmanager
def quietly(quiet: bool) -> Iterator[None]:
    """Warnings as notes on stderr, or not at all."""
    import sys
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default", UserWarning)
        yield
    for text in dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning)):
        if not quiet:
            print(f"note: {text}", file=sys.stderr)


def finish(output: Path, result: dict[str, Any], as_json: bool, text: str) -> None:
    """Print what was written."""
    import json
    import sys

    files = sorted(str(p.relative_to(output)) for p in output.rglob("*") if p.is_file())
    if as_json:
        print(json.dumps({**result, "folder": str(output), "files": files}))
        return
    print(f"{output}: {', '.join(files)}\n{text}")
    for note in result.get("notes", []):
        print(f"note: {note}", file=sys.stderr)
