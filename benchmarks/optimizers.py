"""Which optimizer is worth its memory: every method of full tuning on a small model from scratch, the main ones on SmolLM2.

    GRAFTWORK_DATA=... python benchmarks/optimizers.py [--quick] [--tasks shakespeare e2e ...] [--methods adamw galore ...]
                                                       [--beyond 1] [--minutes 150] [--table]

(a) shakespeare: a Llama of 1.9 million parameters (4 blocks, width 192, one token a byte) from random weights, 200 steps of
8 x 128 tokens of `lm/tinyshakespeare`, every optimizer, estimator and selection of full weights. (b) e2e and word_problems:
SmolLM2-135M-Instruct, 10 steps of 4 rows, AdamW and six others. All methods of a task see the same rows in the same order.

Search: three learning rates around a method's usual one, seed 0, judged on validation rows; where the best is at an edge, up to
--beyond more beyond it. Final: three seeds (of the weights, too, where training starts from none), judged on test rows. The bytes of
optimizer state are the planner's; the peak is measured by the allocator in a step in which most trains, after the first unless that
is the heaviest, and the planner's figure stands beside it. Ranks are a quarter of the width, subspaces are refreshed every 50 steps.
Short runs: they compare how fast methods learn, not where they end; and a method of zeroth order gets the same tokens, far fewer than
it is made for.

Every cell is one file under results/optimizers/; a cell that is there is not run again, so the matrix can be finished in pieces
(--minutes stops between cells), by several processes (each takes methods that no other is at). --quick: shakespeare, AdamW and three
others, one rate and seed, 20 steps, written nowhere. The table and the plot (loss against bytes) are written beside the cells.
"""

from __future__ import annotations

import json
import math
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from figures import scatter
from matrix import best_rate, candidates, cell, interval, order, parser_of, slug, unclaimed, verdict
from optimizer_tasks import HIDDEN, TASKS, VOCABULARY, Bench

import graftwork

OUT = Path(__file__).parent / "results" / "optimizers"
SEEDS = (0, 1, 2)
BASELINE = "adamw"
TUNED = (BASELINE, "galore", "apollo_mini", "fira", "adam_mini", "lisa", "mezo")
QUICK = (BASELINE, "galore", "lisa", "mezo")
QUICK_STEPS = 20
#: the middle one of a method's three rates, from scratch and in fine-tuning, where it is not that of Adam
ADAM = (9.49e-4, 3e-5)
RATES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("galore", "galore, 8-bit", "q_galore", "q_galore, int8 weights", "natural_galore", "gradnormlorp", "owlore"),
                    (10**-1.5, 1e-4)),
    **dict.fromkeys(("fira", "subtrack", "apollo", "apollo_mini", "cosmos"), (1e-2, 1e-4)), "adafactor": (1e-3, 1e-4),
    "adalomo": (10**-1.5, 1e-3), "muon": (1e-2, 1e-3), **dict.fromkeys(("sgd", "lomo"), (0.3, 1e-2)), "lion": (3e-4, 3e-6),
    **dict.fromkeys(("mezo", "sparse_mezo", "zo_sgd", "zo_sgd_sign", "zo_momentum", "zo_conservative", "zo_blockwise"), (1e-3, 1e-6)),
    "zo_adam": (1e-3, 1e-5), "forward_gradient": (1e-2, 1e-5)}
STEP = 10 ** 0.5


