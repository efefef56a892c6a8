"""Which adapter is worth using when: every adapter method on two encoder tasks, the best on two tasks of a language model.

    GRAFTWORK_DATA=... python benchmarks/adapters.py [--quick] [--tasks sst2 trec] [--methods lora nola ...] [--minutes 150] [--table]

The protocol is that of PEFT's method comparison, with a search: all methods see the same rows in the same order for the same
number of steps. Search: each method's own best of five learning rates, seed 0, on validation rows; where the best is the first
or the last of them, up to two more beyond it. Final: that rate, three seeds, on test rows that no choice was made on. The size
is the one whose trained values come nearest to those of LoRA at r = 4. The first column is the difference from tuned LoRA on
the same test rows and seeds with a paired bootstrap interval; a method whose interval holds 0 is `no difference`. Time and
memory stand as ratios to LoRA: steps timed in interleaved pairs, peaks as measured by the allocator.

Encoder tasks (sst2, trec: 32 steps of 16, 400 test rows): all-MiniLM-L6-v2 in fp32, adapters on all linear maps of the blocks,
a new score head trained along (not in the budget). Language-model tasks (e2e, word_problems: 10 steps of 4, 200 test rows):
SmolLM2-135M-Instruct in fp32, LoRA and the eight methods that did best on the encoder tasks; the score is the likelihood of the
reference answer. These are short runs: they compare how fast methods learn, not where they end.

Every cell is one file under results/adapters/; a cell that is there is not run again, so the matrix can be finished in pieces
(--minutes stops between cells) and by several processes (one a task). --quick: sst2, two rates, one seed, 10 steps, written
nowhere. The data is never committed. SST-2 and TREC state no terms: used for measuring only.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from adapter_tasks import DECODER, ENCODER, TASKS, Bench
from matrix import best_rate, candidates, cell, interval, order, verdict

import graftwork
from graftwork.registry import make_config

OUT = Path(__file__).parent / "results" / "adapters"
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
BELOW, ABOVE = (3e-4, 1e-4), (3e-1, 1.0)  # tried in turn while the best rate is the lowest, the highest
SEEDS = (0, 1, 2)
BUDGET = {"r": 4}
RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
#: sizes that are not a rank. NOLA's costs a step its time, so it stays below the budget.
SIZES: dict[str, list[dict[str, Any]]] = {
    "nola": [{"r": 8, "n_basis": k} for k in (64, 128, 256)], "oft": [{"block_size": b} for b in (4, 8, 16, 32)],
    "mos": [{"r": 2 * e, "equivalent_rank": e} for e in (1, 2, 4, 8)],
    "lokr": [{"r": r, "decompose_factor": 4} for r in RANKS], "mixlora": [{"num_experts": 4, "r": r} for r in RANKS]}
BEST = 8
#: methods of causal decoders only
ELSEWHERE = ("lopa", "prompt", "prefix")


def sizes_of(method: str) -> Iterator[dict[str, Any]]:
    """Options from small to large: its rank, where a method has no other size."""
    fields = type(make_config("adapter", method)).model_fields
    name = next((n for n in ("r", "rank") if n in fields), None)
    yield from SIZES.get(method) or ([{}] if name is None else [{name: r} for r in RANKS])


def options_of(bench: Bench, method: str) -> dict[str, Any]:
    """Of the sizes of a method the one whose trained values come nearest to the budget."""
    if method == "lora":
        return BUDGET
    budget, best, options = bench.count("lora", BUDGET), math.inf, {}
    for size in sizes_of(method):
        try:
            distance = abs(math.log(bench.count(method, size) / budget))
        except graftwork.GraftworkError:
            continue
        if distance < best:
            best, options = distance, size
    return options


def run_task(bench: Bench, methods: list[str], out: Path, end: float, rates, seeds, steps: int | None = None) -> None:
    """All cells of one task, method by method, until `end`."""
    for method in methods:
        place = out / bench.task.name / method
        options = cell(place / "options.json", options_of, bench, method)
        tried: dict[float, float | None] = {}
        for rate in candidates(rates, tried, *((BELOW, ABOVE) if rates == RATES else ())):
            if time.monotonic() > end:
                return print(f"stopped in {method}: the minutes are over; the same command goes on from here", file=sys.stderr)
            tried[rate] = cell(place / f"search-lr{rate:g}.json", bench.run, method, options, rate, 0, "validation", steps)["mean"]
        rate = best_rate(tried)
        finals = [cell(place / f"final-seed{seed}.json", bench.run, method, options, rate, seed, "test", steps, rate=rate)
                  for seed in seeds]
        if bench.task.name == ENCODER[0]:
            cell(place / "step.json", bench.step_ratio, method, options, BUDGET)
        print(f"{method:>16} {bench.task.name}: {', '.join('-' if f['mean'] is None else format(f['mean'], '.1f') for f in finals)} at lr "
              f"{rate:g} ({', '.join(f'{r:g}: ' + ('-' if a is None else format(a, '.1f')) for r, a in tried.items())})",
              file=sys.stderr, flush=True)


# -- tables -----------------------------------------------------------------------------------------------------------------
def read(out: Path, task: str, seeds=SEEDS) -> dict[str, list[dict[str, Any]]]:
    """{method: its finals} of the methods whose cells of a task are all there."""
    found = {}
    for place in sorted((out / task).glob("*")):
        files = [place / f"final-seed{seed}.json" for seed in seeds]
        if all(f.exists() for f in files):
            found[place.name] = [json.loads(f.read_text()) for f in files]
    return found


def table(out: Path, task: str, rates=RATES, seeds=SEEDS, steps: int | None = None) -> str:
    """Markdown, best first: the difference from tuned LoRA, then what a method costs."""
    found = read(out, task, seeds)
    if "lora" not in found:
        return ""
    lora = found["lora"]
    t, timed = TASKS[task], task == ENCODER[0]
    lines = [f"### {task}", "", f"| method | {t.unit} vs LoRA [95 %] | verdict | mean | lr | options | trained values | file bytes "
             f"| peak / LoRA |{' step / LoRA |' if timed else ''}", "|" + "---|" * (9 + timed)]
    for method, finals in sorted(found.items(), key=lambda item: -statistics.mean(order(f["mean"]) for f in item[1])):
        first, failed = finals[0], any(f["mean"] is None for f in finals)
        compared = (0.0, 0.0, 0.0) if method == "lora" or failed else interval([f["scores"] for f in finals], [f["scores"] for f in lora])
        said = "baseline" if method == "lora" else "failed" if failed else verdict(*compared)
        change = "-" if method == "lora" or failed else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*compared)
        mean = "-" if failed else f"{statistics.mean(f['mean'] for f in finals):.1f}"
        cells = [method, change, said, mean, f"{first['rate']:g}", ", ".join(f"{k}={v}" for k, v in first["options"].items()) or "-"]
        cells += ["-"] * 3 if failed else [f"{first['parameters']:,}", f"{first['file_bytes']:,}",
                                           f"{first['peak_bytes'] / lora[0]['peak_bytes']:.2f}"]
        step = out / ENCODER[0] / method / "step.json"
        if timed:
            cells.append(f"{json.loads(step.read_text())['ratio']:.2f}" if step.exists() else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"{len(found)} methods, {len(rates)} rates or more, {len(seeds)} seeds, {steps or t.steps} "
                      f"steps of {t.batch}, {t.test} test rows."])


def best(out: Path, count: int = BEST) -> list[str]:
    """The methods with the highest mean over the encoder tasks, LoRA aside."""
    scores = [{m: statistics.mean(order(f["mean"]) for f in finals) for m, finals in read(out, task).items()} for task in ENCODER]
    both = set(scores[0]) & set(scores[1]) - {"lora"}
    return sorted(both, key=lambda m: -sum(s[m] for s in scores))[:count]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--minutes", type=float, default=150)
    parser.add_argument("--table", action="store_true", help="print the tables of the cells that exist, run nothing")
    arguments = parser.parse_args()
    known = [m.name for m in graftwork.methods("adapter") if m.name not in ELSEWHERE]
    end = time.monotonic() + 60 * arguments.minutes
    rates, seeds, tasks, steps = (RATES[1:3], SEEDS[:1], ENCODER[:1], 10) if arguments.quick else (RATES, SEEDS, arguments.tasks, None)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results" if arguments.quick else OUT
        for name in tasks if not arguments.table else ():
            methods = arguments.methods or (best(out) if name in DECODER else known)
            run_task(Bench(TASKS[name], Path(folder)), ["lora", *(m for m in methods if m != "lora")], out, end, rates, seeds, steps)
        text = "\n\n".join(filter(None, (table(out, name, rates, seeds, steps) for name in TASKS)))
    print(text)
    if not arguments.quick:
        (OUT / "tables.md").write_text(f"{text}\n\ntorch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads.\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
