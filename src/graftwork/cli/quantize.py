"""`graft quantize`: a model folder whose weights are codes."""

from __future__ import annotations

from pathlib import Path

import typer

EPILOG = ("Examples: graft quantize smollm2-135m-instruct --storage int4 -o int4 | "
          "graft quantize MODEL --storage int4 --calibration gptq --data texts.jsonl -o int4-gptq | "
          "graft quantize MODEL --storage int3 --group-size 128 --calibration gptq --data F calibration.act_order=true -o int3 | "
          "then: graft eval --model int4-gptq --data F, or model: int4-gptq in a recipe")


def run(
    model: str = typer.Argument(..., metavar="MODEL", help="Packaged name, folder, .gguf file or Hub id; full precision."),
    options: list[str] = typer.Argument(None, help="Options of the storage: symmetric=true calibration.damp=0.05"),
    output: Path = typer.Option(..., "-o", "--output", help="Folder to write; a half-written one of the same call is continued."),
    storage: str = typer.Option("int4", "--storage", help="int4, nf4, ... (`graft methods --axis storage`)."),
    calibration: str = typer.Option(None, "--calibration", help="How codes are found: rtn (default), gptq, ..."),
    data: str = typer.Option(None, "--data", help="Calibration data: any file that training reads, or a .txt file."),
    samples: int = typer.Option(128, "--samples", min=1, help="Rows of calibration data."),
    length: int = typer.Option(512, "--length", min=2, help="Tokens of each."),
    group_size: int = typer.Option(None, "--group-size", help="Weights that share a scale; -1: a whole row."),
    dtype: str = typer.Option(None, "--dtype", help="Of what stays dense: bf16, fp16, fp32 (default: the checkpoint's)."),
    task: str = typer.Option("causal_lm", "--task", help="causal_lm, encoder, classification or regression: the kind of model."),
    trust_remote_code: bool = typer.Option(False, "--trust-remote-code", help="Run code that the model brings."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
    quiet: bool = typer.Option(False, "--quiet", help="No progress and no notes."),
) -> None:
    """Put a model's weights into a storage and write it as a folder, block by block: one block is in memory at a time. Loading, planning,
    training, evaluating and serving read such a folder; its codes stay as they are."""
    import json
    import sys

    from ..compression.quantize import quantize
    from ..planning.measure import format_bytes
    from .generate import row_progress

    chosen = storage_options(storage, options or [], calibration, group_size)
    report = quantize(model, output, storage=chosen, data=data, samples=samples, length=length, dtype=dtype, task=task,
                      trust_remote_code=trust_remote_code, progress=None if quiet else row_progress("quantize", "blocks"))
    if not quiet:
        for note in report.notes:
            print(f"note: {note}", file=sys.stderr)
    if as_json:
        print(json.dumps(report.to_json()))
        return
    saved = report.bytes_before / max(1, report.bytes_after)
    done = f", {report.resumed} of {report.blocks} blocks were done already" if report.resumed else ""
    print(f"{output}: {report.maps} maps as {storage}, {report.bits_per_weight:.4g} bits a weight\n"
          f"weight files: {format_bytes(report.bytes_before)} before, {format_bytes(report.bytes_after)} after "
          f"({saved:.2f} times smaller), {report.seconds:.0f} s{done}")


def storage_options(storage: str, options: list[str], calibration: str | None, group_size: int | None) -> dict:
    """{method, options} of the words of the command line. Raises UsageError for what is no option of this storage."""
    import yaml

    from ..errors import UsageError, nearest
    from ..registry import lookup

    info = lookup("storage", storage)
    made: dict = {"method": info.name}
    for word in options:
        name, sign, value = word.partition("=")
        if not sign:
            raise UsageError(f"'{word}' is no option: it reads KEY=VALUE", remedy=f"options: {', '.join(info.config.model_fields)}")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UsageError(f"the value of '{word}' cannot be read", remedy="KEY=NUMBER, KEY=true, KEY=word") from None
        outer, dot, inner = name.partition(".")
        if not dot:
            made[name] = parsed
        elif isinstance(made.setdefault(outer, {}), dict):
            made[outer][inner] = parsed
    for name, value in (("group_size", group_size), ("calibration", calibration)):
        if value is None:
            continue
        if name not in info.config.model_fields:
            raise UsageError(f"storage {info.name} has no {name}{nearest(name, info.config.model_fields)}",
                             remedy=f"options: {', '.join(info.config.model_fields)}")
        if name == "calibration":
            kept = made.get(name, {})
            made[name] = {"method": value, **(kept if isinstance(kept, dict) else {})}
        else:
            made[name] = value
    if isinstance(made.get("calibration"), dict) and "method" not in made["calibration"]:
        raise UsageError("options of a calibration need its name", remedy="--calibration gptq calibration.damp=0.05")
    return made
