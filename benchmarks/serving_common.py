"""What the serving benchmarks share: models on one set of weights, runs that advance step by step, and the file of results.

Contenders are advanced in turn, one step each, in an order that rotates, so that whatever else the machine does falls on all of them;
ratios are formed step by step and medians printed, by processor time of the process (`cpu`) and by the clock (`wall`). Read the first
on a busy machine.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import graftwork
from graftwork.modeling.arithmetic import slow_on_cpu
from graftwork.serving.engine import Engine, Limits, Request, Sampling

TARGETS = {"q,v": ["q_proj", "v_proj"], "all-linear": "all-linear"}
PAGE_TOKENS = 16


class Results:
    """benchmarks/results/serving-DTYPE.json, written after each part: a part that is there is not run again."""

    def __init__(self, path: Path, options: argparse.Namespace):
        self.path, self.again, self.parts, self.fresh = path, options.again, {}, set()
        if path.is_file():
            self.parts = json.loads(path.read_text())["parts"]
        self.machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
                        "torch": torch.__version__, "bf16 instructions": not slow_on_cpu(torch.bfloat16)}

    def part(self, name: str, settings: dict[str, Any], run: Callable[[], Any]) -> Any:
        """The result of a part: from the file where it was run with these settings, else from run()."""
        kept = self.parts.get(name)
        if kept is None or kept["settings"] != settings or (self.again and name not in self.fresh):
            self.fresh.add(name)
            kept = self.parts[name] = {"settings": settings, "result": run()}
            self.path.parent.mkdir(exist_ok=True)
            self.path.write_text(json.dumps({"machine": self.machine, "parts": self.parts}, indent=1) + "\n")
        return kept["result"]


def load(options: argparse.Namespace) -> tuple[nn.Module, Any]:
    model, tokenizer = graftwork.load(options.model, dtype=options.dtype)
    return model.eval().requires_grad_(False), tokenizer


def twin(model: nn.Module) -> nn.Module:
    """The model once more, on the same weights."""
    own = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
    own.__dict__.pop("graft_state", None)
    return own


def fill(graft: Any, seed: int) -> None:
    """Random factors: B is not zero, so that nothing can be left out."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in graft.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02).requires_grad_(False)


def with_grafts(model: nn.Module, targets: Any, count: int, rank: int = 8) -> nn.Module:
    own = twin(model)
    for k in range(count):
        fill(graftwork.attach(own, "lora", name=f"a{k}", r=rank, alpha=rank, target_modules=targets, seed=k), k)
    return own


def prompts(model: nn.Module, rows: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, model.config.vocab_size, (rows, length), generator=generator).tolist()


class EngineRun:
    """An engine with all its requests, one step at a time."""

    def __init__(self, model: nn.Module, tokenizer: Any, ids: list[list[int]], names: list[Any], new: int, *, pool: int = 256 << 20,
                 **options: Any):
        self.engine = Engine(model, tokenizer, pool_bytes=pool, page_tokens=PAGE_TOKENS, prefix_cache=False, limits=Limits(), **options)
        for i, (row, name) in enumerate(zip(ids, names)):
            self.engine.add(Request(f"{i}", row, name, Sampling(max_tokens=new, ignore_eos=True)))

    def step(self) -> None:
        assert self.engine.step(), "the run is at its end"

    def close(self) -> None:
        self.engine.close()


class GenerateRun:
    """Transformers' (or PEFT's) own `generate`, held after each token: the first step is the prompt."""

    def __init__(self, model: nn.Module, ids: list[list[int]], new: int, **inputs: Any):
        self.go, self.done, self.over, self.error = threading.Semaphore(0), threading.Semaphore(0), False, None
        held = self

        class Hold:
            """A streamer: called with the prompt once, then with each step's tokens."""

            def __init__(self) -> None:
                self.calls = 0

            def put(self, tokens: Any) -> None:
                self.calls += 1
                if self.calls > 1:
                    held.done.release()
                    held.go.acquire()
                    if held.over:
                        raise Stop

            def end(self) -> None:
                """Nothing to close."""

        class Stop(Exception):
            """Ends the thread."""

        def run() -> None:
            self.go.acquire()
            try:
                model.generate(input_ids=torch.tensor(ids), attention_mask=torch.ones(len(ids), len(ids[0]), dtype=torch.long),
                               do_sample=False, min_new_tokens=new, max_new_tokens=new, pad_token_id=0, streamer=Hold(), **inputs)
            except Stop:
                pass
            except Exception as error:  # shown by the step that waits
                self.error = error
            self.done.release()

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def step(self) -> None:
        self.go.release()
        self.done.acquire()
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        self.over = True
        self.go.release()
        self.thread.join()


def race(runs: dict[str, Any], warm: dict[str, int], steps: int) -> dict[str, list[tuple[float, float]]]:
    """(seconds, processor seconds) of `steps` steps of each run, after warm[name] steps that are not timed."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for name, run in runs.items():
        for _ in range(warm[name]):
            run.step()
    order = list(runs)
    for k in range(steps):
        for name in order[k % len(order):] + order[:k % len(order)]:
            start, used = time.perf_counter(), time.process_time()
            runs[name].step()
            times[name].append((time.perf_counter() - start, time.process_time() - used))
    for run in runs.values():
        run.close()
    return times


def ratio(times: dict[str, list[tuple[float, float]]], other: str, own: str) -> dict[str, float]:
    """Speed of `own` relative to `other`: median over the steps."""
    pairs = list(zip(times[own], times[other]))
    return {kind: statistics.median(b[i] / a[i] for a, b in pairs) for i, kind in enumerate(("wall", "cpu"))}


def median(times: list[tuple[float, float]], kind: str = "cpu") -> float:
    return statistics.median(each[kind == "cpu"] for each in times)
