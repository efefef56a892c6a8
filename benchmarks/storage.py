"""Formats and calibrations of weights: perplexity, bits, time to quantise, speed of decoding, and zero-shot answers of the best.

    GRAFTWORK_DATA=... python benchmarks/storage.py [--quick] [--only int4 spqr ...] [--share 1/2] [--minutes 150] [--table]

SmolLM2-135M-Instruct, all linear maps of its blocks. Calibration: 24 rows of 512 tokens of `lm/c4_sample` (calibration split).
Perplexity: 16,384 tokens each of `lm/wikitext2_raw` (test) and of `lm/c4_sample` (test), in windows of 512. Decoding: one token through
the model, interleaved with the dense model in fp32 (median of the ratios of neighbours). Zero-shot, for what is on the Pareto front
of bits and perplexity: 50 items each of piqa, arc_easy, openbookqa and winogrande, by the likelihood of the answers.

The model's file was once coded in 4 bits with groups of 32, so no format here uses 4 bits at that size. Every cell is a file under
results/storage/; a cell that is there is not run again. --quick: dense, int4 and int2 by rtn and gptq, a sixteenth of the text.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import math
import platform
import random
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matrix import cell
from rows import data_folder, read_rows

import graftwork
from graftwork.data.calibration import calibration_rows
from graftwork.registry import make_config
from graftwork.storage import apply_storage, storage_bits

OUT = Path(__file__).parent / "results" / "storage"
BASE = "smollm2-135m-instruct"
WINDOW, TOKENS, ROWS, ITEMS = 512, 16_384, 24, 50
CALIBRATIONS: dict[str, dict[str, Any]] = {
    "rtn": {}, "gptq": {}, "gptq, act order": {"method": "gptq", "act_order": True}, "awq": {}, "hqq": {}, "adaquant": {}}
QUICK = ("dense", "int4, rtn", "int4, gptq", "int2, rtn", "int2, gptq")


def configurations() -> dict[str, dict[str, Any]]:
    """{label: storage section}, from many bits to few."""
    found: dict[str, dict[str, Any]] = {"dense": {"method": "dense"}, "int8": {"method": "int8"}, "fp8, e4m3": {"method": "fp8"},
                                        "fp8, e5m2": {"method": "fp8", "format": "e5m2"}, "nf4": {"method": "nf4"}}
    for bits in (4, 3, 2):
        for label, own in CALIBRATIONS.items():
            extra = {"zero_point": "float"} if label == "hqq" else {}
            found[f"int{bits}, {label}"] = {"method": f"int{bits}", "calibration": {"method": label, **own}, **extra}
    for calibration in ("rtn", "gptq", "awq"):
        found[f"fp4, {calibration}"] = {"method": "fp4", "calibration": calibration}
        for bits in (4, 3):
            found[f"bitmod{bits}, {calibration}"] = {"method": "bitmod", "bits": bits, "group_size": 64, "calibration": calibration}
    for constraint in ("m1", "m2"):
        found[f"fp4, zeroquant_fp {constraint}"] = {"method": "fp4", "calibration": {"method": "zeroquant_fp", "constraint": constraint}}
    found["olive"] = {"method": "olive"}
    for bits in (4, 3, 2):
        found[f"spqr{bits}"] = {"method": "spqr", "bits": bits}
        found[f"codebook{bits}"] = {"method": "codebook", "bits": bits}
        found[f"codebook{bits}, weighted"] = {"method": "codebook", "bits": bits, "weighted": True}
    for bits in (3, 2):
        found[f"codebook{bits}, edkm"] = {"method": "codebook", "bits": bits, "fit": "edkm"}
        found[f"codebook{bits}, jlcm"] = {"method": "codebook", "bits": bits, "fit": "jlcm"}
    for base in (4, 3, 2):
        kept = {"method": f"int{base}"}
        for init in ("lq_lora", "lorc", "svdquant"):
            found[f"lowrank_plus{base}, {init}"] = {"method": "lowrank_plus", "base": kept, "init": init}
        found[f"nf{base}, groups"] = {"method": "nf", "bits": base}
    for wide in (4, 3):
        found[f"mixllm{wide}"] = {"method": "mixllm", "bits": wide}
    for kind in ("q8_0", "q6_k", "q5_k", "q4_k", "q3_k", "q2_k"):
        found[f"gguf {kind}"] = {"method": "gguf", "type": kind}
    found["vptq, 2 bits"] = {"method": "vptq"}
    found["vptq, 2 + 2 bits"] = {"method": "vptq", "residual_bits": 8}
    return found


class Bench:
    """The base, its texts as token windows, and the items of the four tasks."""

    def __init__(self, share: float = 1.0):
        self.dense, self.tokenizer = graftwork.load(BASE, dtype="fp32")
        root, count = data_folder(), int(TOKENS * share) // WINDOW
        with gzip.open(root / "lm/wikitext2_raw/test.txt.gz", "rt", encoding="utf-8") as file:
            wiki = file.read()
        web = "\n\n".join(row["text"] for row in read_rows(root / "lm/c4_sample/test.jsonl.gz"))
        self.texts = {name: self._windows(text, count) for name, text in (("wikitext2", wiki), ("c4", web))}
        rows = [row["text"] for row in read_rows(root / "lm/c4_sample/calibration.jsonl.gz")]
        self.calibration = calibration_rows(rows, self.tokenizer, samples=max(2, int(ROWS * share)), length=WINDOW)
        self.items = {task: self._items(root / f"commonsense/{task}/test.jsonl.gz", read) for task, read in READERS.items()}

    def _windows(self, text: str, count: int) -> torch.Tensor:
        ids = self.tokenizer(text[: 12 * WINDOW * count], add_special_tokens=False)["input_ids"][: WINDOW * count]
        return torch.tensor(ids).view(-1, WINDOW)

    def _items(self, path: Path, read: Any) -> list[tuple[list[tuple[str, str]], int]]:
        rows = [item for row in read_rows(path) if (item := read(row))]
        random.Random(0).shuffle(rows)
        return rows[:ITEMS]

    def stored(self, section: dict[str, Any]) -> torch.nn.Module:
        model, options = copy.deepcopy(self.dense), dict(section)
        apply_storage(model, make_config("storage", options.pop("method"), **options), batches=self.calibration.batches, notes=[])
        return model

    def quality(self, section: dict[str, Any]) -> dict[str, Any]:
        start = time.perf_counter()
        model = self.stored(section)
        seconds = time.perf_counter() - start
        return {"section": section, "bits": storage_bits(model) or 32.0, "seconds": seconds,
                "perplexity": {name: perplexity(model, ids) for name, ids in self.texts.items()}, "decode": decode_ratio(model, self.dense)}

    def answers(self, section: dict[str, Any]) -> dict[str, Any]:
        model = self.stored(section)
        return {task: [self._right(model, *item) for item in items] for task, items in self.items.items()}

    @torch.no_grad()
    def _right(self, model: torch.nn.Module, choices: list[tuple[str, str]], answer: int) -> int:
        scores = []
        for context, text in choices:
            before = len(self.tokenizer(context, add_special_tokens=False)["input_ids"])
            ids = torch.tensor([self.tokenizer(context + text, add_special_tokens=False)["input_ids"]])
            loss = F.cross_entropy(model(input_ids=ids).logits[0, before - 1: -1].float(), ids[0, before:], reduction="sum")
            scores.append(-float(loss) / len(text))
        return int(max(range(len(scores)), key=scores.__getitem__) == answer)


def _lettered(row: dict[str, Any], word: str) -> tuple[list[tuple[str, str]], int] | None:
    question, *options = re.split(rf"\s*{word}\d:\s*", row["instruction"].split("Answer format:")[0].strip())
    question, number = question.split("question:", 1)[-1].strip(), re.search(r"\d+", row["answer"])
    if len(options) < 2 or not number:
        return None
    return [(f"Question: {question}\nAnswer:", f" {option.strip()}") for option in options], int(number.group()) - 1


def _winogrande(row: dict[str, Any]) -> tuple[list[tuple[str, str]], int] | None:
    sentence, *options = re.split(r"\s*Option\d:\s*", row["instruction"].split("Answer format:")[0].strip())
    sentence, number = sentence.split("sentence:", 1)[-1].strip(), re.search(r"\d+", row["answer"])
    before, gap, after = sentence.partition("_")
    if len(options) != 2 or not number or not gap or not after.strip() or not before.strip():
        return None
    return [(f"{before}{option.strip()}", after) for option in options], int(number.group()) - 1


READERS = {"piqa": lambda row: _lettered(row, "Solution"), "arc_easy": lambda row: _lettered(row, "Answer"),
           "openbookqa": lambda row: _lettered(row, "Answer"), "winogrande": _winogrande}


@torch.no_grad()
def perplexity(model: torch.nn.Module, windows: torch.Tensor) -> float:
    """exp of the mean negative log-likelihood of all tokens but the first of each window."""
    total = 0.0
    for ids in windows.split(2):
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
        total += float(F.cross_entropy(model.lm_head(hidden).float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
    return math.exp(min(total / windows[:, 1:].numel(), 50.0))


@torch.no_grad()
def decode_ratio(model: torch.nn.Module, dense: torch.nn.Module, rounds: int = 9) -> float:
    """Time of one token through the dense model over that through this one: above 1 when the codes are faster."""
    ids, ratios = torch.tensor([[5]]), []
    for _ in range(rounds):
        times = []
        for each in (dense, model):
            start = time.perf_counter()
            each(input_ids=ids)
            times.append(time.perf_counter() - start)
        ratios.append(times[0] / times[1])
    return statistics.median(ratios[2:])


def slug(label: str) -> str:
    return label.replace(", ", "-").replace(" + ", "+").replace(" ", "_")


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


def table(found: dict[str, dict[str, Any]]) -> str:
    if "dense" not in found:
        return ""
    base, best = found["dense"], set(front(found))
    lines = ["| storage, calibration | bits a weight | WikiText-2 | C4 | log-ppl above dense | seconds | decode, x dense fp32 | "
             "zero-shot, % |", "|---|--:|--:|--:|--:|--:|--:|--:|"]
    for label, entry in sorted(found.items(), key=lambda item: (-item[1]["bits"], mean_log(item[1]))):
        name = f"**{label}**" if label in best else label
        answers = entry["answers"] and [x for rows in entry["answers"].values() for x in rows]
        lines.append(f"| {name} | {entry['bits']:.3f} | {entry['perplexity']['wikitext2']:.2f} | {entry['perplexity']['c4']:.2f} | "
                     f"{mean_log(entry) - mean_log(base):+.3f} | {entry['seconds']:.0f} | {entry['decode']:.2f} | "
                     f"{f'{100 * statistics.mean(answers):.1f}' if answers else ''} |")
    return "\n".join([*lines, "", "Bold: on the Pareto front of bits and mean log-perplexity."])


def plot(found: dict[str, dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(11, 7))
    best = set(front(found))
    for label, entry in found.items():
        above = max(mean_log(entry) - mean_log(found["dense"]), 1e-4)
        axis.plot(entry["bits"], above, "o", color="tab:red" if label in best else "tab:blue")
        axis.annotate(label, (entry["bits"], above), fontsize=7, xytext=(4, 2), textcoords="offset points")
    axis.set_xlim(1.5, 9.5)
    axis.set_yscale("log")
    axis.set_xlabel("bits a weight, all metadata included")
    axis.set_ylabel("mean log-perplexity above the dense model's")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", help="labels, or beginnings of them")
    parser.add_argument("--share", default="1/1", help="i/n: every n-th configuration from the i-th")
    parser.add_argument("--minutes", type=float, default=150)
    parser.add_argument("--table", action="store_true", help="the table of the cells that exist, run nothing")
    arguments = parser.parse_args()
    part, parts = map(int, arguments.share.split("/"))
    end, known = time.monotonic() + 60 * arguments.minutes, configurations()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) if arguments.quick else OUT
        wanted = [x for x in known if any(x.startswith(each) for each in arguments.only)] if arguments.only else list(known)
        wanted = list(QUICK) if arguments.quick else wanted
        if not arguments.table:
            bench = Bench(1 / 16 if arguments.quick else 1.0)
            for kind, make in (("quality", bench.quality), ("answers", bench.answers)):
                labels = wanted if kind == "quality" else front(read(out, wanted))
                for label in labels[part - 1::parts]:
                    if time.monotonic() > end:
                        print("the minutes are over; the same command goes on from here", file=sys.stderr)
                        break
                    found = cell(out / slug(label) / f"{kind}.json", make, known[label])
                    if kind == "quality":
                        print(f"{label:>24}: {found['bits']:.3f} bits, {found['perplexity']}, {found['seconds']:.0f} s",
                              file=sys.stderr, flush=True)
        found = read(out, list(known))
        text = table(found)
        print(text)
        if not arguments.quick and "dense" in found:
            plot(found, OUT / "pareto.svg")
            (OUT / "tables.md").write_text(f"{text}\n\ntorch {torch.__version__}, {platform.machine()}, one thread a process.\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
