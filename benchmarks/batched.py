"""Kernels for rows of different low-rank adapters (graftwork/adapters/batched.py): which is quickest where?

    OMP_NUM_THREADS=1 python benchmarks/batched.py [--quick] [--rounds 9] [--page-only]

Points: rows x distinct adapters x rank x tokens x shape; two thinner grids for adapters whose A or B is a choice of positions
(PaCA, S2FT). Rows get their adapters in shuffled order, as many rows each. Every round calls each kernel once, in rotating order, and
the least time of the rounds counts (median beside it in the raw file): processor time where there is one thread. Each kernel has its own
copy of the factors, 48 MB of other data are read before each round, and the kernel is called on a decoy just before it is timed: code
and x are in the cache, factors come from memory, as in a model, where all other layers pass between two calls at one site. With one token
a row what a kernel makes of the index is kept between calls (decode steps repeat it); with more it is made anew in each call (prefill).
Forward only. `merged` is the dense product with a weight into which one adapter was merged: what serving all rows by that adapter
would take in place of the frozen product and the change.

Writes benchmarks/results/batched.json (raw), the table that the package reads, and docs/serving-kernels.md. --quick: a few points,
printed, nothing written. --page-only: the page again from the raw file.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graftwork.adapters import batched
from graftwork.adapters.batched import KERNELS, Bank, row_index
from graftwork.modeling.arithmetic import slow_on_cpu

ROOT = Path(__file__).parent.parent
OUT, PAGE = ROOT / "benchmarks" / "results" / "batched.json", ROOT / "docs" / "serving-kernels.md"
SIZES = ("kind", "dtype", "rows", "tokens", "distinct", "rank", "in", "out")
#: a kernel that would compute more than this is left out: it multiplies every row with all adapters
MOST = 1e9
#: seconds that one kernel may take at one point, at least three calls
PATIENCE = 0.1


def grid(quick: bool) -> list[tuple]:
    """Points in the order of SIZES."""
    if quick:
        return [("factors", "float32", rows, tokens, distinct, 8, 576, 576)
                for rows in (1, 8, 32) for tokens in (1, 64) for distinct in (1, 4, 32) if distinct <= rows]
    powers = [2**n for n in range(7)]
    points = [("factors", "float32", rows, tokens, distinct, rank, *shape)
              for shape in ((576, 576), (576, 1536)) for tokens in (1, 64) for rank in (4, 8, 16, 64)
              for rows in powers for distinct in powers if distinct <= rows]

    def thin(kind: str, dtype: str, shapes: tuple) -> list[tuple]:
        return [(kind, dtype, rows, tokens, distinct, rank, *shape) for shape in shapes for tokens in (1, 64) for rank in (8, 64)
                for rows in powers[::2] for distinct in powers[::2] if distinct <= rows]

    points += thin("factors", "float32", ((2048, 2048),))
    # tokens of an expert: many rows of one token each
    points += [("factors", "float32", 256, 1, distinct, rank, *shape) for shape in ((576, 576), (576, 1536), (2048, 2048))
               for rank in (8, 64) for distinct in (2, 8, 32, 128)]
    points += thin("columns", "float32", ((1536, 576), (576, 576))) + thin("outputs", "float32", ((576, 1536), (576, 576)))
    if not slow_on_cpu(torch.bfloat16):
        points += thin("factors", "bfloat16", ((576, 576), (576, 1536), (2048, 2048)))
    return points


def pairs_of(kind: str, distinct: int, rank: int, in_features: int, out_features: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def half(size: int, chosen: bool) -> Tensor:
        if chosen:
            return torch.randperm(size, generator=generator)[:rank].sort().values
        return torch.randn(rank, size, generator=generator) * 0.02

    halves = [(half(out_features, kind == "outputs"), half(in_features, kind == "columns")) for _ in range(distinct)]
    return [(B if B.dim() == 1 else B.T, A) for B, A in halves]


def time_all(calls: dict[str, tuple[Callable, Callable]], cold: Tensor, rounds: int) -> dict[str, list[float]]:
    """{name: microseconds of its calls}. Of each pair the first makes what is called untimed, the second what is timed."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for n in range(-1, rounds):  # the first round warms
        cold.sum()
        for name in order[n % len(order):] + order[:n % len(order)]:
            if n > 2 and sum(times[name]) > PATIENCE * 1e6:
                continue
            decoy, run = calls[name][0](), calls[name][1]()
            decoy()
            start = clock()
            run()
            took = (clock() - start) * 1e6
            if n >= 0:
                times[name].append(took)
    return times


