"""Quality after fine-tuning at equal memory: every way to train beside quantised weights, or the weights themselves, on one task.

    GRAFTWORK_DATA=... python benchmarks/storage_tuning.py [--quick] [--only lora peqa ...] [--minutes 57] [--seeds 3]
                                                           [--table]

SmolLM2-135M-Instruct in fp32 on e2e (slots of a restaurant to a sentence): 10 steps of 4 rows of at most 96 tokens, AdamW, the same
rows in the same order for all. Storages are rounded to the nearest, in groups of 64 where a row does not say otherwise. L4Q and eDKM
quantise what they train themselves; the weight beneath them is kept in int8, as a dense one would be most of the memory.

Equal memory: the rank, or where scales train the size of their groups, is what brings the planned peak of a step (graftwork.planning:
weights, adapters, state, activations) nearest to that of LoRA of rank 24 on nf4; the table says how near that is (5 % is asked for).
LoRA on dense weights, of the same rank, stands beside and takes what it takes.

Search: three rates, seed 0, judged on 16 validation rows. Then that rate, further seeds, judged on 100 test rows; the mean and its standard
error over seeds, and the difference from LoRA on int3 with a paired bootstrap interval over rows and seeds. Every row has one before
it, `not tuned`: the same start, scored without a step. Short runs: they compare how fast methods learn, not where they end.

Every cell is a file under results/storage_tuning/; a cell that is there is not run again. All rows get a seed before any gets the next, so
the clock (--minutes) costs seeds. Start as many processes as there are cores: each takes rows that no other is at, the last of the table,
which take longest, first. One seed of all rows took two processes 49 min 52 s on two cores with AVX2, eDKM 28 of one.

--quick: three rows, one rate and one seed, 2 steps, written nowhere.
"""

from __future__ import annotations

import json
import math
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import optimizer_tasks
import torch
from matrix import best_rate, cell, interval, order, parser_of, slug, unclaimed, verdict
from optimizer_tasks import TASKS
from rows import row_losses
from storage_paths import BASELINE, PATHS, TARGET, UNSIZED

from graftwork.recipe import load_recipe
from graftwork.storage import storage_bits
from graftwork.training.build import build_grafts

OUT = Path(__file__).parent / "results" / "storage_tuning"
TASK = replace(TASKS["e2e"], validation=16, test=100)
SEEDS = 3
QUICK = (TARGET, BASELINE, "peqa, int3")
#: how near a size is near enough, and how near it should be
NEAR, EQUAL = 0.03, 0.05
#: bytes of a number that trains, in fp32 with Adam's two moments; plans of a row, at most
STATE, PLANS = 12, 4


class Bench(optimizer_tasks.Bench):
    def sections(self, label: str, size: int) -> dict[str, Any]:
        return {**PATHS[label].made(size), "optimizer": {"method": "adamw"}}

    def size(self, label: str, target: int | None) -> dict[str, Any]:
        """The size whose planned peak is nearest to target (None: the first one): from the first by jumps that count STATE bytes for
        every number that trains."""
        path, peaks = PATHS[label], {}
        share = {size: size if path.sizes[0] < path.sizes[-1] else 1 / size for size in path.sizes}  # of what trains
        size = path.first
        while size not in peaks and len(peaks) < PLANS:
            found = self.planned(self.sections(label, size), path.rates[0])
            peaks[size] = {"size": size, "off": found["peak_bytes"] / (target or found["peak_bytes"]) - 1, **found}
            if abs(peaks[size]["off"]) <= NEAR:
                break
            wanted = found["trained"] + (target - found["peak_bytes"]) / STATE
            size = min(path.sizes, key=lambda other: abs(found["trained"] * share[other] / share[size] - wanted))
        return min(peaks.values(), key=lambda each: abs(each["off"]))

    def start(self, sections: dict[str, Any]) -> dict[str, Any]:
        """What is there before the first step."""
        model = self.model(0, sections)
        build_grafts(load_recipe(self.recipe(sections, 1e-3, 0)), model)
        model.eval()
        rows = row_losses(model, self.tokenizer, self.path("test"), self.task.format, self.task.length)
        return {"test": statistics.mean(rows), "rows": rows, "bits": storage_bits(model) or 32.0}


def run_path(bench: Bench, label: str, out: Path, end: float, seeds: range, rates: int = 3, steps: int | None = None) -> bool:
    """The cells of one row up to these seeds; False where the minutes were over before."""
    place, path = out / slug(label), PATHS[label]
    target = None if label in (TARGET, *UNSIZED) else cell(out / slug(TARGET) / "size.json", bench.size, TARGET, None)["peak_bytes"]
    found = cell(place / "size.json", bench.size, label, target)
    sections = bench.sections(label, found["size"])
    cell(place / "start.json", bench.start, sections)
    tried: dict[float, float | None] = {}
    for rate in path.rates[:rates]:
        if time.monotonic() > end:
            return False
        loss = cell(place / f"search-lr{rate:g}.json", bench.run, sections, rate, 0, steps, ("validation",))["validation"]
        tried[rate] = None if loss is None else -loss
    rate = best_rate(tried)
    for seed in seeds:
        if time.monotonic() > end:
            return False
        made = cell(place / f"final-seed{seed}.json", bench.run, sections, rate, seed, steps, ("test",), rate=rate)
        print(f"{label:>16}, seed {seed}: {'-' if made['test'] is None else format(made['test'], '.3f')} at lr {rate:g}, size "
              f"{found['size']}, planned peak {found['peak_bytes'] / 1e6:.0f} MB ({found['off']:+.1%})", file=sys.stderr, flush=True)
    return True


