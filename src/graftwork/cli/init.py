"""`graft init`: look at the data and the model, write a commented recipe that runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

EPILOG = "Example: graft init --data rows.jsonl --model smollm2-135m-instruct --budget 8GiB -o recipe.yaml"
LOOKED_AT = 2000  # rows


def run(
    data: str = typer.Option(..., "--data", help="Training rows: JSONL, CSV, Parquet; a file or a glob (one adapter a file)."),
    model: str = typer.Option("smollm2-135m-instruct", "--model", help="Packaged name, folder, .gguf file or Hub id."),
    eval: str = typer.Option(None, "--eval", help="Evaluation rows (default: a held-out share of the data)."),
    budget: str = typer.Option(None, "--budget", help="Memory, 8GiB or auto: the recipe is changed until its plan fits."),
    output: Path = typer.Option("recipe.yaml", "-o", "--output", help="The recipe to write."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an existing file."),
    quiet: bool = typer.Option(False, "--quiet", help="No notes."),
) -> None:
    """Look at the data and the model and write a commented recipe that runs."""
    import sys

    from ..errors import GraftworkError, UsageError
    from ..files import atomic_write_text

    def say(text: str) -> None:
        if not quiet:
            print(text, file=sys.stderr, flush=True)

    if output.is_dir():
        raise UsageError(f"{output} is a folder", remedy=f"-o {output}/recipe.yaml")
    if output.exists() and not overwrite:
        raise UsageError(f"{output} exists", remedy="--overwrite replaces it, -o NAME writes another")
    seen = look(data, model, eval)
    for note in seen.notes:
        say(f"note: {note}")
    sections = choose(seen)
    if budget is not None:
        fit(sections, budget, say)
    text = render(sections)
    from ..recipe import load_recipe

    try:
        load_recipe(_document(sections))
    except GraftworkError as error:  # a recipe that does not load must not be written
        raise UsageError(f"no recipe for these data and this model: {error}") from None
    atomic_write_text(output, text)
    say(f"{seen.rows} rows of format {seen.format}, longest {seen.longest} tokens: {output}\n"
        f"next: graft validate {output} | graft plan {output} | graft train {output}")


@dataclass
class Seen:
    """What the data and the model look like. lengths: tokens of the rows looked at, before cutting."""

    model: str
    data: str
    eval: str | None
    format: str
    rows: int
    lengths: list[int]
    labels: list[str] | None
    real: bool
    bad: list[str]
    context: int | None
    hidden: int
    fleet: bool
    notes: list[str] = field(default_factory=list)

    @property
    def longest(self) -> int:
        return max(self.lengths)


def look(data: str, model: str, eval: str | None) -> Seen:
    """Reads up to 2000 rows and the model's config and tokenizer. Raises DataError, ModelError, UsageError."""
    from ..data import find_files, from_examples, load_dataset_rows
    from ..data.loading import Statistics
    from ..errors import ModelError, UsageError
    from ..modeling.models import load_config, load_tokenizer

    config, tokenizer = load_config(model), load_tokenizer(model)
    if tokenizer is None:
        raise ModelError(f"{model} has no tokenizer", remedy="add the tokenizer files to the model folder")
    text_config = config.get_text_config()
    stats, fleet = Statistics(), any(c in data for c in "*?[")
    files = find_files(data)
    examples = load_dataset_rows(str(files[0]) if fleet else data, skip_bad=True, limit=LOOKED_AT, statistics=stats)
    if eval is not None:
        find_files(eval)
    seen = from_examples(tokenizer, examples, max_length=10**6, skip_bad=True, statistics=stats)
    labels = list(seen.label_names) if seen.label_names is not None else None
    kinds = " ".join(getattr(config, "architectures", None) or [])
    scored = labels is not None or seen.real
    if not scored and kinds and not any(word in kinds for word in ("CausalLM", "LMHead", "ConditionalGeneration")):
        raise UsageError(f"{model} is an encoder ({kinds}) and cannot learn to write these rows",
                         remedy="give a causal model, or rows with text and label")
    made = Seen(model, data, eval, _format_of(examples[0]), len(examples), seen.lengths(), labels, seen.real, stats.reasons[:3],
                getattr(text_config, "max_position_embeddings", None), getattr(text_config, "hidden_size", 0), fleet)
    if stats.skipped:
        made.notes.append(f"{stats.skipped} of the first {len(examples) + stats.skipped} rows are unusable and will be left out, "
                          f"the first: {stats.reasons[0]}")
    if not scored and getattr(tokenizer, "chat_template", None) is None and examples[0].messages:
        made.notes.append(f"{model} has no chat template")
    return made