@torch.no_grad()
def measure(point: tuple, cold: Tensor, rounds: int) -> dict[str, Any]:
    kind, dtype, rows, tokens, distinct, rank, in_features, out_features = point
    pairs = pairs_of(kind, distinct, rank, in_features, out_features)

    def bank() -> Bank:
        return Bank.of(pairs, (out_features, in_features), getattr(torch, dtype))

    decoy = bank()
    x = torch.randn(rows, tokens, in_features, generator=torch.Generator().manual_seed(1)).to(decoy.dtype)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(2)).tolist()
    numbers = [n % distinct for n in order]
    kept = row_index(numbers, x.device)

    def prepared(kernel: Callable, own: Bank) -> Callable:
        def prepare() -> Callable:
            index = kept if tokens == 1 else row_index(numbers, x.device)
            return lambda: kernel(x, index, own)
        return prepare

    work = {"stacked": 2 * rows * tokens * distinct * rank * (in_features + out_features)}
    calls = {name: (prepared(kernel, decoy), prepared(kernel, bank())) for name, kernel in KERNELS.items() if work.get(name, 0) <= MOST}
    if distinct == 1 and rank == 8 and kind == "factors":
        weights = torch.randn(2, out_features, in_features, generator=torch.Generator().manual_seed(3)).to(x.dtype)
        calls["merged"] = tuple(lambda weight=weight: lambda: F.linear(x, weight) for weight in weights)
    times = time_all(calls, cold, rounds)
    return {**dict(zip(SIZES, point)), "least": {name: round(min(each), 1) for name, each in times.items()},
            "median": {name: round(statistics.median(each), 1) for name, each in times.items()}}


# -- what the table is worth --------------------------------------------------------------------------------------------------
def regrets(found: list[dict]) -> dict[str, list[float]]:
    """Time over the best time at each point: of the kernel that the table would take if this point had not been measured, and of
    each kernel alone."""
    points = [(each["kind"], each["dtype"], tuple(math.log2(each[s]) for s in SIZES[2:]), each) for each in found]
    result: dict[str, list[float]] = {name: [] for name in ("table", *KERNELS)}
    for kind, dtype, place, each in points:
        own = {name: time for name, time in each["least"].items() if name in KERNELS}
        _, _, _, near = min((p for p in points if p[:2] == (kind, dtype) and p[3] is not each),
                            key=lambda p: sum((a - b) ** 2 for a, b in zip(p[2], place)))
        chosen = min((name for name in own if name in near["least"]), key=near["least"].get)
        result["table"].append(own[chosen] / min(own.values()))
        for name in KERNELS:
            if name in own:
                result[name].append(own[name] / min(own.values()))
    return result


def summary(ratios: list[float]) -> tuple[float, float, float]:
    """(geometric mean, 95th percentile, largest)."""
    ordered = sorted(ratios)
    return math.exp(statistics.fmean(map(math.log, ordered))), ordered[int(0.95 * (len(ordered) - 1))], ordered[-1]


# -- pages --------------------------------------------------------------------------------------------------------------------
def crossover(found: list[dict], kind: str, dtype: str, tokens: int, shape: tuple[int, int]) -> list[str]:
    """Markdown: a line for rows and distinct adapters, a column for each rank."""
    own = [e for e in found if (e["kind"], e["dtype"], e["tokens"], e["in"], e["out"]) == (kind, dtype, tokens, *shape)]
    ranks = sorted({e["rank"] for e in own})
    cells = {(e["rows"], e["distinct"], e["rank"]): e["least"] for e in own}
    dense = any("merged" in times for times in cells.values())
    lines = ["| rows | adapters | " + " | ".join(f"rank {r}" for r in ranks) + (" | merged |" if dense else " |"),
             "|--:|--:|" + "---|" * len(ranks) + ("--:|" if dense else "")]
    for rows, distinct in sorted({(e["rows"], e["distinct"]) for e in own}):
        shown = []
        for rank in ranks:
            times = cells.get((rows, distinct, rank))
            if times is None:
                shown.append("")
                continue
            best = min(KERNELS, key=lambda name: times.get(name, math.inf))
            shown.append(f"{best} {digits(times[best])}" + (f" ({times['gathered'] / times[best]:.1f}x)" if best != "gathered" else ""))
        merged = cells.get((rows, distinct, 8), {}).get("merged")
        lines.append(f"| {rows} | {distinct} | " + " | ".join(shown)
                     + (f" | {'' if merged is None else digits(merged)} |" if dense else " |"))
    return lines


def digits(time: float) -> str:
    return f"{time:,.0f}"