def run(bench: Bench, mine: list[str], out: Path, end: float, seeds: int, **options: Any) -> None:
    """One seed of every row, then one more of every row, and so on."""
    for upto in range(1, seeds + 1):
        for label in unclaimed(mine, out):
            if not run_path(bench, label, out, end, range(1, upto + 1), **options):
                return print(f"stopped in {label}: the minutes are over; the same command goes on from here", file=sys.stderr)


# -- tables -----------------------------------------------------------------------------------------------------------------
def read(out: Path) -> dict[str, dict[str, Any]]:
    """{label: its cells} of the rows that have a final one."""
    found = {}
    for label in PATHS:
        finals = [json.loads(path.read_text()) for path in sorted((out / slug(label)).glob("final-seed*.json"))]
        if finals:
            cells = {kind: json.loads((out / slug(label) / f"{kind}.json").read_text()) for kind in ("size", "start")}
            tried = {c["rate"]: c for c in (json.loads(path.read_text()) for path in (out / slug(label)).glob("search-lr*.json"))}
            rate = finals[0]["rate"]
            found[label] = {**cells, "finals": finals, "searched": tried[rate], "edge": len(tried) > 1 and rate in (min(tried), max(tried))}
    return found


def size_of(label: str, size: int) -> str:
    return f"{'r' if 'r' in PATHS[label].made(size)['adapter'] else 'g'} = {size}"


def compared(entry: dict[str, Any], base: dict[str, Any]) -> str:
    """Loss minus that of the baseline, over the seeds that both have."""
    both = min(len(entry["finals"]), len(base["finals"]))
    worse, low, high = interval([f["rows"] for f in entry["finals"][:both]], [f["rows"] for f in base["finals"][:both]])
    return f"{worse:+.3f} [{low:+.3f}, {high:+.3f}], {verdict(-worse, -high, -low)}"


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown, in the order of PATHS, every row after what it was before the first step."""
    lines = ["| what trains | size | bits of the base | planned peak, MB | of the target's | measured / planned | lr | test loss | "
             "minus LoRA's on int3 [95 %] | what is left |", "|---|---|--:|--:|--:|--:|--:|--:|---|---|"]
    base = found.get(BASELINE)
    for label, entry in found.items():
        size, start, finals = entry["size"], entry["start"], entry["finals"]
        lines.append(f"| {label}, not tuned | | {start['bits']:.3f} | | | | | {start['test']:.3f} | | |")
        losses, failed = [f["test"] for f in finals], any(order(f["test"]) == -math.inf for f in finals)
        error = statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 and not failed else math.nan
        near = "" if label in UNSIZED else f"{1 + size['off']:.3f}" + (" (not equal)" if abs(size["off"]) > EQUAL else "")
        around = "" if math.isnan(error) else f" ± {error:.3f}"
        shown = "failed" if failed else f"{statistics.mean(losses):.3f}{around} ({len(losses)})"
        against = "" if failed or label == BASELINE or not base or not base["finals"][0]["rows"] else compared(entry, base)
        # of the run that was planned: another seed has other rows in its heaviest step
        measured = f"{entry['searched']['peak_bytes'] / size['peak_bytes']:.4f}" if entry["searched"].get("peak_bytes") else ""
        rate = f"{finals[0]['rate']:g}{' (edge)' if entry['edge'] else ''}"
        lines.append(f"| **{label}** | {size_of(label, size['size'])} | {start['bits']:.3f} | {size['peak_bytes'] / 1e6:.0f} | {near} | "
                     f"{measured} | {rate} | {shown} | {against} | {PATHS[label].result} |")
    missing = [label for label in PATHS if label not in found]
    return "\n".join([*lines, "", f"Test loss: nats a token over {TASK.test} rows, mean ± standard error over seeds (their number). "
                      f"Run: {len(found)} of {len(PATHS)} rows, {TASK.steps} steps of {TASK.batch} rows, three rates on seed 0."
                      + (f" Not run: {'; '.join(missing)}." if missing else "")]) if found else ""


def main() -> int:
    parser = parser_of(__doc__, 57)
    parser.add_argument("--only", nargs="+", help="labels, or beginnings of them")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="of the finals, at most")
    arguments = parser.parse_args()
    end, quick = time.monotonic() + 60 * arguments.minutes, arguments.quick
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results" if quick else OUT
        wanted = [x for x in PATHS if not arguments.only or any(x.startswith(each) for each in arguments.only)]
        if not arguments.table:
            task = replace(TASK, validation=8, test=16) if quick else TASK
            mine, seeds = (list(QUICK), 1) if quick else (wanted[::-1], arguments.seeds)
            run(Bench(task, Path(folder)), mine, out, end, seeds, **({"rates": 1, "steps": 2} if quick else {}))
        text = table(read(out))
        print(text)
        if not quick and text:
            (OUT / "tables.md").write_text(f"{text}\n\ntorch {torch.__version__}, {platform.machine()}, one thread a process.\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
