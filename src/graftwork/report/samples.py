"""Answers before and after training: held-out rows, greedily, with the graft off and on.

Each prompt is exactly what training put before the answer. Rows: the first of `data.eval`, or of what `eval_fraction` held out; of a
fleet's files some each.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..errors import UsageError

#: rows that are answered after a training, and the longest answer in tokens
ROWS, TOKENS = 4, 96
#: characters of a prompt that are kept, from its end
PROMPT = 1200


def held_out(recipe: Any, count: int) -> list[tuple[str, Any]]:
    """[(graft, example)]: the first held-out examples with an answer. Raises UsageError where the recipe holds none out."""
    from ..data import find_files, hold_out, load_dataset_rows

    config = recipe.data
    if config.eval is None and not config.eval_fraction:
        raise UsageError("no rows are held out", remedy="data.eval: FILE, or data.eval_fraction: 0.1")
    reading = config.model_dump(include={"format", "columns", "skip_bad", "limit", "online"})
    files = {path.name.split(".")[0]: path for path in find_files(config.train)} if recipe.is_fleet else {"default": config.train}
    found: list[tuple[str, Any]] = []
    for name, path in list(files.items())[:count]:
        if config.eval is not None:
            rows = load_dataset_rows(config.eval, **reading)
        else:
            rows = hold_out(load_dataset_rows(path, **reading), config.eval_fraction, recipe.train.seed)[1]
        answered = [row for row in rows if (row.messages is not None or row.completion is not None)
                    and (row.adapter is None or row.adapter == name or not recipe.is_fleet)]
        found += [(name, row) for row in answered[:max(1, count // len(files))]]
    if not found:
        raise UsageError("the held-out rows have no answers to compare: they are to be classified, or plain text",
                         remedy="graft eval scores them")
    return found[:count]


def write_samples(folder: Path, recipe: Any, model: Any, tokenizer: Any, grafts: Iterable[str], *, count: int = ROWS) -> None:
    """samples.json of a run: [{prompt, right, before, after}], with `adapter` for a fleet. grafts: names on the model; none: the model
    itself was trained, and only what it says now is there."""
    from ..data import Renderer
    from ..evaluation.tasks import prompt_and_answer
    from ..files import atomic_write_text
    from ..serving.generate import generate

    known = set(grafts)
    rows = [(name, example) for name, example in held_out(recipe, count) if name in known or not known]
    renderer = Renderer(tokenizer, train_on="last_assistant", system=recipe.data.system, chat=recipe.data.chat)
    parts = [prompt_and_answer(renderer, example) for _, example in rows]
    longest = min(TOKENS, max(len(answer) for _, answer in parts) + 8)

    def answers(names: list[str | None] | None) -> list[str]:
        done = generate(model, tokenizer, [ids for ids, _ in parts], adapters=names, max_new_tokens=longest)
        return [each.text.strip() for each in done]

    def text(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()

    after = answers([name for name, _ in rows] if known else None)
    before = answers([None] * len(rows)) if known else [None] * len(rows)
    found = [{**({"adapter": name} if recipe.is_fleet else {}), "prompt": text(ids)[-PROMPT:], "right": text(right),
              **({} if old is None else {"before": old}), "after": new}
             for (name, _), (ids, right), old, new in zip(rows, parts, before, after)]
    atomic_write_text(folder / "samples.json", json.dumps(found, ensure_ascii=False))


def of_saved(folder: Path, *, count: int, say: Callable[[str], None]) -> None:
    """samples.json of a finished run, from its base and its saved graft."""
    from ..evaluation.targets import find_target, load_target
    from ..recipe import load_recipe

    recipe = load_recipe(folder / "config.yaml", check=False)
    held_out(recipe, count)  # before a model is loaded
    target = find_target(folder)
    model, tokenizer = load_target(target, say=say)
    say(f"samples: {count} rows before and after")
    write_samples(folder, recipe, model, tokenizer, list(target.grafts), count=count)
