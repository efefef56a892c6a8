"""`graft validate`: everything about a recipe and its data that can be known before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

EPILOG = "Example: graft validate recipe.yaml data.max_length=512"
SHOWN = 1500  # characters of the rendered example


def run(
    recipe: Path = typer.Argument(..., help="Recipe (YAML)."),
    overrides: list[str] = typer.Argument(None, help="Overrides by dotted path: data.max_length=512"),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
    quiet: bool = typer.Option(False, "--quiet", help="No notes."),
) -> None:
    """Check recipe, model and data, and show one example as it will be trained; all problems at once."""
    import json
    import sys

    from ..errors import RecipeError
    from ..recipe import load_recipe

    notes: list[str] = []
    try:
        loaded = load_recipe(recipe, overrides, notes=notes)
    except RecipeError as error:
        if not as_json:
            raise
        print(json.dumps({"ok": False, "problems": error.problems}))
        raise typer.Exit(2) from None
    for note in [] if quiet else notes:
        print(f"note: {note}", file=sys.stderr)
    check(loaded, as_json=as_json)


def check(recipe: Any, *, as_json: bool = False) -> None:
    """Prints what a run of this recipe would do, or all its problems (then exit code 1)."""
    import json
    import sys

    found = inspect_recipe(recipe)
    if as_json:
        print(json.dumps(found))
    else:
        print(describe(found, color=sys.stdout.isatty()))
    if not found["ok"]:
        for problem in [] if as_json else found["problems"]:
            print(f"error: {problem}", file=sys.stderr)
        raise typer.Exit(1)


def inspect_recipe(recipe: Any) -> dict[str, Any]:
    """What `check` reports, as JSON values: ok, problems, recipe, data (by split), example, steps, parameters."""
    from ..data import describe_example
    from ..errors import GraftworkError
    from ..modeling.models import load_config, load_tokenizer

    problems: list[str] = []
    found: dict[str, Any] = {"recipe": recipe.document()}
    tokenizer, sets, labels = None, {}, None
    try:
        load_config(recipe.model)
        tokenizer = load_tokenizer(recipe.model)
        if tokenizer is None:
            problems.append(f"{recipe.model} has no tokenizer\n  remedy: add the tokenizer files to the model folder")
    except GraftworkError as error:
        problems.append(str(error))
        found["model_error"] = True
    if tokenizer is not None:
        sets = _data(recipe, tokenizer, problems)
    if sets:
        train, held = next(iter(sets.values()))
        labels = train.label_names
        found["data"] = {name: {"train": t.statistics.to_json(), "eval": e.statistics.to_json() if e is not None else None}
                         for name, (t, e) in sets.items()}
        found["labels"] = list(labels) if labels else None
        found["real_labels"] = train.real
        shown = next((i for i in range(len(train)) if 2 <= train.lengths()[i]), 0)
        found["example"] = {"source": train.sources(shown), "tokens": describe_example(train, shown),
                            "label": train[shown]["labels"] if train.real else labels[train[shown]["labels"]] if labels else None}
        found["steps"] = {name: _steps(recipe, len(t)) for name, (t, _) in sets.items()}
    if not found.pop("model_error", False):
        _parameters(recipe, list(sets) or None, labels, found, problems)
    _output(recipe, problems)
    return {"ok": not problems, "problems": problems, **found}


def _data(recipe: Any, tokenizer: Any, problems: list[str]) -> dict[str, tuple[Any, Any]]:
    """{adapter name: (train, eval)}. A bad row does not hide the next ones: up to five are listed a file."""
    from ..data import build_splits, find_files
    from ..errors import DataError, GraftworkError
    from ..training.build import check_rows

    sets: dict[str, tuple[Any, Any]] = {}
    try:
        files = find_files(recipe.data.train) if recipe.is_fleet else [None]
    except GraftworkError as error:
        problems.append(str(error))
        return sets
    for path in files:
        name = "default" if path is None else path.name.split(".")[0]
        own = recipe.data if path is None else recipe.data.model_copy(update={"train": str(path)})
        try:
            sets[name] = build_splits(own, tokenizer, seed=recipe.train.seed, adapter=None if path is None else name)
        except DataError as error:
            problems += _bad_rows(own, tokenizer, recipe.train.seed) or [str(error)]
        except GraftworkError as error:
            problems.append(str(error))
    for train, _ in sets.values():
        try:
            check_rows(recipe, train)
        except DataError as error:
            problems.append(str(error))
            break
    return sets


def _bad_rows(config: Any, tokenizer: Any, seed: int) -> list[str]:
    """Reasons of the first bad rows of train and eval; empty when the data are unusable for another reason."""
    from ..data import build_splits
    from ..errors import GraftworkError

    try:
        train, held = build_splits(config.model_copy(update={"skip_bad": True}), tokenizer, seed=seed)
    except GraftworkError:
        return []
    bad, counts = [], []
    for data in (train, held):
        if data is not None and data.statistics.skipped:
            bad += data.statistics.reasons
            counts.append(data.statistics.skipped)
    if bad:
        bad[-1] += f"\n  remedy: mend the {sum(counts)} bad rows, or data.skip_bad=true leaves them out and counts them"
    return bad


def _steps(recipe: Any, rows: int) -> int:
    from ..training.batches import total_steps

    train = recipe.train
    return total_steps(rows, epochs=train.epochs, max_steps=train.max_steps, batch_size=train.batch_size,
                       accumulation=train.grad_accumulation)


def _parameters(recipe: Any, names: list[str] | None, labels: Any, found: dict[str, Any], problems: list[str]) -> None:
    from ..errors import GraftworkError
    from ..planning.simulate import count_parameters

    try:
        trained, total, sites = count_parameters(recipe, names, len(labels) if labels else None)
        found.update(trained_parameters=trained, model_parameters=total, sites=sites)
    except GraftworkError as error:
        problems.append(str(error))


def _output(recipe: Any, problems: list[str]) -> None:
    import os

    if not recipe.output_dir:
        problems.append("the recipe has no output_dir\n  remedy: add output_dir: runs/NAME")
        return
    folder = Path(recipe.output_dir)
    if folder.exists() and not folder.is_dir():
        problems.append(f"output_dir {folder} is a file\n  remedy: choose another folder")
        return
    parent = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not os.access(parent, os.W_OK):
        problems.append(f"output_dir {folder} cannot be written\n  remedy: choose a folder you may write to")


def describe(found: dict[str, Any], *, color: bool = False) -> str:
    """The findings as text."""
    import yaml

    lines = ["resolved recipe:", *(f"  {line}" for line in yaml.safe_dump(
        found["recipe"], sort_keys=False, allow_unicode=True, default_flow_style=None, width=118).splitlines())]
    for name, splits in found.get("data", {}).items():
        for split, stats in splits.items():
            if stats is not None:
                lines += ["", f"{split} data{'' if name == 'default' else ' ' + name}: {stats['examples']} examples in "
                          f"{stats['rows']} rows, {stats['trained_tokens']} of {stats['tokens']} tokens trained, "
                          f"longest {stats['longest']} tokens",
                          f"  truncated at {found['recipe']['data']['max_length']}: {stats['truncated']} "
                          f"({stats['share_truncated']:.1%}); skipped: {stats['skipped']}; dropped: {stats['dropped']}"]
                lines += [f"  {reason}" for reason in stats["reasons"]] + [f"  note: {note}" for note in stats["notes"]]
    if "example" in found:
        example = found["example"]
        text = mark(example["tokens"], color)
        what = "the whole text is read" if example["label"] is not None else "trained tokens " + ("in color" if color else "in [[...]]")
        lines += ["", f"example ({', '.join(example['source'][:3])}; {what}):",
                  *(f"  | {line}" for line in text.splitlines())]
        if example["label"] is not None:
            lines.append(f"  label: {example['label']}" + ("" if found["real_labels"] else f"; classes: {', '.join(found['labels'])}"))
    lines.append("")
    if "steps" in found:
        lines.append("steps: " + ", ".join(f"{n}" if name == "default" else f"{name} {n}" for name, n in found["steps"].items()))
    if "trained_parameters" in found:
        share = found["trained_parameters"] / max(found["model_parameters"], 1)
        lines.append(f"parameters trained: {found['trained_parameters']:,} of {found['model_parameters']:,} ({share:.3%})"
                     + (f", {found['sites']} adapters" if found["sites"] else ", full tuning"))
    lines.append("ok" if found["ok"] else f"{len(found['problems'])} problem{'s' * (len(found['problems']) > 1)}")
    return "\n".join(lines)


def mark(tokens: list[tuple[str, bool]], color: bool) -> str:
    """The text with its trained stretches marked; the middle of a long one is left out."""
    begin, end = ("\x1b[1;32m", "\x1b[0m") if color else ("[[", "]]")
    runs: list[tuple[str, bool]] = []
    for text, trained in tokens:
        if runs and runs[-1][1] == trained:
            runs[-1] = (runs[-1][0] + text, trained)
        else:
            runs.append((text, trained))
    shown = [(text if len(text) <= SHOWN else f"{text[:SHOWN // 2]} ...{len(text) - SHOWN} characters... {text[-SHOWN // 2:]}", trained)
             for text, trained in runs]
    return "".join(f"{begin}{text}{end}" if trained and text else text for text, trained in shown)