def sections_of(width: int) -> dict[str, dict[str, Any]]:
    """The recipe sections of every method for a model of that width."""
    found: dict[str, dict[str, Any]] = {}
    for info in graftwork.methods("optimizer"):
        fields, own = info.config.model_fields, {}
        if "rank" in fields and info.name != "apollo_mini":
            own["rank"] = width // 4
        if "update_proj_gap" in fields:
            own["update_proj_gap"] = 50
        for name in {"ns_dtype", "newton_schulz"} & set(fields):
            own[name] = "float32"  # bf16, their default, is slow on processors without it
        unclipped = {"train": {"max_grad_norm": 0}} if fields["fused"].default else {}
        found[info.name] = {"optimizer": {"method": info.name, **own}, **unclipped}
    for name, own in SELECTIONS.items():
        found[name] = {"optimizer": {"method": "adamw"}, "selection": [{"method": name, **own}]}
    found["owlore"] = {"optimizer": found["galore"]["optimizer"], "selection": [{"method": "owlore", "layers": 2, "interval": 10}]}
    found["sst"] = {"adapter": {"method": "sst", "r": width // 4, **LEARNED}, "optimizer": {"method": "adamw"},
                    "selection": [{"method": "sst", "interval": 10, "warmup": 3}]}
    for name, own in ESTIMATORS.items():
        found[name] = {"estimator": {"method": name, **own}}
    for name, estimator in DRIVEN.items():
        found[name] = {"estimator": estimator, "optimizer": {"method": "adamw"}}
    found["galore, 8-bit"] = {"optimizer": {**found["galore"]["optimizer"], "state": "8bit"}}
    found["q_galore, int8 weights"] = {"storage": "int8", **found["q_galore"]}
    found["adamw, bf16 weights"] = {"optimizer": {"method": "adamw"}, "train": {"precision": "bf16"}}
    for rounding in ("stochastic", "kahan"):
        found[f"adamw, bf16 weights, {rounding}"] = {"optimizer": {"method": "adamw", "rounding": rounding}, "train": {"precision": "bf16"}}
    return {name: found[name] for name in [BASELINE, *(n for n in found if n != BASELINE)]}


#: from scratch, embedding and head have to learn, too: for badam blocks of their own
LEARNED = {"modules_to_save": ["lm_head"], "trainable_tokens": list(range(VOCABULARY))}
SELECTIONS = {"lisa": {"layers": 2, "interval": 10}, "badam": {"interval": 10, "embeddings": True}, "freeze": {"interval": 0.1}}
#: estimators that move the weights themselves
ESTIMATORS: dict[str, dict[str, Any]] = {name: {} for name in (
    "mezo", "sparse_mezo", "zo_sgd", "zo_sgd_sign", "zo_adam", "zo_momentum", "zo_conservative", "zo_blockwise", "forward_gradient")}
#: estimators under AdamW. DeepZero's coordinates are few: each costs a forward.
DRIVEN: dict[str, dict[str, Any]] = {
    "zo_hybrid": {"method": "zo_hybrid", "layers": 1}, "deepzero": {"method": "deepzero", "max_coordinates": 8, "grasp_samples": 8},
    **{f"halo, {form}, level {level}": {"method": "halo", "format": form, "level": level} for form in ("int8", "fp8") for level in (0, 2)}}


def rates_of(method: str, scratch: bool, count: int) -> tuple[list[float], list[float], list[float]]:
    """(the three, those below in turn, those above in turn), each sqrt(10) times its neighbour."""
    middle = RATES.get(method, ADAM)[0 if scratch else 1]
    return ([float(f"{middle * STEP ** k:.3g}") for k in (-1, 0, 1)], [float(f"{middle * STEP ** -k:.3g}") for k in range(2, 2 + count)],
            [float(f"{middle * STEP ** k:.3g}") for k in range(2, 2 + count)])


def run_task(bench: Bench, methods: dict[str, dict[str, Any]], out: Path, end: float, quick: bool, beyond: int) -> None:
    """All cells of one task, method by method, until `end`."""
    for method in unclaimed(methods, out / bench.task.name):
        sections = methods[method]
        place = out / bench.task.name / slug(method)
        first, below, above = rates_of(method, bench.task.base is None, beyond)
        if quick:
            first, below, above = first[1:2], [], []
        steps, tried = QUICK_STEPS if quick else None, {}
        for rate in candidates(first, tried, below, above):
            if time.monotonic() > end:
                return print(f"stopped in {method}: the minutes are over; the same command goes on from here", file=sys.stderr)
            loss = cell(place / f"lr{rate:g}-seed0.json", bench.run, sections, rate, 0, steps)["validation"]
            tried[rate] = None if loss is None else -loss
        rate = best_rate(tried)
        finals = [cell(place / f"lr{rate:g}-seed{seed}.json", bench.run, sections, rate, seed, steps) for seed in SEEDS[:1 if quick else 3]]
        cell(place / "plan.json", bench.planned, sections, rate)
        print(f"{method:>16} {bench.task.name}: {', '.join(shown(f['test']) for f in finals)} at lr {rate:g} "
              f"({', '.join(f'{r:g}: {shown(None if a is None else -a)}' for r, a in tried.items())})", file=sys.stderr, flush=True)


def shown(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.3f}"


# -- tables -----------------------------------------------------------------------------------------------------------------
def read(out: Path, task: str, methods: list[str], seeds: int) -> dict[str, dict[str, Any]]:
    """{method: its finals and its plan} of the methods whose cells of a task are all there."""
    found = {}
    for method in methods:
        place = out / task / slug(method)
        if (place / "plan.json").exists():  # the last cell of a method
            searched = [json.loads(path.read_text()) for path in place.glob("lr*-seed0.json")]
            rate = best_rate({c["rate"]: None if c["validation"] is None else -c["validation"] for c in searched})
            finals = [json.loads((place / f"lr{rate:g}-seed{seed}.json").read_text()) for seed in SEEDS[:seeds]]
            found[method] = {"rate": rate, "finals": finals, "plan": json.loads((place / "plan.json").read_text())}
    return found


def mean_loss(entry: dict[str, Any]) -> float:
    losses = [f["test"] for f in entry["finals"]]
    return math.inf if any(order(x) == -math.inf for x in losses) else statistics.mean(losses)


def table(task: str, found: dict[str, dict[str, Any]], quick: bool = False) -> str:
    """Markdown, best first."""
    if BASELINE not in found:
        return ""
    base = found[BASELINE]
    lines = [f"### {task}", "", "| method | loss | minus AdamW's [95 %] | verdict | lr | optimizer state, bytes | of AdamW's | "
             "peak, bytes | of AdamW's | planned / measured |", "|---|--:|---|---|--:|--:|--:|--:|--:|--:|"]
    for method, entry in sorted(found.items(), key=lambda item: mean_loss(item[1])):
        loss, plan = mean_loss(entry), entry["plan"]
        if math.isinf(loss):
            lines.append(f"| {method} | - | | failed | {entry['rate']:g} | | | | | |")
            continue
        worse, low, high = interval([f["rows"] for f in entry["finals"]], [f["rows"] for f in base["finals"]])
        said = "baseline" if method == BASELINE else verdict(-worse, -high, -low)
        change = "" if method == BASELINE else f"{worse:+.3f} [{low:+.3f}, {high:+.3f}]"
        peak, first = entry["finals"][0]["peak_bytes"], base["finals"][0]["peak_bytes"]
        lines.append(f"| {method} | {loss:.3f} | {change} | {said} | {entry['rate']:g} | {plan['state_bytes']:,} | "
                     f"{plan['state_bytes'] / base['plan']['state_bytes']:.3f} | {peak:,} | {peak / first:.2f} | "
                     f"{plan['peak_bytes'] / peak:.4f} |")
    t = TASKS[task]
    steps = QUICK_STEPS if quick else t.steps
    return "\n".join([*lines, "", f"{len(found)} methods; {steps} steps of {t.batch} rows of at most {t.length} tokens; nats a token over "
                      f"{t.test} test rows, mean of {len(base['finals'])} seeds."])


def plot(task: str, found: dict[str, dict[str, Any]], path: Path) -> None:
    """Loss against the bytes of optimizer state and against the peak."""
    trained = {m: e for m, e in found.items() if math.isfinite(mean_loss(e))}
    state = {m: (max(e["plan"]["state_bytes"], 1), mean_loss(e)) for m, e in trained.items()}
    peak = {m: (e["finals"][0]["peak_bytes"], mean_loss(e)) for m, e in trained.items()}
    scatter(path, [("optimizer state, bytes", "symlog", state), ("peak of a step, bytes (measured)", "log", peak)],
            f"test loss of {task}, nats a token", marked=[BASELINE], size=(13, 6))


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--beyond", type=int, default=1, help="rates tried beyond the three, where the best of them is at an edge")
    arguments = parser.parse_args()
    end, quick, texts = time.monotonic() + 60 * arguments.minutes, arguments.quick, []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results" if quick else OUT
        for task in ("shakespeare",) if quick else arguments.tasks:
            methods = sections_of(HIDDEN[task])
            wanted = arguments.methods or (QUICK if quick else list(methods) if TASKS[task].base is None else TUNED)
            if not arguments.table:
                mine = {method: methods[method] for method in wanted}
                run_task(Bench(TASKS[task], Path(folder)), mine, out, end, quick, arguments.beyond)
            found = read(out, task, list(methods), 1 if quick else 3)
            texts.append(table(task, found, quick))
            if not quick and BASELINE in found:
                plot(task, found, out / f"{task}.svg")
    text = "\n\n".join(filter(None, texts))
    print(text)
    if not quick and arguments.tasks == list(TASKS):
        (OUT / "tables.md").write_text(f"{text}\n\ntorch {torch.__version__}, {platform.machine()}, one thread a process.\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
