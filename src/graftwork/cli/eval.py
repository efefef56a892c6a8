"""`graft eval`: score a run, a graft or a base on held-out rows."""

from __future__ import annotations

import json
from pathlib import Path

import typer

EPILOG = ("Examples: graft eval runs/e2e --data held_out.jsonl --json | "
          r"graft eval runs/gsm8k --data test.jsonl --extract '####\s*(\S+)' | graft eval --model smollm2-135m-instruct --data F")


def run(
    run: str = typer.Argument(None, metavar="RUN", help="Run folder, folder of a saved graft, or a model."),
    overrides: list[str] = typer.Argument(None, help="Options of the data section: max_length=512 columns.prompt=question"),
    data: list[str] = typer.Option([], "--data", help="Rows: file or glob; repeatable (default: the run's data.eval)."),
    model: str = typer.Option(None, "--model", help="The base; alone: evaluates the bare base."),
    adapter: str = typer.Option(None, "--adapter", help="One member of a fleet."),
    base: bool = typer.Option(False, "--base", help="Score the run's base without its adapter."),
    storage: str = typer.Option(None, "--storage", help="dense, nf4, ... (default: what the run was trained on)."),
    dtype: str = typer.Option(None, "--dtype", help="bf16, fp32 (default: the run's precision)."),
    metrics: str = typer.Option("loss,exact_match", "--metrics", help="loss, exact_match, or both."),
    extract: str = typer.Option(None, "--extract", help="Regular expression of what is compared: its last match, first group."),
    stop: list[str] = typer.Option([], "--stop", help="Text that ends an answer; repeatable."),
    labels: str = typer.Option(None, "--labels", help="Class names in the order of the head, with commas."),
    limit: int = typer.Option(None, "--limit", min=1, help="First rows only."),
    batch_size: int = typer.Option(16, "--batch-size", min=1, help="Rows computed together."),
    max_new_tokens: int = typer.Option(None, "--max-new-tokens", min=1, help="Longest answer (default: the longest reference)."),
    seed: int = typer.Option(0, "--seed", help="Seed of the bootstrap interval."),
    output: str = typer.Option(None, "--output", help="Write predictions, one JSON line per row."),
    as_json: bool = typer.Option(False, "--json", help='Print {"metrics": {...}} as one JSON line.'),
    quiet: bool = typer.Option(False, "--quiet", help="No progress."),
) -> None:
    """Loss and exact match (or accuracy) on held-out rows, with a 95 % bootstrap interval."""
    import sys
    import time

    from ..data import Statistics
    from ..evaluation.metrics import pattern
    from ..evaluation.scoring import evaluate
    from ..evaluation.targets import find_target, load_target, route_rows
    from ..evaluation.tasks import read_tasks
    from ..files import atomic_write_text
    from .generate import row_progress, writable_output

    def say(text: str) -> None:
        if not quiet:
            print(text, file=sys.stderr)

    pattern(extract)
    if output:
        writable_output(output)
    if run is not None and "=" in run and not Path(run).exists():  # `graft eval --model M max_length=64`
        run, overrides = None, [run, *(overrides or [])]
    target = find_target(run, model=model, storage=storage, dtype=dtype, adapter=adapter)
    config = data_options(target.data, overrides or [])
    start, statistics = time.monotonic(), Statistics()
    tasks = read_tasks(list(data) or default_data(target, config), config, limit=limit, statistics=statistics)
    routes = route_rows(target, tasks) if not base else [None] * len(tasks)
    loaded, tokenizer = load_target(target, say=say)
    bars = {stage: row_progress(stage) for stage in ("loss", "answers")}

    def progress(stage: str, done: int, total: int) -> None:
        bars[stage](done, total)

    names = [n.strip() for n in labels.split(",")] if labels else next(iter(target.labels.values()), None)
    found = evaluate(loaded, tokenizer, tasks, config=config, objective=target.objective, adapters=routes, labels=names,
                     metrics=[m.strip() for m in metrics.split(",") if m.strip()], batch_size=batch_size,
                     max_new_tokens=max_new_tokens, extract=extract, stop=stop, seed=seed, progress=None if quiet else progress)
    scores, members = found.metrics, by_member(found.rows, routes if target.fleet else None)
    if statistics.skipped:
        scores["skipped"] = statistics.skipped
    for note in found.notes:
        say(f"note: {note}")
    if output:
        atomic_write_text(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found.rows))
    scores["seconds"] = round(time.monotonic() - start, 3)
    if as_json:
        print(json.dumps({"metrics": scores, **({"adapters": members} if members else {})}))
        return
    for key, value in scores.items():
        print(f"{key:<22} {_shown(value)}")
    for name, score in members.items():
        print(f"  {name:<20} " + "  ".join(f"{k} {_shown(v)}" for k, v in score.items()))
    wrong = next((row for row in found.rows if not row["correct"]), None)
    if wrong:
        print(f"a wrong row: {wrong['source']}\n  wrote  {wrong['prediction']!r}\n  wanted {wrong['references'][0]!r}")


def _shown(value) -> str:
    if isinstance(value, list):
        return " ".join(_shown(v) for v in value)
    return f"{value:.4f}" if isinstance(value, float) else str(value)


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


def by_member(rows: list[dict], routes) -> dict[str, dict]:
    """{adapter: {score, n}} of a fleet."""
    members: dict[str, list[bool]] = {}
    for row in rows if routes else []:
        members.setdefault(row["adapter"] or "base", []).append(row["correct"])
    return {name: {"exact_match": sum(right) / len(right), "n": len(right)} for name, right in sorted(members.items())}
