"""`graft eval`: score a run, a graft, a base, or several grafts at once on held-out rows."""

from __future__ import annotations

import json
from pathlib import Path

import typer

EPILOG = ("Examples: graft eval runs/e2e --data held_out.jsonl --json | "
          r"graft eval runs/gsm8k --data test.jsonl --extract '####\s*(\S+)' | graft eval --model smollm2-135m-instruct --data F | "
          "graft eval smollm2-135m-instruct --graft runs/a --graft runs/b --base --data F --metrics loss,rouge")


def run(
    run: str = typer.Argument(None, metavar="RUN", help="Run folder, folder of a saved graft, or a model."),
    overrides: list[str] = typer.Argument(None, help="Options of the data section: max_length=512 columns.prompt=question"),
    data: list[str] = typer.Option([], "--data", help="Rows: file or glob; repeatable (default: the run's data.eval)."),
    model: str = typer.Option(None, "--model", help="The base; alone: evaluates the bare base."),
    graft: list[str] = typer.Option([], "--graft", help="FOLDER or NAME=FOLDER: one more graft that answers all rows; repeatable."),
    adapter: str = typer.Option(None, "--adapter", help="One member of a fleet."),
    base: bool = typer.Option(False, "--base", help="Score the run's base without its adapter; with --graft: the base as well."),
    storage: str = typer.Option(None, "--storage", help="dense, nf4, ... (default: what the run was trained on)."),
    dtype: str = typer.Option(None, "--dtype", help="bf16, fp32 (default: the run's precision)."),
    metrics: str = typer.Option(None, "--metrics", help="loss, exact_match, bits_per_byte, token_f1, bleu, chrf, rouge, accuracy, "
                                "macro_f1, micro_f1, f1, mcc, mse, mae, pearson, spearman, multiple_choice, multiple_choice_pmi, pass_at_k "
                                "(default: what suits the rows)."),
    extract: str = typer.Option(None, "--extract", help="Regular expression of what is compared: its last match, first group."),
    stop: list[str] = typer.Option([], "--stop", help="Text that ends an answer; repeatable."),
    labels: str = typer.Option(None, "--labels", help="Class names, with commas; for a score head in the order of the head."),
    positive: str = typer.Option(None, "--positive", help="Label of the metric f1 (default: 1)."),
    stride: int = typer.Option(None, "--stride", min=1, help="Score long rows in windows that move by so many tokens, uncut."),
    window: int = typer.Option(None, "--window", min=2, help="Tokens of a window (default: max_length)."),
    limit: int = typer.Option(None, "--limit", min=1, help="First rows only."),
    batch_size: int = typer.Option(16, "--batch-size", min=1, help="Rows computed together."),
    max_new_tokens: int = typer.Option(None, "--max-new-tokens", min=1, help="Longest answer (default: the longest reference)."),
    k: str = typer.Option("1", "--k", help="pass@k: one number or several with commas."),
    samples: int = typer.Option(None, "--samples", min=1, help="Programs per problem (default: the largest k)."),
    temperature: float = typer.Option(None, "--temperature", min=0, help="Of programs (default: 0 for one, 0.8 for several)."),
    allow_code: bool = typer.Option(False, "--allow-code-execution", help="Run programs that the model writes, in a sandbox."),
    code_seconds: float = typer.Option(10.0, "--code-seconds", min=0.1, help="Longest time of one program."),
    code_memory: int = typer.Option(1024, "--code-memory", min=64, help="Memory of one program, in MiB."),
    lm_eval: str = typer.Option(None, "--lm-eval", help="Tasks of lm-eval with commas, instead of --data and --metrics."),
    lm_eval_path: str = typer.Option(None, "--lm-eval-path", help="Folder with lm-eval tasks of your own."),
    lm_eval_chat: bool = typer.Option(False, "--lm-eval-chat", help="Put lm-eval's prompts into the chat template."),
    num_fewshot: int = typer.Option(None, "--num-fewshot", min=0, help="Examples before each of lm-eval's prompts."),
    resamples: int = typer.Option(2000, "--resamples", min=10, help="Of the bootstrap intervals."),
    seed: int = typer.Option(0, "--seed", help="Seed of the bootstrap intervals and of sampled programs."),
    output: str = typer.Option(None, "--output", help="Write predictions, one JSON line per row."),
    resume: bool = typer.Option(False, "--resume", help="Take what an interrupted evaluation with the same --output wrote."),
    as_json: bool = typer.Option(False, "--json", help='Print {"metrics": {...}} as one JSON line.'),
    quiet: bool = typer.Option(False, "--quiet", help="No progress."),
) -> None:
    """Scores on held-out rows with 95 % bootstrap intervals; with --graft several grafts in one pass, and their differences."""
    import sys
    import time

    from ..data import Statistics
    from ..evaluation.families.base import Options, find
    from ..evaluation.metrics import pattern
    from ..evaluation.scoring import compare, for_rows
    from ..evaluation.several import find_targets, identity
    from ..evaluation.targets import find_target, load_target, route_rows
    from ..evaluation.tasks import read_tasks
    from ..files import atomic_write_text
    from ._eval_options import check_code, code_options, data_options, default_data, journal_of, numbers, raise_usage
    from ._eval_text import by_member, print_comparison, print_scores, print_wrong
    from .generate import row_progress

    def say(text: str) -> None:
        if not quiet:
            print(text, file=sys.stderr)

    if lm_eval is not None:
        from ._eval_harness import run_harness

        return run_harness(run, graft, lm_eval, path=lm_eval_path, chat=lm_eval_chat, num_fewshot=num_fewshot, model=model, adapter=adapter,
                           base=base, storage=storage, dtype=dtype, limit=limit, batch_size=batch_size, seed=seed, as_json=as_json, say=say,
                           quiet=quiet, misplaced=[*data, *(overrides or [])] or metrics)
    pattern(extract)
    journal = journal_of(output, resume)
    if run is not None and "=" in run and not Path(run).exists():  # `graft eval --model M max_length=64`
        run, overrides = None, [run, *(overrides or [])]
    asked = None if metrics is None else [m.strip() for m in metrics.split(",") if m.strip()]
    options = Options(positive=positive, k=numbers(k))
    find(asked if asked is not None else ["loss"], options)
    code = code_options(options.k, samples, temperature, allow_code, code_seconds, code_memory)
    if graft:
        if adapter is not None:
            raise_usage("--adapter chooses from a fleet, and --graft names grafts", "use one of them")
        target, shown = find_targets(run, graft, model=model, storage=storage, dtype=dtype, base=base)
    else:
        target, shown = find_target(run, model=model, storage=storage, dtype=dtype, adapter=adapter), None
    config = data_options(target.data, overrides or [])
    start, statistics = time.monotonic(), Statistics()
    tasks = read_tasks(list(data) or default_data(target, config), config, limit=limit, statistics=statistics)
    check_code(for_rows(tasks, asked), code)
    if shown is not None:
        targets = {name: [attached] * len(tasks) for name, attached in shown.items()}
    else:
        targets = {"": route_rows(target, tasks) if not base else [None] * len(tasks)}
    loaded, tokenizer = load_target(target, say=say)
    bars: dict = {}

    def progress(stage: str, done: int, total: int) -> None:
        bars.setdefault(stage, row_progress(stage))(done, total)

    names = [n.strip() for n in labels.split(",")] if labels else next(iter(target.labels.values()), None)
    found = compare(loaded, tokenizer, tasks, targets, config=config, objective=target.objective, metrics=asked, extract=extract,
                    options=options, resamples=resamples, progress=None if quiet else progress, labels=names, batch_size=batch_size,
                    max_new_tokens=max_new_tokens, stop=stop, seed=seed, stride=stride, window=window, code=code, journal=journal,
                    identity=identity(target) if journal else "")
    seconds = round(time.monotonic() - start, 3)
    for one in found.targets.values():
        one.metrics.update({"skipped": statistics.skipped} if statistics.skipped else {}, seconds=seconds)
    if statistics.skipped:
        say(f"note: {statistics.skipped} unusable rows are skipped, the first: {statistics.reasons[0]}")
    for note in dict.fromkeys(note for one in found.targets.values() for note in one.notes):
        say(f"note: {note}")
    if output:
        atomic_write_text(output, "".join(json.dumps({**({"target": name} if shown else {}), **row}, ensure_ascii=False) + "\n"
                                          for name, one in found.targets.items() for row in one.rows))
        journal.unlink(missing_ok=True)
    first = next(iter(found.targets.values()))
    members = by_member(first.rows, targets[""] if target.fleet else None) if shown is None else {}
    if as_json:
        several = {"targets": {name: one.metrics for name, one in found.targets.items()}, "differences": found.differences}
        print(json.dumps({"metrics": first.metrics, **({"adapters": members} if members else {}), **(several if shown else {})}))
        return
    if shown is not None:
        print_comparison({name: one.metrics for name, one in found.targets.items()}, found.differences)
        return
    print_scores(first.metrics)
    for name, score in members.items():
        print(f"  {name:<20} " + "  ".join(f"{key} {value:.4f}" for key, value in score.items() if key != "n") + f"  n {score['n']}")
    print_wrong(first.rows)
