"""`graft eval --lm-eval TASKS`: tasks of lm-eval on the same targets."""

from __future__ import annotations

import json
import time


def run_harness(run, grafts, tasks: str, *, path, chat: bool, num_fewshot, model, adapter, base: bool, storage, dtype, limit,
                batch_size: int, seed: int, as_json: bool, say, quiet: bool, misplaced) -> None:
    """Prints the scores of each target. Raises UsageError for options that belong to --data."""
    from ..evaluation.harness import check_installed, run_tasks
    from ..evaluation.several import find_targets
    from ..evaluation.targets import find_target, load_target
    from ._eval_options import raise_usage
    from ._eval_text import print_comparison, print_scores
    from .generate import row_progress

    check_installed()
    if misplaced:
        raise_usage("--lm-eval brings its own data and metrics", "leave out --data, --metrics and options of the data section")
    if grafts:
        target, shown = find_targets(run, grafts, model=model, storage=storage, dtype=dtype, base=base)
    else:
        target, shown = find_target(run, model=model, storage=storage, dtype=dtype, adapter=adapter), None
        if target.fleet and not base:
            raise_usage(f"{run} holds {len(target.grafts)} adapters, and lm-eval's rows name none",
                        "--adapter NAME, or --graft for several")
    loaded, tokenizer = load_target(target, say=say)
    start, bars, found = time.monotonic(), {}, {}

    def progress(stage: str, done: int, total: int) -> None:
        if done <= 1 or stage not in bars:
            bars[stage] = row_progress(stage)
        bars[stage](done, total)

    for name, attached in (shown or {"": None}).items():
        if shown:
            say(f"{name}:")
        found[name] = run_tasks(loaded, tokenizer, [task.strip() for task in tasks.split(",") if task.strip()], include_path=path,
                                adapter=attached, routed=shown is not None or base, num_fewshot=num_fewshot, limit=limit, chat=chat,
                                batch_size=batch_size, seed=seed, progress=None if quiet else progress)
    first = next(iter(found.values()))
    first["seconds"] = round(time.monotonic() - start, 3)
    if as_json:
        print(json.dumps({"metrics": first, **({"targets": found} if shown else {})}))
    elif shown:
        print_comparison(found, [])
    else:
        print_scores(first)
