"""Optimizer steps and state bytes: ours against the official packages that run on a CPU, on SmolLM2's shapes.

    OMP_NUM_THREADS=1 python benchmarks/optim_step.py [--methods adamw galore ...] [--rounds 15] [--rank 64] [--threads 1]

Interleaved: every round times one step of each optimizer on equal gradients, in rotating order; medians are printed and all
times written to benchmarks/results/optim_step.json; one thread is timed by the processor's clock. Steps are between refreshes,
`refresh` rows time a refresh step alone. State bytes are those of the storages that the state keeps alive. `svd` prints what the
randomized SVD of a refresh loses.

Official: torch.optim, galore-torch, apollo-torch, q-galore-torch, bitsandbytes, came-pytorch, adam-mini, transformers. Two need help
to run here (`_eight_bit`), torch.optim.Muon is timed on a small matrix, since it computes in bfloat16 only.
"""

import argparse
import importlib
import json
import platform
import statistics
import time
from pathlib import Path

import torch

from graftwork.optim import optimizer
from graftwork.optim.subspace import top_vectors

SHAPES = {"576x576": [(576, 576)] * 4, "1536x576": [(1536, 576)] * 2, "576x1536": [(576, 1536)] * 2}
OWN_SHAPES = {"adamw": {**SHAPES, "lora r8 (420)": [(8, 576), (576, 8)] * 210}, "muon": {"192x192": [(192, 192)]}}
LR = 1e-4
NEVER = {"update_proj_gap": 10**9}


def clock() -> float:
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def package(module: str, name: str, **options):
    """Parameters -> an official optimizer; the module is imported when it is built."""
    return lambda params: getattr(importlib.import_module(module), name)(params, lr=LR, **options)


def grouped(module: str, name: str, build=None, **group):
    """The same for packages whose options are a parameter group's."""
    return lambda params: (build or getattr)(importlib.import_module(module), name)([{"params": params, **NEVER, **group}], lr=LR)


def ours(name: str, **options):
    return lambda params: optimizer(name, params, lr=LR, **options)


def _eight_bit(module, name: str):
    """The 8-bit classes of galore-torch and q-galore-torch wait for a GPU after each weight, and the latter calls bitsandbytes'
    kernel with the arguments of an older version: here nothing waits, and bitsandbytes calls its kernel itself."""
    from bitsandbytes.optim.optimizer import Optimizer2State

    class OnCPU(getattr(module, name)):
        def update_step(self, group, p, gindex, pindex, flag_use_float_grad=False):
            Optimizer2State.update_step(self, group, p, gindex, pindex)

    torch.cuda.synchronize = lambda device=None: None
    return OnCPU


def _adam_mini(params):
    import adam_mini

    named = [(f"layers.{i}.mlp.weight", p) for i, p in enumerate(params)]
    return adam_mini.Adam_mini(named_parameters=named, lr=LR, dim=576, n_heads=9, verbose=False)


def candidates(rank: int) -> dict[str, dict]:
    """method -> {implementation: parameters -> optimizer}; ratios are against the first."""
    galore = {"rank": rank, "scale": 0.25, "proj_type": "std"}
    coded = {"quant": True, "quant_n_bit": 4, "quant_group_size": 256, "cos_threshold": 0.4, "gamma_proj": 2, "queue_size": 5}
    apollo = {"proj": "random", "proj_type": "std"}
    low = {"rank": rank, **NEVER}
    exact = grouped("galore_torch.adamw", "AdamW", lambda m, n: lambda *a, **k: getattr(m, n)(*a, no_deprecation_warning=True, **k),
                    **galore)
    given = {"relative_step": False, "scale_parameter": False, "warmup_init": False}
    return {
        "adamw": {"torch": package("torch.optim", "AdamW"), "torch (fused)": package("torch.optim", "AdamW", fused=True),
                  "ours": ours("adamw")},
        "sgd": {"torch": package("torch.optim", "SGD", momentum=0.9),
                "torch (fused)": package("torch.optim", "SGD", momentum=0.9, fused=True), "ours": ours("sgd")},
        "lion": {"bitsandbytes": package("bitsandbytes.optim", "Lion32bit"), "ours": ours("lion")},
        "adafactor": {"transformers": package("transformers.optimization", "Adafactor", **given),
                      "torch": package("torch.optim", "Adafactor"), "ours": ours("adafactor")},
        "came": {"came-pytorch": package("came_pytorch", "CAME"), "ours": ours("came")},
        "adam_mini": {"adam-mini": _adam_mini, "ours": ours("adam_mini")},
        "adamw8bit": {"bitsandbytes": package("bitsandbytes.optim", "AdamW8bit"), "ours": ours("adamw8bit")},
        "muon": {"torch": package("torch.optim", "Muon"), "ours": ours("muon"), "ours (float32)": ours("muon", ns_dtype="float32")},
        "galore": {"galore-torch": exact, "ours": ours("galore", **low)},
        "galore 8bit": {"galore-torch": grouped("galore_torch", "GaLoreAdamW8bit", _eight_bit, **galore),
                        "ours": ours("galore", state="8bit", **low)},
        "q_galore": {"q-galore-torch": grouped("q_galore_torch", "QGaLoreAdamW8bit", _eight_bit, **galore, **coded),
                     "ours": ours("q_galore", **low)},
        "apollo": {"apollo-torch": grouped("apollo_torch", "APOLLOAdamW", rank=rank, scale=1.0, scale_type="channel", **apollo),
                   "ours": ours("apollo", **low), "ours (cached)": ours("apollo", projection="cached", **low)},
        "apollo_mini": {"apollo-torch": grouped("apollo_torch", "APOLLOAdamW", rank=1, scale=128.0, scale_type="tensor", **apollo),
                        "ours": ours("apollo_mini", **NEVER)},
        "galore refresh": {"galore-torch": exact, "ours": ours("galore", **low),
                           "ours (randomized)": ours("galore", svd="randomized", **low)},
    }


