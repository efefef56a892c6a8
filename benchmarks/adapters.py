"""Which adapter is worth using when: every adapter method on two encoder tasks, at one budget of trained values.

    GRAFTWORK_DATA=... OMP_NUM_THREADS=2 python benchmarks/adapters.py [--quick] [--methods lora nola ...] [--tasks sst2 mrpc]
                                                                       [--minutes 150] [--table]

The protocol is that of PEFT's method comparison, with a search: all methods see the same rows in the same order for the same
number of steps. Search: each method's own best of five learning rates, seed 0, on validation rows. Final: that rate, three
seeds, on test rows nobody has looked at. The rank is the one whose trained values come nearest to those of LoRA at
r = 4. The first table is the difference from tuned LoRA on the same test rows and seeds with a paired bootstrap interval; a
method whose interval holds 0 is `no difference`. Time and memory stand as ratios to LoRA: steps timed in interleaved pairs,
peaks as measured by the allocator.

Base: all-MiniLM-L6-v2 in fp32, adapters on all linear maps of the blocks, a new score head trained along (its 770 values are
not in the budget). Every cell is one file under results/adapters/; a cell that is there is not run again, so the matrix can be
finished in pieces (--minutes stops between cells). --quick: one task, two rates, one seed, 15 steps, written nowhere.
The data is never committed. SST-2 states no terms and MRPC's are Microsoft Research's own: used for measuring only.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import graftwork
from graftwork.data import DataConfig
from graftwork.evaluation import evaluate
from graftwork.files import folder_bytes
from graftwork.modeling.state import state_of
from graftwork.registry import make_config
from graftwork.training.run import train_recipe

OUT = Path(__file__).parent / "results" / "adapters"
TASKS = ("sst2", "mrpc")
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
SEEDS = (0, 1, 2)
STEPS, BATCH, LENGTH, TRAIN, VALIDATION, TEST = 100, 16, 64, 1600, 400, 400
BUDGET = {"r": 4}
#: methods that are measured elsewhere: they have no sites on an encoder
ELSEWHERE = ("lopa", "prompt", "prefix")


def rows_of(task: str, split: str, limit: int) -> list[dict[str, Any]]:
    root = os.environ.get("GRAFTWORK_DATA")
    if not root:
        sys.exit("set GRAFTWORK_DATA to the folder of the data sets")
    with gzip.open(Path(root) / "glue" / task / f"{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    random.Random(0).shuffle(rows)
    return [{"text": r.get("sentence", r.get("sentence1")), **({"text2": r["sentence2"]} if "sentence2" in r else {}),
             "label": ("no", "yes")[r["label"]]} for r in rows[:limit]]


class Bench:
    """One loaded base, the data of every task as files, and what a cell is."""

    def __init__(self, tasks: tuple[str, ...], folder: Path, quick: bool):
        self.folder, self.quick = folder, quick
        for task in tasks:
            for split, limit in (("train", TRAIN), ("validation", VALIDATION), ("test", TEST)):
                text = "".join(json.dumps(row) + "\n" for row in rows_of(task, split, limit))
                (folder / f"{task}.{split}.jsonl").write_text(text)
        self.model, self.tokenizer = graftwork.load("all-minilm-l6-v2", dtype="fp32", task="classification", num_labels=2)
        self.budget = self.count("lora", BUDGET)

    def count(self, method: str, options: dict[str, Any]) -> int:
        graft = graftwork.attach(self.model, method, name="counted", **options)
        try:
            return graft.parameter_count()
        finally:
            graft.detach()

    def options(self, method: str) -> dict[str, Any]:
        """The rank that comes nearest to the budget, where the method has one."""
        fields = type(make_config("adapter", method)).model_fields
        name = next((n for n in ("r", "rank") if n in fields), None)
        if name is None:
            return {}
        best, options = math.inf, {}
        for r in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256):
            try:
                distance = abs(math.log(self.count(method, {name: r}) / self.budget))
            except graftwork.GraftworkError:
                continue
            if distance < best:
                best, options = distance, {name: r}
        return options

    def run(self, task: str, method: str, options: dict[str, Any], rate: float, seed: int, split: str) -> dict[str, Any]:
        """Train and score one cell. A run that diverges scores what it scores; one that stops with NaN scores 0."""
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            recipe = {"model": "all-minilm-l6-v2", "adapter": {"method": method, **options}, "objective": "classification",
                      "optimizer": {"method": "adamw", "lr": rate},
                      "data": {"train": str(self.folder / f"{task}.train.jsonl"), "format": "classification", "max_length": LENGTH},
                      "train": {"max_steps": 15 if self.quick else STEPS, "batch_size": BATCH, "precision": "fp32", "seed": seed,
                                "schedule": "linear", "warmup": 0.1}, "output_dir": f"{place}/run"}
            start, grafts = time.perf_counter(), []
            try:
                result = train_recipe(recipe, quiet=True, model=self.model, tokenizer=self.tokenizer)
                grafts = result.grafts
                scored = evaluate(self.model, self.tokenizer, self.folder / f"{task}.{split}.jsonl", metrics=("loss",),
                                  labels=("no", "yes"), batch_size=64,
                                  config=DataConfig(train="-", format="classification", max_length=LENGTH))
                correct = [int(row["correct"]) for row in scored.rows]
                return {"correct": correct, "accuracy": statistics.mean(correct), "parameters": grafts[0].parameter_count(),
                        "file_bytes": folder_bytes(result.graft), "peak_bytes": result.peak_bytes, "loss": result.loss,
                        "seconds": time.perf_counter() - start, "options": options}
            except graftwork.GraftworkError as error:
                return {"correct": [], "accuracy": 0.0, "error": error.message, "options": options, "seconds": time.perf_counter() - start}
            finally:
                for graft in grafts or list(state_of(self.model).grafts.values()):
                    graft.detach()

    def step_ratio(self, method: str, options: dict[str, Any], pairs: int = 7) -> dict[str, Any]:
        """Seconds of one forward, backward and AdamW step, in interleaved pairs with LoRA."""
        batch = self.tokenizer(["a film that takes its time and is the better for it"] * BATCH, return_tensors="pt",
                               padding="max_length", max_length=LENGTH)
        labels, times = torch.zeros(BATCH, dtype=torch.long), {"lora": [], method: []}
        for i in range(pairs + 1):
            for name, own in (("lora", BUDGET), (method, options)):
                graft = graftwork.attach(self.model, name, name="timed", **own)
                optimizer = graftwork.optimizer("adamw", graft.parameter_groups(), lr=1e-4)
                self.model.train()
                for timed in (False, True):
                    start = time.perf_counter()
                    self.model(**batch, labels=labels).loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    if timed and i:
                        times[name].append(time.perf_counter() - start)
                self.model.eval()
                graft.detach()
        return {"ratio": statistics.median(b / a for a, b in zip(times["lora"], times[method])), "seconds": times}


def cell(path: Path, keep: bool, make, *arguments) -> dict[str, Any]:
    if keep and path.exists():
        return json.loads(path.read_text())
    found = make(*arguments)
    if keep:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found) + "\n")
    return found


def interval(ours: list[list[int]], theirs: list[list[int]], draws: int = 2000) -> tuple[float, float, float]:
    """Mean difference in points and its 95 % interval; rows and seeds are drawn together, so that equal rows stay paired."""
    gains = [[100 * (a - b) for a, b in zip(x, y)] for x, y in zip(ours, theirs)]
    rng, n, means = random.Random(0), len(gains[0]), []
    for _ in range(draws):
        rows = [rng.randrange(n) for _ in range(n)]
        chosen = [gains[rng.randrange(len(gains))] for _ in gains]
        means.append(statistics.mean(seed[r] for seed in chosen for r in rows))
    means.sort()
    return statistics.mean(map(statistics.mean, gains)), means[int(0.025 * draws)], means[int(0.975 * draws) - 1]


def table(results: dict[str, dict[str, Any]], tasks: tuple[str, ...]) -> str:
    """Markdown: the difference from tuned LoRA first, then what it costs."""
    lines = ["| method | " + " | ".join(f"{t}: points vs LoRA [95 %]" for t in tasks) + " | verdict | accuracy "
             "| rate | trained values | file bytes | step / LoRA | peak / LoRA |", "|" + "---|" * (len(tasks) + 8)]
    for method, found in sorted(results.items(), key=lambda item: -statistics.mean(item[1]["accuracy"][t] for t in tasks)):
        cells, verdicts = [], set()
        for task in tasks:
            if method == "lora" or not found["correct"][task][0]:
                cells.append("-")
                continue
            mean, low, high = interval(found["correct"][task], results["lora"]["correct"][task])
            cells.append(f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]")
            verdicts.add("better" if low > 0 else "worse" if high < 0 else "no difference")
        verdict = "baseline" if method == "lora" else "failed" if not verdicts else verdicts.pop() if len(verdicts) == 1 else \
            " / ".join(sorted(verdicts))
        first = found["final"]
        lines.append(f"| {method} | " + " | ".join(cells) + f" | {verdict} | "
                     + ", ".join(f"{100 * found['accuracy'][t]:.1f}" for t in tasks) + " | "
                     + ", ".join(f"{found['rate'][t]:g}" for t in tasks)
                     + f" | {first.get('parameters', 0):,} | {first.get('file_bytes', 0):,} | {found['step']:.2f} | {found['peak']:.2f} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--minutes", type=float, default=150)
    parser.add_argument("--table", action="store_true", help="print the table of the cells that exist, run nothing")
    arguments = parser.parse_args()
    known = [m.name for m in graftwork.methods("adapter") if m.name not in ELSEWHERE]
    methods = ["lora", *(m for m in arguments.methods or known if m != "lora")]
    tasks = tuple(arguments.tasks[:1] if arguments.quick else arguments.tasks)
    rates, seeds, end = (RATES[1:3], SEEDS[:1], time.monotonic() + 60 * arguments.minutes)
    if not arguments.quick:
        rates, seeds = RATES, SEEDS
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(tasks, Path(folder), arguments.quick)
        for method in methods:
            if time.monotonic() > end:
                print(f"stopped before {method}: {arguments.minutes:g} minutes are over; run the command again to go on", file=sys.stderr)
                break
            options = bench.options(method) if method != "lora" else BUDGET
            found: dict[str, Any] = {"correct": {}, "accuracy": {}, "rate": {}}
            for task in tasks:
                place = OUT / task / method
                if arguments.table and not all((place / f"final-seed{s}.json").exists() for s in seeds):
                    break
                keep = not arguments.quick
                tried = {rate: cell(place / f"search-lr{rate:g}.json", keep, bench.run, task, method, options, rate, 0, "validation")
                         ["accuracy"] for rate in rates}
                rate = max(tried, key=tried.get)
                finals = [cell(place / f"final-seed{seed}.json", keep, bench.run, task, method, options, rate, seed, "test")
                          for seed in seeds]
                found["correct"][task], found["rate"][task] = [f["correct"] for f in finals], rate
                found["accuracy"][task] = statistics.mean(f["accuracy"] for f in finals)
                found["final"] = finals[0]
                print(f"{method:>16} {task}: {100 * found['accuracy'][task]:.1f} % at lr {rate:g} "
                      f"({', '.join(f'{r:g}: {100 * a:.1f}' for r, a in tried.items())})", file=sys.stderr, flush=True)
            if len(found["rate"]) < len(tasks):
                continue
            found["step"] = cell(OUT / "step" / f"{method}.json", not arguments.quick, bench.step_ratio, method, options)["ratio"]
            lora = results.get("lora", found)["final"].get("peak_bytes")
            found["peak"] = found["final"].get("peak_bytes", 0) / lora if lora else float("nan")
            results[method] = found
    text = table(results, tasks)
    print(text)
    if not arguments.quick:
        (OUT / "table.md").write_text(f"{text}\n\n{len(results)} methods, {len(tasks)} tasks, {len(rates)} rates, {len(seeds)} seeds, "
                                      f"{STEPS} steps of {BATCH}; torch {torch.__version__}, {platform.machine()}.\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
