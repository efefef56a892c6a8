"""Optimizer steps and state bytes: ours against torch, galore-torch and apollo-torch, on SmolLM2's shapes.

    python benchmarks/optim_step.py [--rounds 15] [--rank 64] [--threads 1]

Interleaved: every round times one step of each optimizer on equal gradients, in rotating order; medians are printed and all
times written to benchmarks/results/optim_step.json. Steps are between refreshes; `refresh` rows time a refresh step alone.
State bytes are those of the storages that the state keeps alive.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch

from graftwork.optim import optimizer

SHAPES = {"576x576": [(576, 576)] * 4, "1536x576": [(1536, 576)] * 2,
          "576x1536": [(576, 1536)] * 2, "lora r8 (420)": [(8, 576), (576, 8)] * 210}


def candidates(rank: int):
    """(row, name) -> function from parameters to an optimizer."""
    import apollo_torch
    import galore_torch

    def galore(params):
        group = {"params": params, "rank": rank, "update_proj_gap": 10**9, "scale": 0.25, "proj_type": "std"}
        return galore_torch.GaLoreAdamW([group], lr=1e-4, no_deprecation_warning=True)

    def apollo(params, rank=rank, scale=1.0, kind="channel"):
        group = {"params": params, "rank": rank, "update_proj_gap": 10**9, "scale": scale, "scale_type": kind,
                 "proj": "random", "proj_type": "std"}
        return apollo_torch.APOLLOAdamW([group], lr=1e-4)

    def ours(name, **options):
        return lambda params: optimizer(name, params, lr=1e-4, **options)

    fixed = {"rank": rank, "update_proj_gap": 10**9}
    return {
        "adamw": {"torch (default)": lambda p: torch.optim.AdamW(p, lr=1e-4),
                  "torch (fused)": lambda p: torch.optim.AdamW(p, lr=1e-4, fused=True), "ours": ours("adamw")},
        "galore": {"galore-torch": galore, "ours": ours("galore", **fixed)},
        "apollo": {"apollo-torch": apollo, "ours": ours("apollo", **fixed),
                   "ours (cached)": ours("apollo", projection="cached", **fixed)},
        "apollo_mini": {"apollo-torch": lambda p: apollo(p, 1, 128.0, "tensor"),
                        "ours": ours("apollo_mini", update_proj_gap=10**9)},
        "galore refresh": {"galore-torch": galore, "ours": ours("galore", **fixed),
                           "ours (randomized)": ours("galore", svd="randomized", **fixed)},
    }


def state_bytes(built) -> int:
    storages = {}

    def visit(value):
        if isinstance(value, torch.Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, (list, tuple)):
            for each in value:
                visit(each)
        elif hasattr(value, "ortho_matrix"):
            visit(value.ortho_matrix)

    for state in built.state.values():
        for value in state.values():
            visit(value)
    return sum(storages.values())


def measure(makers, shapes, rounds: int, refresh: bool):
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=generator) for shape in shapes]
    built, times = {}, {name: [] for name in makers}

    def step(name):
        params, each = built[name]
        for p, g in zip(params, gradients):
            p.grad = g
        start = time.perf_counter()
        each.step()
        return time.perf_counter() - start

    def fresh(name):
        params = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
        built[name] = params, makers[name](params)

    names = list(makers)
    for name in names:
        fresh(name)
        step(name)
        step(name)
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            if refresh:
                fresh(name)
            times[name].append(step(name))
    return {name: {"seconds": times[name], "median": statistics.median(times[name]), "state_bytes": state_bytes(built[name][1])}
            for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "optim_step.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = {}
    print(f"{'method':16}{'shapes':16}{'implementation':20}{'ms':>9}{'ratio':>8}{'state bytes':>14}{'ratio':>8}")
    for method, makers in candidates(options.rank).items():
        for label, shapes in SHAPES.items():
            if label.startswith("lora") and method != "adamw":
                continue
            refresh = method.endswith("refresh")
            rows = measure(makers, shapes, max(3, options.rounds // 5) if refresh else options.rounds, refresh)
            base = rows[next(iter(makers))]
            results[f"{method} / {label}"] = rows
            for name, row in rows.items():
                print(f"{method:16}{label:16}{name:20}{row['median'] * 1e3:9.2f}{row['median'] / base['median']:8.2f}"
                      f"{row['state_bytes']:14,}{row['state_bytes'] / base['state_bytes']:8.2f}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    facts = {"torch": torch.__version__, "machine": platform.machine(), "threads": options.threads, "rank": options.rank}
    options.output.write_text(json.dumps({"environment": facts, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
