"""On the virtual clock, with the constants of measured steps: one pool against fixed shares, and overload by policy. The same constants
give the same figures on any machine."""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import numpy as np
from serving_common import PAGE_TOKENS, Results, twin
from serving_many import POOL, RANKS, RUNNING, run_many, workload
from torch import nn

from graftwork.serving import simulate as simulator
from graftwork.serving.engine import Limits, Request
from graftwork.serving.engine.attention import layer_shapes
from graftwork.serving.engine.memory import Memory
from graftwork.serving.engine.policies import POLICIES
from graftwork.serving.workload import trace


class SplitMemory(Memory):
    """No unified pool: adapters have a fixed share of the pages, keys and values have the rest."""

    share = 0.5

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.own = int(self.pool.pages * self.share)

    def capacity(self) -> int:
        return self.pool.pages - self.own

    def available(self) -> int:
        return self.capacity() - (self.pool.used - self.resident_pages)

    def adapter_pages(self, request: Request) -> int:
        return 0

    def resident(self, digest: str) -> Any:
        if digest not in self.residents:
            need = self.packing(digest).pages
            for other in [d for d, r in self.residents.items() if not r.users]:
                if self.resident_pages + need <= self.own:
                    break
                self.drop(other)
            if self.resident_pages + need > self.own:
                return None
        return super().resident(digest)

    def reserve(self, request: Request, tokens: int) -> bool:
        missing = self.pool.pages_for(request.computed + tokens) - len(request.pages)
        return missing <= max(0, self.available()) and super().reserve(request, tokens)


def pools(options: argparse.Namespace, results: Results, model: nn.Module, tokenizer: Any) -> None:
    """Tokens a second with one pool, and with a fixed share of it for adapters."""
    cost = _cost(options, results, model, tokenizer)
    found = results.part("pools", {"cost": cost, "model": options.model}, lambda: _pools(options, model, cost))
    print()
    for name, speed in found.items():
        print(f"{name:<28} {speed:>8.1f} tokens a second (simulated)", flush=True)


def _cost(options: argparse.Namespace, results: Results, model: nn.Module, tokenizer: Any) -> dict[str, float]:
    """Constants of a step, by least squares (none below 0) on the steps of `many`; that part is run first where it was not."""
    settings = {k: getattr(options, k) for k in ("model", "dtype", "requests", "counts")}
    rows = results.part("many", settings, lambda: run_many(options, model, tokenizer))["rows"]
    steps = [step for row in rows for step in row["steps"] if step["loads"] <= 1]  # prompts among them
    names, table = ["fixed", "token", "adapter"], np.array([[1.0, step["tokens"], step["adapters"]] for step in steps])
    seconds = np.array([step["cpu"] for step in steps])
    found, used = np.zeros(3), [0, 1, 2]
    while used:
        part = np.linalg.lstsq(table[:, used], seconds, rcond=None)[0]
        if (part >= 0).all():
            found[used] = part
            break
        used.pop(int(part.argmin()))
    cost = dict(zip(names, found.tolist()))
    loading = [(step["cpu"] - float(np.dot(found, [1.0, step["tokens"], step["adapters"]])), step["loads"], step["adapter_bytes"])
               for row in rows for step in row["steps"] if step["loads"] == step["adapters"] > 1]
    cost["byte"] = max(0.0, statistics.median(extra / nbytes for extra, _, nbytes in loading)) if loading else 0.0
    return {name: float(f"{value:.3g}") for name, value in cost.items()}


def _machine(options: argparse.Namespace, model: nn.Module, cost: dict[str, float], pool: int) -> simulator.Machine:
    layers, size = tuple(layer_shapes(twin(model))), next(model.parameters()).dtype
    page = PAGE_TOKENS * sum(s.heads * (s.key_width + s.value_width) for s in layers) * size.itemsize
    shapes = [(m.in_features, m.out_features) for n, m in model.named_modules() if n.endswith((".q_proj", ".v_proj"))][:2]
    return simulator.Machine(simulator.StepCost(**cost), layers, pool // page, simulator.lora_sizes(shapes, len(layers), 4),
                             PAGE_TOKENS, size)


def _pools(options: argparse.Namespace, model: nn.Module, cost: dict[str, float]) -> dict[str, float]:
    """One pool against fixed shares, in memory for about half of what 32 requests of 100 adapters want."""
    traffic = workload(400, 100, prompt=(8, 257), answer=(8, 257)).at_once()
    machine, limits, found = _machine(options, model, cost, 256 << 20), Limits(max_running=RUNNING), {}
    found["one pool"] = simulator.simulate(traffic, machine, limits=limits).metrics.tokens_per_second
    for share in (0.25, 0.5, 0.75):
        class Split(SplitMemory):
            pass

        Split.share = share
        simulator.Memory = Split
        try:
            found[f"adapters have {share:.0%}"] = simulator.simulate(traffic, machine, limits=limits).metrics.tokens_per_second
        finally:
            simulator.Memory = Memory
    return found


def overload(options: argparse.Namespace, results: Results, model: nn.Module, tokenizer: Any) -> None:
    """Attainment of 6 s to the first token by policy, at 1.5 times the capacity, Poisson arrivals and bursts."""
    cost = _cost(options, results, model, tokenizer)
    found = results.part("overload", {"cost": cost, "model": options.model}, lambda: _overload(options, model, cost))
    print(f"\nstep = {' + '.join(f'{v:.3g} {k}' for k, v in cost.items())} seconds; {found['rate']:.2f} requests a second")
    print(f"{'cv':>3} {'policy':<12} {'attainment':>10} {'satisfaction':>13} {'tok/s':>7} {'aborted':>8}")
    for row in found["rows"]:
        print(f"{row['cv']:>3} {row['policy']:<12} {row['attainment']:>10.2f} {row['satisfaction']:>13.2f} {row['tokens_per_second']:>7.1f}"
              f" {row['unfinished']:>8}", flush=True)


def _overload(options: argparse.Namespace, model: nn.Module, cost: dict[str, float]) -> dict[str, Any]:
    machine, limits, lengths = _machine(options, model, cost, POOL), Limits(max_running=RUNNING), {"prompt": (8, 65), "answer": (8, 65)}
    capacity = simulator.simulate(workload(400, 200, **lengths).at_once(), machine, limits=limits).metrics.throughput
    rate, rows = 1.5 * capacity, []
    for cv in (1.0, 8.0):
        traffic = trace(adapters=200, rate=rate, duration=300.0, cv=cv, ranks=RANKS, **lengths)
        for policy in POLICIES:
            outcome = simulator.simulate(traffic, machine, policy=policy, limits=limits, slo=6.0)
            rows.append({"cv": cv, "policy": policy, "distinct": outcome.distinct, "loads": outcome.loads, "trace": outcome.trace,
                         **outcome.metrics.as_dict()})
    return {"rate": rate, "capacity": capacity, "rows": rows}