def _format_of(example: Any) -> str:
    """The name of the format that makes such examples."""
    if example.texts is not None:
        return "regression" if example.is_real else "classification"
    if example.text is not None:
        return "text"
    if example.messages is not None:
        return "alpaca" if example.prompt is not None else "messages"
    return "completion"


def choose(seen: Seen) -> list[tuple[str | None, list[tuple[str, Any, str]]]]:
    """Sections of (key, value, meaning); the first section is the top level."""
    import math

    import torch

    from ..modeling.arithmetic import slow_on_cpu

    ordered = sorted(seen.lengths)
    most = ordered[min(len(ordered) - 1, math.ceil(0.99 * len(ordered)))]
    wanted = seen.longest if seen.longest <= 1.25 * most else most
    length = max(32, math.ceil(wanted / 32) * 32)
    if seen.context:
        length = min(length, seen.context)
    cut = sum(n > length for n in seen.lengths) / len(seen.lengths)
    classes = seen.labels is not None
    scored = classes or seen.real
    held = 0.0 if seen.eval or seen.rows < 20 else 0.1
    evaluates = bool(seen.eval or held)
    epochs = 3 if seen.rows < 2000 else 1
    precision = "bf16" if torch.cuda.is_available() or not slow_on_cpu(torch.bfloat16) else "fp32"
    lr = 1e-3 if seen.hidden <= 1024 else 2e-4
    name = Path(seen.data.replace("*", "all").replace("?", "").replace("[", "").replace("]", "")).name.split(".")[0] or "run"
    data = [("train", seen.data, f"{seen.format} rows" + ("; one adapter for each file" if seen.fleet else "")),
            ("format", "regression" if seen.real else "auto",
             "auto, messages, sharegpt, alpaca, completion, classification, regression or text"),
            ("max_length", length, f"tokens a row; the longest seen has {seen.longest}, {cut:.1%} are cut")]
    if seen.eval:
        data.append(("eval", seen.eval, "rows to evaluate on, never trained"))
    elif held:
        data.append(("eval_fraction", held, "share of the rows held out for evaluation; equal rows stay on one side"))
    if not scored:
        data.append(("train_on", "assistant", "whose tokens are learned: assistant, last_assistant, completion, all"))
        data.append(("packing", False, "several examples in a row, computed as if separate: quicker for short rows"))
    data.append(("skip_bad", bool(seen.bad), "leave unusable rows out and count them, instead of stopping"))
    target = f"{len(seen.labels)} classes: {', '.join(seen.labels[:6])}{', ...' if len(seen.labels) > 6 else ''}" if classes else (
        "one real number a row: squared error" if seen.real else "predict the next token")
    top = [("model", seen.model, "packaged name, folder, .gguf file, or Hub id org/name[@revision]"),
           ("output_dir", f"runs/{name}", "config.yaml, metrics.jsonl, checkpoints and the graft go here"),
           ("estimator", "backprop", "where gradients come from; mezo needs forward passes only"),
           ("objective", "classification" if classes else "regression" if seen.real else "causal_lm", target)]
    return [
        (None, top),
        ("storage", [("method", "dense", "how the frozen weights are kept; nf4: a quarter of the bytes")]),
        ("adapter", [("method", "lora", "what is learned; `graft methods --axis adapter` lists them"),
                     ("r", 8, "rank: capacity and bytes grow with it"), ("alpha", 16, "scale of the change is alpha / r"),
                     ("dropout", 0.0, "of the adapter's input, against overfitting"),
                     ("target_modules", "all-linear", "which linear maps: all-linear, attention, mlp, or names")]),
        ("optimizer", [("method", "adamw", "how gradients become updates"), ("lr", lr, "learning rate"),
                       ("weight_decay", 0.0, "decoupled decay of the learned tensors")]),
        ("data", data),
        ("train", [("epochs", epochs, "passes over the data"), ("max_steps", -1, "optimizer steps; overrides epochs when positive"),
                   ("batch_size", 8, "rows computed at once"), ("grad_accumulation", 1, "micro-batches a step"),
                   ("schedule", "cosine", "of the learning rate: constant, linear, cosine"),
                   ("warmup", 0.03, "share of the steps in which the rate rises"),
                   ("max_grad_norm", 1.0, "clip gradients at this norm; 0: never"),
                   ("precision", precision, "of the frozen base and the computation: bf16, fp32; learned tensors are fp32"),
                   ("gradient_checkpointing", False, "less memory for about a third more time"),
                   ("save_steps", 50, "a checkpoint every so many steps, to resume from"),
                   ("save_total_limit", 2, "checkpoints kept"),
                   ("eval_steps", 50 if evaluates else 0, "an evaluation every so many steps; 0: only at the end"),
                   ("seed", 0, "of the start, the order of rows and the held-out share")]),
    ]


