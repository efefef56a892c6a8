"""Formats and calibrations of weights: perplexity, bits, time to quantise, speed of decoding, and zero-shot answers of the best.

    GRAFTWORK_DATA=... python benchmarks/storage.py [--quick] [--only int4 spqr ...] [--later] [--minutes 93] [--table] [--decode]

SmolLM2-135M-Instruct, all linear maps of its blocks. Calibration: 16 rows of 512 tokens of `lm/c4_sample` (calibration split).
Perplexity: 16,384 tokens each of `lm/wikitext2_raw` (test) and of `lm/c4_sample` (test), in windows of 512. Decoding: one token through
the model, interleaved with the dense model in bf16 and in fp32 (medians of the ratios of neighbours). Zero-shot: 50 items each of piqa,
arc_easy, openbookqa and winogrande, by the likelihood of the answers, for what is on the Pareto front of bits and perplexity (asked when
a row was on the front of those before it, so that nothing is quantised twice; the final front is among these).

Perplexity and answers are computed on a dense copy of what the codes stand for: the same numbers, decoded once instead of once a window.
That products by codes equal products by `dequantize` is what tests/test_storage.py and its like are about; here every cell compares the
two on the first window, and the largest difference of a token's log-likelihood is kept and stands below the table. No row rounds its
inputs, where the two would differ.

The model's file was once coded in 4 bits with groups of 32, so no row here uses 4 bits in groups of 32 or fewer (gguf q4_k and q5_k and
spqr at 4 bits are left out). Every cell is a file under results/storage/; a cell that is there is not run again, and rows that matter most
come first: --minutes is when a process begins no further cell. Start as many processes as there are cores (OMP_NUM_THREADS=1): each takes
rows that no other is at. On a loaded machine with AVX2 the 35 rows took 183 minutes of processor time. Of a row, 157 s are for the texts
(2.45 s a window, the products at their rate of 75 GFLOP/s), 2 s for rtn, 180 to 340 s for calibrations and fits of books and factors.

--quick: dense, int4 and int2 by rtn and gptq, a sixteenth of the text, 10 items a task, written nowhere.
"""

from __future__ import annotations

import copy
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
from matrix import cell, parser_of, slug, unclaimed
from rows import data_folder, read_rows
from storage_formats import LATER, QUICK, ROWS_OF, configurations
from storage_tasks import losses, questions, right, texts
from torch import nn

import graftwork
from graftwork.data.calibration import calibration_rows
from graftwork.registry import make_config
from graftwork.storage import apply_storage, storage_bits
from graftwork.storage.base import Storage

OUT = Path(__file__).parent / "results" / "storage"
BASE = "smollm2-135m-instruct"
WINDOW, TOKENS, ROWS, ITEMS = 512, 16_384, 16, 50


