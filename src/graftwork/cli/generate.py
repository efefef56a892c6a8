"""`graft generate`: answer a file of prompts, every row by its own adapter."""

from __future__ import annotations

import json
from pathlib import Path

import typer

EPILOG = "Example: graft generate --model smollm2-135m-instruct --adapter a=runs/a --input rows.jsonl --output out.jsonl"


def run(
    model: str = typer.Option(..., "--model", help="Packaged name, folder, .gguf file or Hub id."),
    adapter: list[str] = typer.Option([], "--adapter", help="NAME=FOLDER of a saved graft (ours or PEFT's); repeatable."),
    input: str = typer.Option(..., "--input", help="JSONL of {prompt | messages, adapter}; - reads stdin."),
    output: str = typer.Option("-", "--output", help="Where the rows go, with completion, finish_reason, tokens; - is stdout."),
    storage: str = typer.Option(None, "--storage", help="dense, nf4, ... (default: as the adapters were trained)."),
    dtype: str = typer.Option(None, "--dtype", help="bf16, fp32 (default: the checkpoint's)."),
    batch_size: int = typer.Option(16, "--batch-size", help="Rows decoded together."),
    max_new_tokens: int = typer.Option(256, "--max-new-tokens", help="Longest completion, in tokens."),
    temperature: float = typer.Option(0.0, "--temperature", help="0 is greedy."),
    top_p: float = typer.Option(1.0, "--top-p", help="Sample from the smallest set of this probability."),
    top_k: int = typer.Option(0, "--top-k", help="Sample from so many tokens; 0: all."),
    seed: int = typer.Option(0, "--seed", help="Seed of the sampling; a row's result does not depend on the batch."),
    stop: list[str] = typer.Option([], "--stop", help="Text that ends a completion; repeatable."),
    quiet: bool = typer.Option(False, "--quiet", help="No progress."),
) -> None:
    """Answer a file of prompts in batches, every row by its own adapter (null: the bare base)."""
    import sys

    from ..files import atomic_write_text
    from ..serving.generate import encode_prompt, generate
    from ..serving.loading import check_adapter, load_with_adapters, parse_adapters

    def say(text: str) -> None:
        if not quiet:
            print(text, file=sys.stderr)

    writable_output(output)
    folders = parse_adapters(adapter)
    rows, sources = read_requests(input, list(folders))
    base, tokenizer = load_with_adapters(model, folders, storage=storage, dtype=dtype, say=say)
    prompts = [located_call(source, lambda row=row: encode_prompt(tokenizer, row.get("messages", row.get("prompt")),
                                                                  tools=row.get("tools")))
               for row, source in zip(rows, sources)]
    check_lengths(base, prompts, sources)
    names = [check_adapter(row.get("adapter"), list(folders)) for row in rows]
    done = generate(base, tokenizer, prompts, adapters=names, max_new_tokens=max_new_tokens, batch_size=batch_size,
                    temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, stop=stop,
                    progress=None if quiet else row_progress("generate"))
    text = "".join(json.dumps({**row, "completion": c.text, "finish_reason": c.finish_reason, "tokens": c.tokens},
                              ensure_ascii=False) + "\n" for row, c in zip(rows, done))
    if output == "-":
        sys.stdout.write(text)
    else:
        atomic_write_text(output, text)
        say(f"{len(rows)} rows, {sum(c.tokens for c in done)} tokens: {output}")


def writable_output(output: str) -> None:
    """Raises UsageError or TrainingError now, not after the work, when the output cannot be written."""
    import os

    from ..errors import UsageError
    from ..files import disk_errors

    path = Path(output)
    if output == "-":
        return
    if path.is_dir():
        raise UsageError(f"--output {output} is a folder", remedy=f"name a file: {path / 'out.jsonl'}")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(13, "Permission denied", str(path.parent))


def read_requests(path: str, adapters: list[str]) -> tuple[list[dict], list]:
    """(rows, their sources), each with one of prompt and messages and a known adapter. Raises DataError with file and line."""
    import sys

    from ..data import Source, read_rows
    from ..data.files import _read_jsonl
    from ..errors import DataError
    from ..serving.loading import check_adapter

    stream = _read_jsonl("stdin", sys.stdin.buffer) if path == "-" else read_rows(path)
    rows, sources = [], []
    for source, row in stream:
        def check(row=row) -> dict:
            if isinstance(row, DataError):
                raise row
            if ("prompt" in row) == ("messages" in row):
                raise DataError(f"a row has either 'prompt' or 'messages', this one has {', '.join(map(str, row)) or 'no field'}",
                                remedy='write {"prompt": "...", "adapter": NAME or null}')
            if not isinstance(row.get("messages", row.get("prompt")), list if "messages" in row else (str, list)):
                raise DataError("'prompt' must be a text, 'messages' a list of messages", remedy="correct the row")
            check_adapter(row.get("adapter"), adapters)
            return row

        rows.append(located_call(source, check))
        sources.append(source)
    if not rows:
        raise DataError(f"{Source(path, 1)}: no rows", remedy="write one JSON object a line")
    return rows, sources


def located_call(source, function):
    """function(), its GraftworkErrors as DataErrors that begin with file and line."""
    from ..errors import DataError, GraftworkError

    try:
        return function()
    except GraftworkError as error:
        raise DataError(f"{source}: {error.message}", remedy=error.remedy) from None


def check_lengths(model, prompts: list[list[int]], sources: list) -> None:
    """Raises DataError with the line of the first prompt that leaves no room for an answer."""
    from ..errors import DataError
    from ..serving.generate import context_length

    room = context_length(model)
    for ids, source in zip(prompts, sources):
        if room is not None and len(ids) >= room:
            raise DataError(f"{source}: the prompt has {len(ids)} tokens, the model's context {room}",
                            remedy="shorten the prompt")


def row_progress(label: str, what: str = "rows"):
    """progress(done, total) on stderr: a moving line on a terminal, else a line every tenth of the rows (or whatever)."""
    import sys
    import time

    start, shown = time.monotonic(), [0]

    def progress(done: int, total: int) -> None:
        terminal = sys.stderr.isatty()
        if not terminal and done < total and (done - shown[0]) * 10 < total:
            return
        shown[0] = done
        text = f"{label}: {done} of {total} {what}, {time.monotonic() - start:.0f} s"
        print(f"\r{text}" if terminal else text, end="" if terminal and done < total else "\n", file=sys.stderr, flush=True)

    return progress