def _document(sections: list) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for name, entries in sections:
        (document if name is None else document.setdefault(name, {})).update({key: value for key, value, _ in entries})
    return document


def fit(sections: list, budget: str, say) -> None:
    """Changes the sections, by the nearest fit, until the plan fits the budget. Raises GraftworkError when nothing does."""
    import yaml

    from ..errors import GraftworkError
    from ..planning.advise import nearest_fit
    from ..planning.measure import format_bytes, parse_bytes
    from ..planning.simulate import plan
    from ..recipe import load_recipe
    from .plan import machine_budget

    limit = machine_budget(None) if budget == "auto" else parse_bytes(budget)
    recipe = load_recipe(_document(sections))
    say("planning")
    first = plan(recipe, budget=limit, estimate_time=False)
    if first.fits:
        return
    advice = nearest_fit(recipe, limit, first, say=say)
    if advice.overrides is None:
        smallest = advice.smallest
        raise GraftworkError(f"no recipe for {recipe.model} was found that fits {format_bytes(limit)}",
                             remedy=f"a larger budget ({format_bytes(smallest[1])} is the least that was found) or a smaller model"
                             if smallest else "a larger budget or a smaller model")
    for override in advice.overrides:
        path, _, value = override.partition("=")
        section, _, key = path.rpartition(".")
        if not section:
            section, key = path, "method"
        entries = next(e for n, e in sections if n == section)
        place = next((i for i, entry in enumerate(entries) if entry[0] == key), None)
        meaning = entries[place][2] if place is not None else ""
        entry = (key, yaml.safe_load(value), f"{meaning} (chosen to fit {format_bytes(limit)})".strip())
        if place is None:
            entries.append(entry)
        else:
            entries[place] = entry


def render(sections: list) -> str:
    """The recipe as YAML with a comment beside every key."""
    import yaml

    lines = ["# A graftwork recipe. Check it: graft validate FILE; its cost: graft plan FILE; run it: graft train FILE",
             "# Every key can be overridden on the command line: graft train FILE train.max_steps=20"]
    for name, entries in sections:
        pad = "" if name is None else "  "
        if name is not None:
            lines.append(f"{name}:")
        for key, value, meaning in entries:
            scalar = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
            scalar = scalar.removesuffix("\n").removesuffix("\n...")
            line = f"{pad}{key}: {scalar}"
            lines.append(f"{line:<40}  # {' '.join(meaning.split())}")
    return "\n".join(lines) + "\n"