class Bench:
    """The base dense, in bf16 too, and as the dense copy of the row that was stored last; texts, questions, calibration."""

    def __init__(self, quick: bool = False):
        self.dense, self.tokenizer = graftwork.load(BASE, dtype="fp32")
        self.half, _ = graftwork.load(BASE, dtype="bf16")
        self.copy, self.held = copy.deepcopy(self.dense), ""
        root, share = data_folder(), 1 / 16 if quick else 1
        self.texts = texts(root, self.tokenizer, WINDOW, int(TOKENS * share) // WINDOW)
        self.questions = questions(root, 10 if quick else ITEMS)
        self.rows = [row["text"] for row in read_rows(root / "lm/c4_sample/calibration.jsonl.gz")]
        self.samples = 2 if quick else ROWS

    def stored(self, label: str, section: dict[str, Any]) -> nn.Module:
        """The model in a storage; the dense copy becomes that of it."""
        model, options = copy.deepcopy(self.dense), dict(section)
        given = calibration_rows(self.rows, self.tokenizer, samples=ROWS_OF.get(label, self.samples), length=WINDOW)
        apply_storage(model, make_config("storage", options.pop("method"), **options), batches=given.batches, notes=[])
        with torch.no_grad():
            for name, module in model.named_modules():
                if isinstance(module, Storage):
                    self.copy.get_submodule(name).weight.copy_(module.dequantize())
                elif isinstance(module, nn.Linear):
                    self.copy.get_submodule(name).weight.copy_(module.weight)
        self.held = label
        return model

    def quality(self, label: str, section: dict[str, Any]) -> dict[str, Any]:
        start = time.perf_counter()
        model = self.stored(label, section)
        seconds, window = time.perf_counter() - start, self.texts["c4"][0]
        difference = float((losses(model, window) - losses(self.copy, window)).abs().max())
        decode = decode_ratios(model, {"bf16": self.half, "fp32": self.dense})
        found = {"section": section, "bits": storage_bits(model) or 32.0, "seconds": seconds, "decode": decode, "difference": difference}
        del model
        return found | {"perplexity": {name: perplexity(self.copy, windows) for name, windows in self.texts.items()}}

    def answers(self, label: str, section: dict[str, Any]) -> dict[str, Any]:
        """{task: 1 for each item that is answered rightly}."""
        if self.held != label:
            self.stored(label, section)
        return {task: right(self.copy, self.tokenizer, items) for task, items in self.questions.items()}


def perplexity(model: nn.Module, windows: torch.Tensor) -> float:
    """exp of the mean negative log-likelihood of all tokens but the first of each window."""
    return math.exp(min(float(torch.stack([losses(model, ids).mean() for ids in windows]).double().mean()), 50.0))


@torch.no_grad()
def decode_ratios(model: nn.Module, dense: dict[str, nn.Module], rounds: int = 7) -> dict[str, float]:
    """{dense model: time of one token through it over that through this one}: above 1 when the codes are faster."""
    ids, ratios = torch.tensor([[5]]), {name: [] for name in dense}
    for _ in range(rounds):
        times = {}
        for name, each in (*dense.items(), ("", model)):
            start = time.perf_counter()
            each(input_ids=ids)
            times[name] = time.perf_counter() - start
        for name in dense:
            ratios[name].append(times[name] / times[""])
    return {name: statistics.median(found[2:]) for name, found in ratios.items()}


# -- tables -----------------------------------------------------------------------------------------------------------------
def read(out: Path, labels: list[str]) -> dict[str, dict[str, Any]]:
    """{label: its cells} of those that were measured."""
    found = {}
    for label in labels:
        path = out / slug(label) / "quality.json"
        if path.exists():
            answers = path.with_name("answers.json")
            found[label] = json.loads(path.read_text()) | {"answers": json.loads(answers.read_text()) if answers.exists() else None}
    return found


def mean_log(entry: dict[str, Any]) -> float:
    return statistics.mean(math.log(p) for p in entry["perplexity"].values())


def front(found: dict[str, dict[str, Any]]) -> list[str]:
    """Labels that no other beats in both bits and perplexity."""
    return [label for label, mine in found.items() if not any(
        other["bits"] <= mine["bits"] and mean_log(other) <= mean_log(mine) and other is not mine for other in found.values())]


def table(found: dict[str, dict[str, Any]], every: list[str], quick: bool = False) -> str:
    """Markdown, from many bits to few. every: labels of the whole matrix."""
    if "dense" not in found:
        return ""
    base, best = found["dense"], set(front(found))
    lines = ["| storage, calibration | bits a weight | WikiText-2 | C4 | log-ppl above dense | seconds | decode, x dense bf16 | "
             "x dense fp32 | zero-shot, % |", "|---|--:|--:|--:|--:|--:|--:|--:|--:|"]
    for label, entry in sorted(found.items(), key=lambda item: (-item[1]["bits"], mean_log(item[1]))):
        name = f"**{label}**" if label in best else label
        answers = entry["answers"] and [x for rows in entry["answers"].values() for x in rows]
        lines.append(f"| {name} | {entry['bits']:.3f} | {entry['perplexity']['wikitext2']:.2f} | {entry['perplexity']['c4']:.2f} | "
                     f"{mean_log(entry) - mean_log(base):+.3f} | {entry['seconds']:.0f} | {entry['decode']['bf16']:.2f} | "
                     f"{entry['decode']['fp32']:.2f} | {f'{100 * statistics.mean(answers):.1f}' if answers else ''} |")
    missing, share = [label for label in every if label not in found], 16 if quick else 1
    asked = [len(rows) for entry in found.values() if entry["answers"] for rows in entry["answers"].values()]
    items = f"{min(asked)} items of each of the four tasks" if asked else "nothing asked"
    return "\n".join([
        *lines, "", "Bold: on the Pareto front of bits and mean log-perplexity. Decode: tokens a second over those of the dense model. "
        f"Zero-shot: {items}; at 50 the standard error of the mean of all is about 3.5 points.", "",
        f"Run: {len(found)} of {len(every)} rows, {TOKENS // share:,} tokens of each text in windows of {WINDOW}, calibration on "
        f"{2 if quick else ROWS} rows of {WINDOW}. Largest difference of a token's log-likelihood between codes and their dense copy: "
        f"{max(entry['difference'] for entry in found.values()):.1g} nats." + (f" Not run: {'; '.join(missing)}." if missing else "")])


def plot(found: dict[str, dict[str, Any]], path: Path) -> None:
    above = {label: (entry["bits"], max(mean_log(entry) - mean_log(found["dense"]), 1e-4)) for label, entry in found.items()}
    scatter(path, [("bits a weight, all metadata included", "linear", above)], "mean log-perplexity above the dense model's",
            marked=front(found), yscale="log", xlim=(1.5, 9.5))


def run(bench: Bench, mine: list[str], known: dict[str, dict[str, Any]], out: Path, end: float) -> None:
    """The cells of these labels until `end`: quality, and answers of what is on the front of all that are there by then."""
    for label in unclaimed(mine, out):
        if time.monotonic() > end:
            return print("the minutes are over; the same command goes on from here", file=sys.stderr)
        found = cell(out / slug(label) / "quality.json", bench.quality, label, known[label])
        print(f"{label:>24}: {found['bits']:.3f} bits, {found['perplexity']}, {found['seconds']:.0f} s", file=sys.stderr, flush=True)
        if label in front(read(out, list(known))):
            cell(out / slug(label) / "answers.json", bench.answers, label, known[label])
    # where a run was stopped between the two
    for label in unclaimed([x for x in front(read(out, list(known))) if x in mine], out):
        cell(out / slug(label) / "answers.json", bench.answers, label, known[label])


def time_again(bench: Bench, labels: list[str], known: dict[str, dict[str, Any]], out: Path) -> None:
    """The speed of decoding of rows that are there, in their cells; everything else stays."""
    for label in labels:
        path = out / slug(label) / "quality.json"
        if path.exists():
            found = json.loads(path.read_text())
            found["decode"] = decode_ratios(bench.stored(label, known[label]), {"bf16": bench.half, "fp32": bench.dense})
            path.write_text(json.dumps(found) + "\n")
            print(f"{label:>24}: decode {found['decode']}", file=sys.stderr, flush=True)


def main() -> int:
    parser = parser_of(__doc__, 93)
    parser.add_argument("--decode", action="store_true", help="time decoding again, and nothing else, for rows that are there")
    parser.add_argument("--only", nargs="+", help="labels, or beginnings of them")
    parser.add_argument("--later", action="store_true", help=f"the {len(LATER)} rows too for which the minutes have no room")
    arguments = parser.parse_args()
    end, known = time.monotonic() + 60 * arguments.minutes, configurations()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) if arguments.quick else OUT
        wanted = list(QUICK) if arguments.quick else [x for x in known if arguments.later or x not in LATER]
        if arguments.only:
            wanted = [x for x in known if any(x.startswith(each) for each in arguments.only)]
        if arguments.decode:
            time_again(Bench(arguments.quick), wanted, known, out)
        elif not arguments.table:
            run(Bench(arguments.quick), wanted, known, out, end)
        found = read(out, list(known))
        text = table(found, list(QUICK) if arguments.quick else list(known), arguments.quick)
        print(text)
        if not arguments.quick and "dense" in found:
            plot(found, OUT / "pareto.svg")
            (OUT / "tables.md").write_text(f"{text}\n\ntorch {torch.__version__}, {platform.machine()}, one thread a process.\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
