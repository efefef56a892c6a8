"""Thousands of adapters from disk, latencies, and what the parts of the design are worth."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from serving_common import PAGE_TOKENS, Results, fill, twin
from torch import nn

import graftwork
from graftwork.adapters import base as adapter_base
from graftwork.adapters import row_groups
from graftwork.adapters.batched import gathered
from graftwork.serving.engine import Engine, Limits, Request, Sampling
from graftwork.serving.engine.adapters import AdapterFolder
from graftwork.serving.workload import Record, Trace, metrics, trace

RANKS, TARGETS, LENGTHS = (64, 32, 16, 8), ["q_proj", "v_proj"], (8, 33)
RUNNING = 32
POOL = 1 << 30


def workload(requests: int, adapters: int, **options: Any) -> Trace:
    """S-LoRA's trace with its uniform popularity, lengths cut to what this processor answers in minutes. Lengths do not depend on the
    number of adapters, so runs of different numbers take the same steps."""
    return trace(adapters=adapters, rate=1.0, duration=float(requests), **{"prompt": LENGTHS, "answer": LENGTHS, "ranks": RANKS, **options})


def write_adapters(model: nn.Module, traffic: Trace, root: Path) -> None:
    """The artifacts that a trace asks for; those that nobody asks for would never be read."""
    for number in sorted(set(traffic.adapters.tolist())):
        rank = traffic.rank(number)
        graft = graftwork.attach(model, "lora", name=f"a{number}", r=rank, alpha=rank, target_modules=TARGETS, seed=number)
        fill(graft, number)
        graft.save(root / f"a{number}")
        graft.detach()


class TraceRun:
    """An engine that answers a trace, and what each of its steps took. The clock is the processor time of its own steps."""

    def __init__(self, model: nn.Module, tokenizer: Any, traffic: Trace, root: Path, ids: list[list[int]]):
        self.now, self.steps = 0.0, []
        self.source = AdapterFolder(model, root, host_bytes=1 << 32)
        self.engine = Engine(model, tokenizer, pool_bytes=POOL, page_tokens=PAGE_TOKENS, prefix_cache=False, adapters=self.source,
                             limits=Limits(max_running=RUNNING), clock=lambda: self.now)
        self.requests = [Request(str(i), row, f"a{adapter}", Sampling(max_tokens=answer, ignore_eos=True), arrived=at)
                         for i, (row, adapter, answer, at) in enumerate(zip(ids, traffic.adapters.tolist(), traffic.answers.tolist(),
                                                                            traffic.arrivals.tolist()))]
        self.gaps: list[float] = []
        self._next = 0

    @property
    def busy(self) -> bool:
        return self._next < len(self.requests) or self.engine.busy

    def step(self) -> None:
        if not self.engine.busy:
            self.now = max(self.now, self.requests[self._next].arrived)
        while self._next < len(self.requests) and self.requests[self._next].arrived <= self.now:
            self.engine.add(self.requests[self._next])
            self._next += 1
        loads, computed = self.engine.memory.loads, {r.id: (r.computed, len(r.output)) for r in self.requests}
        start, used = time.perf_counter(), time.process_time()
        self.engine.step()
        used, wall = time.process_time() - used, time.perf_counter() - start
        self.now += used
        moved = [r for r in self.requests if r.computed != computed[r.id][0] or len(r.output) != computed[r.id][1]]
        self.gaps += [used for r in moved if len(r.output) > max(1, computed[r.id][1])]
        for request in moved:  # the engine read the clock before the step's time was known
            if not computed[request.id][1] and request.output:
                request.first_token = self.now
            if request.ended is not None:
                request.ended = self.now
        self.steps.append({"cpu": used, "wall": wall, "tokens": sum(r.computed - computed[r.id][0] for r in moved),
                           "written": sum(len(r.output) - computed[r.id][1] for r in moved),
                           "adapters": len({r.adapter for r in moved}), "loads": self.engine.memory.loads - loads,
                           "adapter_bytes": sum(sum(self.source.sizes(self.source.digest(name))) for name in {r.adapter for r in moved})})

    def close(self) -> dict[str, Any]:
        self.engine.close()
        assert all(r.finish_reason == "length" for r in self.requests)
        return {"steps": self.steps, **summary(self.steps)}


def summary(steps: list[dict[str, float]]) -> dict[str, float]:
    seconds = sum(step["cpu"] for step in steps)
    return {"cpu_seconds": seconds, "written_per_cpu_second": sum(step["written"] for step in steps) / seconds,
            "distinct": statistics.mean(step["adapters"] for step in steps), "loads": sum(step["loads"] for step in steps),
            "adapter_bytes": statistics.mean(step["adapter_bytes"] for step in steps)}


def texts(traffic: Trace, vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in traffic.prompts.tolist()]


# -- many adapters ----------------------------------------------------------------------------------------------------------------
def many(options: argparse.Namespace, results: Results, model: nn.Module, tokenizer: Any) -> None:
    """Closed loop, 32 requests at a time; the first count is what the others are compared with, step by step."""
    settings = {k: getattr(options, k) for k in ("model", "dtype", "requests", "counts")}
    found = results.part("many", settings, lambda: run_many(options, model, tokenizer))
    print(f"\n{'adapters':>8} {'distinct a step':>16} {'tok/s':>7} {'of n=1':>7} {'bound':>6} {'loads':>6}")
    for row in found["rows"]:
        print(f"{row['adapters']:>8} {row['distinct']:>16.1f} {row['written_per_cpu_second']:>7.1f} {row['of_first']:>7.2f}"
              f" {row['byte_bound']:>6.2f} {row['loads']:>6}", flush=True)
    open_loop = found["latency"]
    print(f"open loop, {open_loop['adapters']} adapters, {open_loop['rate']:.2f} requests/s, processor time:", *(
        f"{name} {open_loop[name]:.3f} s" for name in ("ttft_p50", "ttft_p95", "token_p50", "token_p95")), flush=True)


def run_many(options: argparse.Namespace, model: nn.Module, tokenizer: Any) -> dict[str, Any]:
    weights = sum(p.nbytes for p in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        runs: dict[int, TraceRun] = {}
        for count in options.counts:
            traffic = workload(options.requests, count).at_once()
            root = Path(folder) / str(count)
            root.mkdir()
            write_adapters(twin(model), traffic, root)
            runs[count] = TraceRun(twin(model), tokenizer, traffic, root, texts(traffic, model.config.vocab_size))
        turn = 0
        while any(run.busy for run in runs.values()):
            order = list(runs.values())
            for run in order[turn % len(order):] + order[:turn % len(order)]:
                run.step()
            turn += 1
        done = {count: run.close() for count, run in runs.items()}
        first = done[options.counts[0]]
        rows = []
        for count, each in done.items():
            pairs = zip(first["steps"], each["steps"], strict=True)
            rows.append({"adapters": count, **each, "of_first": first["cpu_seconds"] / each["cpu_seconds"],
                         "of_first_step_median": statistics.median(a["cpu"] / b["cpu"] for a, b in pairs),
                         "byte_bound": (weights + first["adapter_bytes"]) / (weights + each["adapter_bytes"])})
        return {"rows": rows, "latency": _latency(options, model, tokenizer, Path(folder), rows)}


def _latency(options: argparse.Namespace, model: nn.Module, tokenizer: Any, folder: Path, rows: list[dict]) -> dict[str, Any]:
    """Poisson arrivals at 0.7 of what the closed loop answered, on the clock of processor time."""
    count = options.counts[len(options.counts) // 2]
    row = next(row for row in rows if row["adapters"] == count)
    rate = 0.7 * options.requests / row["cpu_seconds"]
    traffic = workload(options.requests, count)
    traffic = Trace(traffic.arrivals / rate, traffic.adapters, traffic.prompts, traffic.answers, traffic.ranks, rate)
    run = TraceRun(twin(model), tokenizer, traffic, folder / str(count), texts(traffic, model.config.vocab_size))
    while run.busy:
        run.step()
    run.close()
    records = [Record(r.arrived, len(r.prompt), len(r.output), r.first_token, r.ended, True) for r in run.requests]
    found = metrics(records, elapsed=run.now, slo=6.0)
    return {"adapters": count, "rate": rate, "ttft_p50": found.ttft_p50, "ttft_p95": found.ttft_p95,
            "token_p50": float(np.percentile(run.gaps, 50)), "token_p95": float(np.percentile(run.gaps, 95)), "metrics": found.as_dict()}


# -- ablations --------------------------------------------------------------------------------------------------------------------
@contextmanager
def padded_bmm() -> Iterator[None]:
    """Every row multiplied by factors of its own, padded to the largest rank of the batch, whatever was measured to be quicker."""
    kernel, settled = adapter_base.change_of_rows, row_groups.Group.pairs
    adapter_base.change_of_rows = lambda x, index, bank: gathered(x, index, bank)
    row_groups.Group.pairs = lambda self, x, y: None
    try:
        yield
    finally:
        adapter_base.change_of_rows, row_groups.Group.pairs = kernel, settled


def ablations(options: argparse.Namespace, results: Results, model: nn.Module, tokenizer: Any) -> None:
    settings = {k: getattr(options, k) for k in ("model", "dtype", "requests")}
    found = results.part("ablations", settings, lambda: _ablations(options, model, tokenizer))
    print()
    for name, speed in found["written_per_cpu_second"].items():
        print(f"{name:<28} {speed:>8.1f} tokens a second of processor time")


def _ablations(options: argparse.Namespace, model: nn.Module, tokenizer: Any) -> dict[str, Any]:
    """100 adapters, requests at once: as it is; padded products; one adapter after the other, merged (on an eighth of the trace)."""
    traffic = workload(options.requests, 100).at_once()
    ids = texts(traffic, model.config.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_adapters(twin(model), traffic, root)
        ours, padded = (TraceRun(twin(model), tokenizer, traffic, root, ids) for _ in range(2))
        while ours.busy:
            ours.step()
            with padded_bmm():
                padded.step()
        speed = {"engine": ours.close()["written_per_cpu_second"], "padded bmm": padded.close()["written_per_cpu_second"],
                 "merge and switch": _merging(copy_of(model), tokenizer, traffic, root, ids, max(4, options.requests // 8))}
    return {"written_per_cpu_second": speed}


def copy_of(model: nn.Module) -> nn.Module:
    """A model with weights of its own, for merging."""
    own = twin(model)
    for module in own.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and name == "weight" and isinstance(module, nn.Linear) and module is not own.get_output_embeddings():
                module._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
    return own


def _merging(model: nn.Module, tokenizer: Any, traffic: Trace, root: Path, ids: list[list[int]], count: int) -> float:
    """Tokens a second when all requests of an adapter are answered with it merged, then those of the next."""
    waiting: dict[int, list[int]] = {}
    for i in range(count):
        waiting.setdefault(int(traffic.adapters[i]), []).append(i)
    written, used = 0, time.process_time()
    for adapter, numbers in waiting.items():
        graft = graftwork.attach_saved(model, root / f"a{adapter}", name=f"a{adapter}")
        graft.merge()
        with Engine(model, tokenizer, pool_bytes=64 << 20, page_tokens=PAGE_TOKENS, prefix_cache=False) as engine:
            for i in numbers:
                engine.add(Request(str(i), ids[i], None, Sampling(max_tokens=int(traffic.answers[i]), ignore_eos=True)))
            engine.run()
        written += sum(int(traffic.answers[i]) for i in numbers)
        graft.unmerge()
        graft.detach()
    return written / (time.process_time() - used)
