"""The search of `graft plan --advise`: what the command line says becomes a search, what it finds text and recipe files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def run(recipe: str | None, overrides: list[str] | None, model: str | None, length: int, budget: str | None, device: str | None,
        gpu: str | None, wishes: list[str] | None, among: list[str] | None, plans: int, jobs: int | None, output: Path | None,
        use_data: bool, say: Callable[[str], None]) -> tuple[Any, list[str], str]:
    """(what was found, files written, text to print)."""
    from ..errors import UsageError
    from ..planning.ahead import cores
    from ..planning.measure import format_bytes, parse_bytes
    from ..planning.search import advise
    from ..recipe import load_recipe
    from .plan import machine_budget

    if (recipe is None) == (model is None):
        raise UsageError("advice needs a recipe or --model, one of both",
                         remedy="graft plan RECIPE --advise, or graft plan --advise --model NAME --length TOKENS")
    if output is not None and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"{output} exists and is not empty", remedy="-o NAME of a new folder")
    restricted = parse_among(among or [])
    named = [w.strip() for each in wishes or [] for w in each.split(",") if w.strip()]
    device, roofline, memory, notes = machine(device, gpu, budget)
    limit = memory if budget is None and memory else machine_budget(device) if budget in (None, "auto") else parse_bytes(budget)
    loaded = load_recipe(recipe if model is None else document(model, length, device), overrides, notes=notes)
    tokens = None
    if use_data and model is None:
        tokens, note = longest(loaded)
        notes += [note] if note else []
    for note in notes:
        say(f"note: {note}")
    say(f"budget {format_bytes(limit)} on {roofline.name}: {roofline.basis}")
    found = advise(loaded, budget=limit, device=device, roofline=roofline, wishes=named, plans=plans, among=restricted, tokens=tokens,
                   say=say, jobs=jobs or min(plans, cores(), 4))
    found.notes += notes
    files = write(found, output) if output is not None and found.rows else []
    return found, files, text(found, files)


def machine(device: str | None, gpu: str | None, budget: str | None) -> tuple[str, Any, int | None, list[str]]:
    """(device, its roofline, memory of a named card, notes)."""
    import torch

    from ..errors import UsageError
    from ..planning import roofline
    from ..planning.measure import parse_bytes

    if gpu is not None:
        if device == "cpu":
            raise UsageError("--gpu names a CUDA card and --device cpu none", remedy="leave one of them out")
        card = roofline.card(gpu)
        return "cuda", card, card.memory, []
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu" or torch.cuda.is_available():
        return device, roofline.here(device), None, []
    if budget in (None, "auto"):
        raise UsageError("this machine has no CUDA device, so its memory is not known", remedy="--gpu NAME, or --budget 24GiB")
    card = roofline.card(roofline.smallest_card(parse_bytes(budget)))
    return "cuda", card, None, [f"times are for {card.name}, the smallest card of the table with that memory; --gpu NAME for another"]


def parse_among(texts: list[str]) -> dict[str, list[str]]:
    """{axis: names}, each checked against the registry."""
    from ..errors import UsageError, nearest
    from ..registry import lookup

    axes, found = ("storage", "adapter", "optimizer", "estimator", "selection"), {}
    for each in texts:
        axis, sign, names = each.partition("=")
        if axis not in axes or not sign or not names:
            raise UsageError(f"--among '{each}' names no choice{nearest(axis, axes)}", remedy="--among adapter=lora,paca")
        found.setdefault(axis, []).extend(
            name if (axis, name) == ("adapter", "full") else lookup(axis, name).name for name in names.split(","))
    return found


def document(model: str, length: int, device: str) -> dict[str, Any]:
    """The recipe of a model of which nothing else is known."""
    import torch

    from ..modeling.arithmetic import slow_on_cpu

    precision = "fp32" if device == "cpu" and slow_on_cpu(torch.bfloat16) else "bf16"
    return {"model": model, "data": {"train": "train.jsonl", "max_length": length}, "train": {"precision": precision}}


def longest(recipe: Any) -> tuple[int | None, str | None]:
    """(tokens of the longest micro-batch of the data, note)."""
    from ..errors import GraftworkError
    from ..planning.simulate import heaviest_shape

    try:
        return heaviest_shape(recipe)[1], None
    except GraftworkError as error:
        return None, f"rows of {recipe.data.max_length} tokens, not those of the data ({error.message})"


def write(found: Any, folder: Path) -> list[str]:
    """One recipe a row, each read back. Returns the paths."""
    import yaml

    from ..files import atomic_folder
    from ..planning.measure import format_bytes
    from ..planning.search import describe
    from ..recipe import load_recipe

    names = []
    if folder.exists():
        folder.rmdir()  # it is empty
    with atomic_folder(folder) as temporary:
        for i, row in enumerate(found.rows, 1):
            parts = row.candidate.names()
            name = f"{i}-{parts['storage']}-{parts.get('adapter', 'full')}-{parts.get('optimizer', parts['estimator'])}.yaml"
            made = {**row.document, "output_dir": row.document.get("output_dir") or f"runs/{name.removesuffix('.yaml')}"}
            head = [describe(row.candidate), row.reason, f"planned: {format_bytes(row.plan['peak_bytes'])} of tensors, "
                    f"{format_bytes(row.total)} expected on {found.device}", f"evidence: {row.quality.text}",
                    "the learning rate is a start for a search: graft sweep FILE optimizer.lr=..."]
            body = "".join(f"# {' '.join(line.split())}\n" for line in head) + yaml.safe_dump(made, sort_keys=False, allow_unicode=True)
            (temporary / name).write_text(body, encoding="utf-8")
            load_recipe(temporary / name)
            names.append(str(folder / name))
    return names


def text(found: Any, files: list[str]) -> str:
    """The Pareto set as a table, a reason below each row."""
    from ..planning.judging import mergeable, servable
    from ..planning.measure import format_bytes, format_seconds
    from ..planning.search import describe

    counted = f"{found.candidates:,} candidates, {len(found.planned)} planned, {len(found.refused)} refused"
    if not found.rows:
        least = found.smallest
        lines = [f"nothing that was planned fits {format_bytes(found.budget)} ({counted})"]
        if least is not None:
            lines.append(f"the smallest: {describe(least.candidate)}, {format_bytes(least.total)}")
        return "\n".join([*lines, "a smaller model, shorter rows or a larger budget is needed"])
    lines = []
    for i, row in enumerate(found.rows, 1):
        lines += [f"{i}  {describe(row.candidate)}",
                  f"   peak {format_bytes(row.plan['peak_bytes'])} ({format_bytes(row.total)} expected), "
                  f"{format_seconds(row.seconds)} a step, file {format_bytes(row.saved)}, "
                  f"merges: {mergeable(row.candidate)[1]}, serves: {servable(row.candidate)[1]}",
                  f"   quality: {row.quality.text}", f"   why: {row.reason}"]
    lines += ["", f"{counted}; budget {format_bytes(found.budget)} on {found.device}",
              f"seconds: roofline of {found.roofline.name}, {found.roofline.basis}",
              f"expected: {found.rows[0].plan['device']['measured']}; evidence: `python benchmarks/evidence.py`"]
    return "\n".join([*lines, *(f"written: {path}" for path in files)])
