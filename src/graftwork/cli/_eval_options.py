"""Options of `graft eval`, checked before anything is loaded."""

from __future__ import annotations

from pathlib import Path


def raise_usage(message: str, remedy: str) -> None:
    from ..errors import UsageError

    raise UsageError(message, remedy=remedy)


def numbers(text: str) -> tuple[int, ...]:
    """Of --k. Raises UsageError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise_usage(f"--k {text}: whole numbers from 1, with commas", "--k 1,10")
    return tuple(dict.fromkeys(int(part) for part in parts))


def code_options(k, samples, temperature, allowed, seconds, memory):
    """How programs are written and run. Raises UsageError for fewer samples than k, or several equal ones."""
    import os

    from ..evaluation.observers.base import Code

    count = samples or max(k)
    if count < max(k):
        raise_usage(f"pass@{max(k)} from {count} samples", f"--samples {max(k)} or more")
    heat = temperature if temperature is not None else 0.0 if count == 1 else 0.8
    if count > 1 and heat == 0:
        raise_usage(f"{count} samples at temperature 0 are {count} times the same program", "--temperature 0.8")
    return Code(allowed=allowed, seconds=seconds, memory_mib=memory, samples=count, temperature=heat, workers=os.cpu_count() or 1)


def check_code(metrics: list[str], code) -> None:
    """Raises UsageError before anything is loaded where programs would be run without leave."""
    if "pass_at_k" in metrics:
        from ..evaluation.sandbox.runner import check_allowed

        check_allowed(code.allowed)


def journal_of(output: str | None, resume: bool):
    """Where answers are kept while an evaluation runs: beside the output. Raises UsageError."""
    from .generate import writable_output

    if output is None:
        if resume:
            raise_usage("--resume takes what was kept beside --output, and there is none", "add --output FILE, in both runs")
        return None
    writable_output(output)
    if output == "-":
        raise_usage("--output - is no file", "--output rows.jsonl; the scores go to stdout")
    journal = Path(f"{output}.journal")
    if not resume:
        journal.unlink(missing_ok=True)
    return journal


def default_data(target, config):
    """The run's own held-out file. Raises UsageError where it names none."""
    from ..errors import UsageError

    if config.eval is None:
        raise UsageError("no data to evaluate on", remedy="add --data FILE (JSONL, CSV, Parquet)")
    return config.eval


def data_options(config, overrides: list[str]):
    """The data section with `key=value` changes. Raises UsageError for unknown keys and values."""
    import yaml
    from pydantic import ValidationError

    from ..data import DataConfig
    from ..errors import UsageError, nearest

    options = config.model_dump(exclude_unset=True)
    for text in overrides:
        path, sign, value = text.removeprefix("data.").partition("=")
        key, _, inner = path.partition(".")
        if not sign or key not in DataConfig.model_fields:
            raise UsageError(f"'{text}' is no option of the data section{nearest(key, DataConfig.model_fields)}",
                             remedy=f"KEY=VALUE with one of {', '.join(DataConfig.model_fields)}")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UsageError(f"'{text}': the value is not YAML") from None
        options[key] = {**(options.get(key) or {}), inner: parsed} if inner else parsed
    try:
        return DataConfig(**options)
    except ValidationError as error:
        raise UsageError("; ".join(f"data.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())) from None
