"""`graft plan`: what a recipe costs in memory and time, and what would fit a budget."""

from __future__ import annotations

from pathlib import Path

import typer

EPILOG = ("Examples: graft plan recipe.yaml --budget 16GiB | graft plan recipe.yaml adapter.r=64 train.batch_size=4 --device cuda\n\n"
          "What to use: graft plan recipe.yaml --advise --budget auto --for quality --for speed -o recipes\n\n"
          "From a model alone: graft plan --advise --model llama-2-70b.json --length 2048 --gpu a100-80gb --for quality,file-size\n\n"
          "Among some methods: graft plan recipe.yaml --advise --budget 8GiB --among adapter=lora,paca,full --among storage=dense,nf4")


def run(
    recipe: str = typer.Argument(None, help="Recipe (YAML); with --advise --model: none."),
    overrides: list[str] = typer.Argument(None, help="Overrides by dotted path: train.batch_size=4"),
    budget: str = typer.Option(None, "--budget", help="16GiB, 24GB, ... or auto: what this machine has. Exit 1 if it does not fit."),
    device: str = typer.Option(None, "--device", help="cuda or cpu (default: what this machine has)."),
    no_data: bool = typer.Option(False, "--no-data", help="Rows of max_length instead of the heaviest batch of the data."),
    every_block: bool = typer.Option(False, "--every-block", help="Simulate every block, also where a few equal ones tell the same."),
    no_search: bool = typer.Option(False, "--no-search", help="Do not look for the nearest fit."),
    advise: bool = typer.Option(False, "--advise", help="Search storage, adapter, optimizer and schedule for what is worth using."),
    wishes: list[str] = typer.Option(None, "--for", help="With --advise: quality, speed, file-size, mergeable, servable; the first counts "
                                                         "most (default: quality)."),
    among: list[str] = typer.Option(None, "--among", help="With --advise: AXIS=NAME,NAME restricts the search; adapter=full: full tuning."),
    plans: int = typer.Option(8, "--plans", min=1, help="With --advise: recipes planned at most."),
    jobs: int = typer.Option(None, "--jobs", min=1, help="With --advise: processes that plan (default: one a core, at most 4)."),
    gpu: str = typer.Option(None, "--gpu", help="With --advise: a card by its published peaks: l4, a100-80gb, ..."),
    model: str = typer.Option(None, "--model", help="With --advise, instead of a recipe: name, folder, config.json or Hub id."),
    length: int = typer.Option(1024, "--length", min=2, help="With --model: tokens of a row."),
    output: Path = typer.Option(None, "-o", "--output", help="With --advise: folder to write the recipes to."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
    quiet: bool = typer.Option(False, "--quiet", help="No progress."),
) -> None:
    """Plan a recipe's memory from its own step on fake tensors, or with --advise find the recipes that are worth running; nothing is
    downloaded and no weight is read."""
    import json
    import sys

    from ..errors import UsageError, nearest
    from ..planning.measure import parse_bytes
    from ..recipe import load_recipe

    def say(text: str) -> None:
        if not quiet:
            print(text, file=sys.stderr, flush=True)

    if device not in (None, "cuda", "cpu"):
        raise UsageError(f"there is no device '{device}'{nearest(device, ('cuda', 'cpu'))}", remedy="--device cuda or --device cpu")
    if model is not None and recipe is not None and "=" in recipe:  # the first override, not a recipe
        recipe, overrides = None, [recipe, *(overrides or [])]
    if advise:
        from ._advise import run as search

        found = search(recipe, overrides, model, length, budget, device, gpu, wishes, among, plans, jobs, output, not no_data, say)
        print(json.dumps(found[0].to_json() | {"written": found[1]}) if as_json else found[2])
        if not found[0].rows:
            raise typer.Exit(1)
        return
    only = {"--for": wishes, "--among": among, "--gpu": gpu, "--model": model, "--jobs": jobs, "-o": output}
    if any(only.values()):
        raise UsageError(f"{', '.join(k for k, v in only.items() if v)} is for a search", remedy="add --advise")
    if recipe is None:
        raise UsageError("no recipe is named", remedy="graft plan RECIPE, or graft plan --advise --model NAME --length TOKENS")
    limit = None if budget is None else machine_budget(device) if budget == "auto" else parse_bytes(budget)
    notes: list[str] = []
    loaded = load_recipe(recipe, overrides, notes=notes)
    for note in notes:
        say(f"note: {note}")
    from ..planning.simulate import plan

    say("simulating two steps on fake tensors")
    made = plan(loaded, budget=limit, device=device, use_data=not no_data, every_block=every_block)
    advice = None
    if made.fits is False and not no_search:
        from ..planning.advise import nearest_fit

        say("it does not fit; looking for the nearest recipe that does")
        advice = nearest_fit(loaded, limit, made, device=device, say=say)
    if as_json:
        print(json.dumps({**made.to_json(), **({"nearest_fit": advice.to_json()} if advice else {})}))
    else:
        print(describe(loaded, made, advice))
    if made.fits is False:
        raise typer.Exit(1)


def machine_budget(device: str | None) -> int:
    """Bytes that this machine has free: of its CUDA device, else of main memory (within the limit of a container)."""
    import os

    import torch

    from ..errors import UsageError

    if torch.cuda.is_available() and device != "cpu":
        return torch.cuda.mem_get_info()[0]
    if device == "cuda":
        raise UsageError("--budget auto: this machine has no CUDA device", remedy="name the amount: --budget 24GiB")
    found = []
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit, open("/sys/fs/cgroup/memory.current",
                                                                                 encoding="ascii") as used:
            found.append(int(limit.read()) - int(used.read()))
    except (OSError, ValueError):  # another system, no container, or no limit in it
        pass
    if not found and hasattr(os, "sysconf"):
        found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    if not found:
        raise UsageError("--budget auto: this system does not say how much memory it has", remedy="name the amount: --budget 16GiB")
    return max(1, min(found))


def describe(recipe, made, advice) -> str:
    """The plan as text."""
    from ..planning.measure import format_bytes

    batch, device = made.batch, made.device
    trained = f", {batch['trained_tokens']} trained" if batch["trained_tokens"] is not None else ""
    lines = [f"{parts_of(recipe)} on {recipe.model}",
             f"step: {batch['micro_batches']} x {batch['rows']} rows x {batch['tokens']} tokens{trained}; "
             f"{made.trained:,} parameters trained",
             ""]
    lines += [f"  {name:<16}{format_bytes(n):>12}" for name, n in made.categories.items() if n]
    lines += [f"  {'tensors at peak':<16}{format_bytes(made.peak_bytes):>12}", ""]
    lines += [f"  {name.removesuffix('_bytes'):<16}{format_bytes(device[name]):>12}"
              for name in ("allocator_bytes", "reserve_bytes", "context_bytes")]
    lines += [f"  {'expected use':<16}{format_bytes(device['total_bytes']):>12}   ({device['measured']})",
              f"  basis: {device['basis']}", ""]
    lines += time_lines(made)
    lines += [f"note: {note}" for note in made.notes]
    if made.budget is not None:
        verdict = "fits" if made.fits else "does not fit"
        lines.append(f"{verdict}: {format_bytes(device['total_bytes'])} with the reserve, budget {format_bytes(made.budget)}")
    if advice is not None and advice.overrides is not None:
        lines.append(f"nearest fit, {format_bytes(advice.plan.device['total_bytes'])} "
                     f"({format_bytes(advice.plan.peak_bytes)} of tensors):\n  {shell(advice.overrides)}")
    elif advice is not None:
        smallest = advice.smallest
        least = f"; the smallest, {format_bytes(smallest[1])}: {shell(smallest[0])}" if smallest else ""
        lines.append(f"nothing that was tried fits{least}\n  a smaller model or a larger budget is needed")
    return "\n".join(lines)


def parts_of(recipe) -> str:
    """`nf4 + lora, adamw, backprop, causal_lm`."""
    adapter = recipe.adapter.method if recipe.adapter is not None else "full tuning"
    names = [f"{recipe.storage.method} + {adapter}", *([recipe.optimizer.method] if recipe.optimizer is not None else []),
             recipe.estimator.method, *(s.method for s in recipe.selection), recipe.objective.method]
    return ", ".join(names)


def time_lines(made) -> list[str]:
    from ..planning.measure import format_seconds

    if made.seconds_per_step is None:
        return ["time: not estimated (this machine does not have that device)"]
    low, high = made.seconds_per_step
    text = f"time: {format_seconds(low)} to {format_seconds(high)} a step on this machine"
    if made.hours is not None:
        text += f", {made.steps} steps in {made.hours[0]:.2g} to {made.hours[1]:.2g} hours"
    return [text]


def shell(overrides: list[str]) -> str:
    """Overrides as words of a command line."""
    import shlex

    return " ".join(shlex.quote(each) for each in overrides)