def page(raw: dict) -> str:
    found, machine = raw["points"], raw["conditions"]
    ratios = regrets(found)
    lines = [
        "# Rows of different adapters: which kernel where", "",
        "Written by `OMP_NUM_THREADS=1 python benchmarks/batched.py`; raw times in `benchmarks/results/batched.json`. The same run writes "
        "`src/graftwork/adapters/batched_table.json`, from which the kernel of each site is taken at run time (the kernels are described "
        "in `src/graftwork/adapters/batched.py`). Run it on your machine to have its own table.", "",
        f"Measured with **{machine['threads']} thread{'s' if machine['threads'] != 1 else ''}** on a CPU ({machine['cpu']}), torch "
        f"{machine['torch']}, {machine['rounds']} interleaved rounds in {machine['seconds']} s, of each kernel the least "
        f"{'processor time' if machine['threads'] == 1 else 'time'}; {machine['note']}. Factors come from memory, not the cache (48 MB "
        "of other data are read in between), rows have their adapters in shuffled order, as many rows each. With 1 token a row what a "
        "kernel makes of the index is kept, as in a decode; with 64 it is made in every call, as in a prefill. Other thread counts, other "
        "processors and backward passes were not measured. On a GPU inference takes Triton kernels (`src/graftwork/adapters/_triton.py`), "
        "which ran in Triton's interpreter and were compiled (`make test-triton`), but never ran on a GPU; elsewhere, and without Triton, "
        "the choice is "
        f"`{batched.DEFAULT}`, unmeasured.", "",
        "## Is the choice any good?", "",
        "Time of the choice over the time of the best kernel, over all points. For the first line each point "
        "was taken out of the table before the choice was made, so it had to come from a neighbor.", "",
        "| choice | geometric mean | 95th percentile | largest | points |", "|---|--:|--:|--:|--:|"]
    for name, each in ratios.items():
        mean, high, most = summary(each)
        lines.append(f"| {'nearest measured point' if name == 'table' else f'always {name}'} | {mean:.2f} | {high:.2f} | {most:.1f} "
                     f"| {len(each)} |")
    lines += ["", "`stacked` was not run where it would compute more than 1 GFLOP. At run time it is taken only where all adapters of the "
              "site are in the batch and their factors are finite, and never in training.", "",
              "## Crossover", "",
              "Cells: the quickest kernel, its microseconds, and how many times as long `gathered` took where it was not that. `merged`: "
              "one dense product with a weight that has one adapter merged, which replaces the frozen product and the change together; "
              "the frozen product alone takes as long."]
    titles = {"factors": "Low-rank pairs (LoRA and whatever has factors)", "columns": "Columns of the input (PaCA, S2FT on columns)",
              "outputs": "Rows of the output (S2FT on rows)"}
    for kind, dtype, tokens, *shape in dict.fromkeys((e["kind"], e["dtype"], e["tokens"], e["in"], e["out"]) for e in found):
        lines += ["", f"### {titles[kind]}, {shape[0]} to {shape[1]}, {tokens} token{'s' if tokens > 1 else ''} a row, {dtype}", "",
                  *crossover(found, kind, dtype, tokens, tuple(shape))]
    return "\n".join(lines) + "\n"


def table(raw: dict) -> str:
    """The package's table, a line a point."""
    names = list(KERNELS)
    rows = [json.dumps([each[s] for s in SIZES] + [each["least"].get(name) for name in names]) for each in raw["points"]]
    head = {"device": "cpu", "conditions": raw["conditions"], "columns": [*SIZES, *names]}
    return json.dumps(head, indent=1)[:-2] + ',\n "rows": [\n  ' + ",\n  ".join(rows) + "\n ]\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--page-only", action="store_true")
    parser.add_argument("--note", default="nothing else running", help="what else the machine did, for the page")
    options = parser.parse_args()
    if options.page_only:
        PAGE.write_text(page(json.loads(OUT.read_text())))
        return
    start, points, cold, found = time.perf_counter(), grid(options.quick), torch.zeros(12 * 2**20), []
    for number, point in enumerate(points, 1):
        found.append(measure(point, cold, options.rounds))
        if number % 50 == 0 or number == len(points):
            print(f"{number} of {len(points)} points, {time.perf_counter() - start:.0f} s", flush=True)
    raw = {"conditions": {"threads": torch.get_num_threads(), "cpu": torch.backends.cpu.get_cpu_capability(),
                          "torch": torch.__version__, "rounds": options.rounds, "note": options.note,
                          "seconds": round(time.perf_counter() - start)}, "points": found}
    if options.quick:
        for tokens in (1, 64):
            print("\n".join(["", f"{tokens} token{'s' if tokens > 1 else ''} a row, 576 to 576", "",
                             *crossover(found, "factors", "float32", tokens, (576, 576))]))
        return
    lines = ",\n".join(map(json.dumps, found))
    OUT.write_text(f'{{"conditions": {json.dumps(raw["conditions"])},\n"points": [\n{lines}\n]}}\n')
    batched.TABLE.write_text(table(raw))
    text = page(raw)
    PAGE.write_text(text)
    print(text[text.index("## Is the choice"):])


if __name__ == "__main__":
    main()
