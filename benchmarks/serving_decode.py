"""Decode steps of 32 rows: the engine with 1, 8 and 32 adapters against PEFT's `adapter_names` and the bare base; the bare engine
against Transformers."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from serving_common import TARGETS, EngineRun, GenerateRun, Results, median, prompts, race, ratio, twin, with_grafts
from torch import nn

from graftwork.adapters.row_groups import SETTLED
from graftwork.serving.engine import Engine, Limits, Request, Sampling

#: steps after which an engine has made its banks
WARM = SETTLED + 3


def decode(options: argparse.Namespace, results: Results, model: nn.Module, tokenizer: Any) -> None:
    """Absolute tokens a second (processor time), ratios, and the byte bound base / (base + adapters)."""
    settings = {k: getattr(options, k) for k in ("model", "dtype", "rows", "prompt", "steps", "rank", "adapters")}
    print(f"\n{'targets':<11} {'adapters':>8} {'base tok/s':>11} {'engine':>8} {'PEFT':>8} {'of base':>8} {'bound':>6} {'x PEFT':>7}")
    for label in options.targets:
        targets = TARGETS[label]
        found = results.part(f"decode {label}", settings, lambda targets=targets: _decode(options, targets, model, tokenizer))
        for row in found["rows"]:
            speed = row["tokens_per_cpu_second"]
            print(f"{label:<11} {row['adapters']:>8} {speed['base']:>11.1f} {speed['engine']:>8.1f} {speed['peft']:>8.1f} "
                  f"{row['of_base']['cpu']:>8.2f} {row['byte_bound']:>6.2f} {row['over_peft']['cpu']:>7.2f}", flush=True)


def _decode(options: argparse.Namespace, targets: Any, model: nn.Module, tokenizer: Any) -> dict[str, Any]:
    from decode import byte_bound, with_peft

    ids, new = prompts(model, options.rows, options.prompt), WARM + options.steps + 2
    ours = with_grafts(model, targets, max(options.adapters), options.rank)
    arguments = argparse.Namespace(tiny=False, model=options.model, dtype=options.dtype, rank=options.rank)
    theirs = with_peft(arguments, targets, ours).inner
    runs: dict[str, Any] = {"base": EngineRun(twin(model), tokenizer, ids, [None] * options.rows, new)}
    warm = {"base": WARM}
    for count in options.adapters:
        names = [f"a{i % count}" for i in range(options.rows)]
        runs[f"engine {count}"] = EngineRun(with_grafts(model, targets, count, options.rank), tokenizer, ids, names, new)
        runs[f"peft {count}"] = GenerateRun(twin(theirs), ids, new, adapter_names=names)
        warm[f"engine {count}"], warm[f"peft {count}"] = WARM, 2
    times = race(runs, warm, options.steps)
    rows = [{"adapters": n, "byte_bound": byte_bound(ours, n), "of_base": ratio(times, "base", f"engine {n}"),
             "over_peft": ratio(times, f"peft {n}", f"engine {n}"),
             "tokens_per_cpu_second": {kind: options.rows / median(times[key]) for kind, key in
                                       (("base", "base"), ("engine", f"engine {n}"), ("peft", f"peft {n}"))}} for n in options.adapters]
    return {"rows": rows, "times": times}


def bare(options: argparse.Namespace, results: Results, model: nn.Module, tokenizer: Any) -> None:
    """The engine without adapters, its output head as it is and packed, against `generate` and continuous batching."""
    settings = {k: getattr(options, k) for k in ("model", "dtype", "bare_rows", "prompt", "steps")}
    found = results.part("bare", settings, lambda: _bare(options, model, tokenizer))
    print(f"\n{'rows':>5} {'engine tok/s':>13} {'packed head':>12} {'generate':>9} {'x generate':>11} {'packed x':>9}")
    for row in found["rows"]:
        speed = row["tokens_per_cpu_second"]
        print(f"{row['rows']:>5} {speed['engine']:>13.1f} {speed['packed']:>12.1f} {speed['generate']:>9.1f}"
              f" {row['engine_over_generate']['cpu']:>11.2f} {row['packed_over_generate']['cpu']:>9.2f}", flush=True)
    settings = {k: getattr(options, k) for k in ("model", "dtype", "rows", "prompt")}
    other = results.part("continuous", settings, lambda: _continuous(options, model, tokenizer))
    print(f"continuous batching of Transformers (whole answers): {other}", flush=True)


def _bare(options: argparse.Namespace, model: nn.Module, tokenizer: Any) -> dict[str, Any]:
    rows = []
    for count in options.bare_rows:
        ids, new, names = prompts(model, count, options.prompt), options.steps + 5, [None] * count
        runs = {"engine": EngineRun(twin(model), tokenizer, ids, names, new),
                "packed": EngineRun(twin(model), tokenizer, ids, names, new, packed_head=True),
                "generate": GenerateRun(twin(model), ids, new)}
        times = race(runs, dict.fromkeys(runs, 3), options.steps)
        rows.append({"rows": count, "tokens_per_cpu_second": {name: count / median(each) for name, each in times.items()},
                     "engine_over_generate": ratio(times, "generate", "engine"),
                     "packed_over_generate": ratio(times, "generate", "packed"), "times": times})
    return {"rows": rows}


def _continuous(options: argparse.Namespace, model: nn.Module, tokenizer: Any) -> dict[str, Any]:
    """Seconds of processor time for whole answers, prompt and tokens; what Transformers raises where it cannot."""
    count, new = min(8, options.rows), 8
    ids = prompts(model, count, options.prompt)
    used = time.process_time()
    with Engine(twin(model), tokenizer, pool_bytes=64 << 20, prefix_cache=False, limits=Limits()) as engine:
        for i, row in enumerate(ids):
            engine.add(Request(f"{i}", row, None, Sampling(max_tokens=new, ignore_eos=True)))
        engine.run()
    engine_seconds = time.process_time() - used
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    other = twin(model)
    config = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(page_size=32, num_blocks=64, max_batch_tokens=256)  # left out, it takes nine tenths of the memory
    try:
        used = time.process_time()
        with torch.no_grad():
            answers = other.generate_batch(ids, generation_config=config, continuous_batching_config=small, warmup=False)
        seconds = time.process_time() - used
    except Exception as error:  # a part of Transformers that is made for GPUs
        return {"rows": count, "tokens": new, "engine_cpu_seconds": engine_seconds, "error": f"{type(error).__name__}: {error}"[:300]}
    written = sum(len(answer.generated_tokens) for answer in answers.values())
    return {"rows": count, "tokens": new, "engine_cpu_seconds": engine_seconds, "continuous_cpu_seconds": seconds, "written": written,
            "engine_over_continuous": seconds / engine_seconds if written == count * new else None}