def state_bytes(built) -> int:
    storages = {}

    def visit(value):
        if isinstance(value, torch.Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, (list, tuple)):
            for each in value:
                visit(each)
        elif hasattr(value, "__dict__"):  # a projector
            visit(list(vars(value).values()))

    for state in built.state.values():
        visit(list(state.values()))
    return sum(storages.values())


def measure(makers, shapes, rounds: int, refresh: bool):
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=generator) for shape in shapes]
    built, times = {}, {name: [] for name in makers}

    def step(name):
        params, each = built[name]
        for p, g in zip(params, gradients):
            p.grad = g
        start = clock()
        each.step()
        return clock() - start

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


def svd_errors(rank: int) -> dict[str, dict[str, float]]:
    """||G - G Q^T Q||_F over that of the exact singular vectors, less 1, for noise and for singular values 1 / j."""
    found = {}
    for (m, n), *_ in SHAPES.values():
        noise = torch.randn((m, n), generator=torch.Generator().manual_seed(0))
        u, _, vh = torch.linalg.svd(noise, full_matrices=False)
        decaying = (u / torch.arange(1, min(m, n) + 1)) @ vh
        for kind, grad in (("noise", noise), ("1 / j", decaying)):
            left = [torch.linalg.matrix_norm(grad - grad @ q.T @ q).item() for q in (top_vectors(grad, rank, s)[1] for s in (None, 1))]
            found.setdefault(f"{m}x{n}", {})[kind] = left[1] / left[0] - 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", help="rows to run; those of earlier runs stay in the output")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "optim_step.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table = candidates(options.rank)
    if unknown := set(options.methods or ()) - {*table, "svd"}:
        parser.error(f"unknown methods {', '.join(sorted(unknown))}; there are {', '.join([*table, 'svd'])}")
    kept = json.loads(options.output.read_text()) if options.methods and options.output.exists() else {}
    results, errors = kept.get("results", {}), kept.get("svd_errors", {})
    print(f"{'method':16}{'shapes':16}{'implementation':20}{'ms':>9}{'ratio':>8}{'state bytes':>14}{'ratio':>8}")
    for method, makers in table.items():
        for label, shapes in OWN_SHAPES.get(method, SHAPES).items() if method in (options.methods or table) else ():
            refresh = method.endswith("refresh")
            rows = measure(makers, shapes, max(3, options.rounds // 5) if refresh else options.rounds, refresh)
            base = rows[next(iter(makers))]
            results[f"{method} / {label}"] = rows
            for name, row in rows.items():
                print(f"{method:16}{label:16}{name:20}{row['median'] * 1e3:9.2f}{row['median'] / base['median']:8.2f}"
                      f"{row['state_bytes']:14,}{row['state_bytes'] / base['state_bytes']:8.2f}", flush=True)
    if "svd" in (options.methods or ["svd"]):
        errors = svd_errors(options.rank)
        for label, row in errors.items():
            print(f"{'svd':16}{label:16}loss of the randomized one over the exact one's: "
                  + ", ".join(f"{kind} +{error:.2%}" for kind, error in row.items()))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    facts = {"torch": torch.__version__, "machine": platform.machine(), "threads": options.threads, "rank": options.rank}
    options.output.write_text(json.dumps({"environment": facts, "results": results, "svd_errors": errors}, indent=1) + "\n")


if __name__ == "__main__":
    main()
