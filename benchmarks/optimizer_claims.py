"""The memory claims of the papers on optimizers, each recomputed as a plan at the shapes of LLaMA-2-7B and 70B.

    OMP_NUM_THREADS=1 python benchmarks/optimizer_claims.py [--models 7b 70b] [--only galore lisa ...] [--table-only]

Every row is the recipe's own step on fake tensors (graftwork.planning.simulate): bf16 weights, one micro-batch of 1 x TOKENS
tokens, all trained, one device, nothing offloaded. A row of this file is planned once; delete it from
benchmarks/results/optimizer_claims.json to plan it again, or name it with --only. The tables go to docs/optimizer-claims.md.
Nothing here was measured on a GPU: tensor bytes are exact for the step, `expected on CUDA` adds the planner's assumptions.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from graftwork.modeling.references import CONFIGS
from graftwork.planning.measure import GIB
from graftwork.planning.simulate import plan
from graftwork.recipe import load_recipe

HERE = Path(__file__).parent
OUT, PAGE = HERE / "results" / "optimizer_claims.json", HERE.parent / "docs" / "optimizer-claims.md"
MODELS = {"7b": ("LLaMA-2-7B", "config:llama-2-7b"), "70b": ("LLaMA-2-70B", "config:llama-2-70b")}
BF16 = {"state_dtype": "bfloat16"}
RANK = {"rank": 1024, "update_proj_gap": 500}
UNCLIPPED = {"train": {"max_grad_norm": 0}}
LORA = {"adapter": {"method": "lora", "r": 16, "target_modules": "all-linear"}}


def tuned(method: str, **options: Any) -> dict[str, Any]:
    return {"optimizer": {"method": method, **options}, **(UNCLIPPED if options.get("fused") else {})}


#: name -> (title, tokens, recipe sections)
ROWS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "adamw": ("AdamW, bf16 state", 256, tuned("adamw", **BF16)),
    "sgd": ("SGD without momentum", 256, tuned("sgd", momentum=0.0)),
    "galore": ("GaLore r=1024, bf16 state", 256, tuned("galore", **RANK, **BF16)),
    "galore8bit": ("8-bit GaLore r=1024, bf16 projection, fused", 256, tuned("galore", **RANK, **BF16, state="8bit", fused=True)),
    "q_galore": ("Q-GaLore r=1024, INT8 weights, fused", 256, {"storage": "int8", **tuned("q_galore", **RANK, fused=True)}),
    "apollo_mini": ("APOLLO-Mini, bf16 state", 256, tuned("apollo_mini", **BF16)),
    "adamw_fp32": ("AdamW, fp32 state", 400, tuned("adamw")),
    "mezo": ("MeZO", 400, {"estimator": "mezo"}),
    "lora": ("LoRA r=16, all linear", 512, LORA),
    "lisa": ("LISA, 2 layers at a time", 512, {**tuned("adamw"), "selection": [{"method": "lisa", "layers": 2}]}),
    "owlore": ("OwLore, 5 layers at a time, GaLore r=128", 512,
               {**tuned("galore", rank=128), "selection": [{"method": "owlore", "layers": 5, "mode": "decrease"}]}),
}


def recipe(model: str, name: str) -> dict[str, Any]:
    sections = dict(ROWS[name][2])
    return {"model": MODELS[model][1], "adapter": None, **sections,
            "train": {"batch_size": 1, "max_steps": 100, **sections.get("train", {})},
            "data": {"train": "from-the-shape.jsonl", "max_length": ROWS[name][1]}}


def planned(model: str, name: str) -> dict[str, Any]:
    document = recipe(model, name)
    start = time.process_time()
    made = plan(load_recipe(document), use_data=False, device="cuda", estimate_time=False)
    return {"model": model, "row": name, "tokens": ROWS[name][1], "trained": made.trained, "peak_bytes": made.peak_bytes,
            "categories": made.categories, "cuda_bytes": made.device["total_bytes"], "basis": made.device["basis"], "notes": made.notes,
            "cpu_seconds": round(time.process_time() - start, 1), "recipe": document}


# -- claims -----------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Claim:
    """rows: what is needed. judge: {row: plan} -> (our figure, does it hold). models: where the paper makes it."""

    paper: str
    says: str
    rows: tuple[str, ...]
    judge: Callable[[dict[str, dict[str, Any]]], tuple[str, bool]]
    models: tuple[str, ...] = ("7b", "70b")


def state(row: dict[str, Any]) -> int:
    return row["categories"]["optimizer_state"]


def saved(rows: dict[str, Any], name: str, least: float) -> tuple[str, bool]:
    """Optimizer state against AdamW's; holds when at most two points of the claim are missing."""
    share = 1 - state(rows[name]) / state(rows["adamw"])
    return f"-{share:.1%} ({state(rows[name]) / GIB:.2f} of {state(rows['adamw']) / GIB:.2f} GiB)", share >= least - 0.02


def fits(rows: dict[str, Any], name: str, gib: float) -> tuple[str, bool]:
    row = rows[name]
    return f"{row['peak_bytes'] / GIB:.2f} GiB of tensors, {row['cuda_bytes'] / GIB:.2f} expected", row["cuda_bytes"] <= gib * GIB


def like(rows: dict[str, Any], name: str, other: str, most: float) -> tuple[str, bool]:
    ratio = rows[name]["peak_bytes"] / rows[other]["peak_bytes"]
    return f"{ratio:.2f}x ({rows[name]['peak_bytes'] / GIB:.2f} against {rows[other]['peak_bytes'] / GIB:.2f} GiB)", ratio <= most


def over_weights(rows: dict[str, Any], name: str, most: float) -> tuple[str, bool]:
    row = rows[name]
    ratio = row["peak_bytes"] / row["categories"]["weights"]
    return f"{ratio:.3f}x the weights ({(row['peak_bytes'] - row['categories']['weights']) / GIB:.2f} GiB beside them)", ratio <= most


def like_sgd(rows: dict[str, Any]) -> tuple[str, bool]:
    extra = state(rows["apollo_mini"]) - 2 * 2 * _unprojected(rows["apollo_mini"])
    return (f"{state(rows['apollo_mini']) / GIB:.2f} GiB, of which {extra / GIB:.4f} for the projected matrices; AdamW has "
            f"{state(rows['adamw']) / GIB:.2f}", extra <= 0.001 * state(rows["adamw"]))


def _unprojected(row: dict[str, Any]) -> int:
    """Parameters that a projecting optimizer leaves to Adam: embedding, head and norms."""
    config = json.loads((CONFIGS / f"{MODELS[row['model']][1].removeprefix('config:')}.json").read_text())
    h = config["hidden_size"]
    return 2 * config["vocab_size"] * h + (2 * config["num_hidden_layers"] + 1) * h


CLAIMS = (
    Claim("GaLore (2403.03507)", "65.5 % less optimizer state than AdamW", ("galore", "adamw"), lambda r: saved(r, "galore", 0.655)),
    Claim("8-bit GaLore (2403.03507)", "82.5 % less optimizer state than AdamW in bf16", ("galore8bit", "adamw"),
          lambda r: saved(r, "galore8bit", 0.825)),
    Claim("8-bit GaLore (2403.03507)", "pre-trains 7B within 24 GB (256 tokens, an update a layer)", ("galore8bit",),
          lambda r: fits(r, "galore8bit", 24), ("7b",)),
    Claim("Q-GaLore (2407.08296)", "pre-trains 7B within 16 GB", ("q_galore",), lambda r: fits(r, "q_galore", 16), ("7b",)),
    Claim("APOLLO-Mini (2412.05270)", "optimizer memory of SGD", ("apollo_mini", "adamw"), like_sgd),
    Claim("MeZO (2305.17333)", "memory of inference", ("mezo",), lambda r: over_weights(r, "mezo", 1.05)),
    Claim("MeZO (2305.17333)", "up to 12x less than fine-tuning with Adam", ("mezo", "adamw_fp32"),
          lambda r: (lambda x: (f"{x:.1f}x less", x >= 10))(r["adamw_fp32"]["peak_bytes"] / r["mezo"]["peak_bytes"])),
    Claim("LISA (2403.17919)", "memory as low as LoRA's", ("lisa", "lora"), lambda r: like(r, "lisa", "lora", 1.05)),
    Claim("OwLore (2405.18380)", "7B within 21 GB (5 layers, rank 128)", ("owlore",), lambda r: fits(r, "owlore", 21), ("7b",)),
    Claim("OwLore (2405.18380)", "memory like LoRA's", ("owlore", "lora"), lambda r: like(r, "owlore", "lora", 1.05)),
)


def page(result: dict[str, Any]) -> str:
    rows = {(r["model"], r["row"]): r for r in result["rows"]}
    lines = ["# Memory claims of the papers on optimizers, recomputed", "",
             "Written by `python benchmarks/optimizer_claims.py`; the raw figures with every recipe are in "
             "`benchmarks/results/optimizer_claims.json`. Plans from shapes, bf16 weights, one sequence; **nothing here was measured on a "
             "GPU**. A claim about state holds within two points, one about a card when the expected use on CUDA (tensors, allocator, "
             "5 % reserve, context) is within it, one of likeness within 5 %, `up to 12x` from 10x. The recipes at "
             "70B are those at 7B: rank 1024 is there an eighth of the width instead of a quarter.", "",
             "| paper | claim | model | our figure | verdict |", "|---|---|---|---|---|"]
    for claim in CLAIMS:
        for model in claim.models:
            own = {name: rows[model, name] for name in claim.rows if (model, name) in rows}
            if len(own) == len(claim.rows):
                figure, holds = claim.judge(own)
                lines.append(f"| {claim.paper} | {claim.says} | {MODELS[model][0]} | {figure} | {'holds' if holds else 'does not hold'} |")
    for model, (title, _) in MODELS.items():
        lines += ["", f"## {title}", "", "| recipe | tokens | trained | weights | gradients | optimizer state | activations and logits | "
                  "**tensors at peak** | expected on CUDA |", "|---|--:|--:|--:|--:|--:|--:|--:|--:|"]
        for name, (label, tokens, _) in ROWS.items():
            if (model, name) in rows:
                r = rows[model, name]
                c = r["categories"]
                sizes = [c["weights"] + c["adapters"], c["gradients"], c["optimizer_state"], c["activations"] + c["logits"] + c["other"]]
                lines.append(f"| {label} | {tokens} | {r['trained'] / 1e6:,.0f} M | " + " | ".join(f"{s / GIB:.2f}" for s in sizes)
                             + f" | **{r['peak_bytes'] / GIB:.2f}** | {r['cuda_bytes'] / GIB:.2f} |")
    return "\n".join([*lines, "", "GiB (2^30 bytes).", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--only", nargs="+", choices=list(ROWS))
    parser.add_argument("--table-only", action="store_true", help="write the page from the raw results")
    options = parser.parse_args()
    result = json.loads(OUT.read_text()) if OUT.exists() else {"rows": []}
    for model in options.models if not options.table_only else []:
        for name in options.only or ROWS:
            known = [r for r in result["rows"] if (r["model"], r["row"]) == (model, name)]
            if known and not options.only:
                continue
            made = planned(model, name)
            rows = [r for r in result["rows"] if r not in known] + [made]
            order = {key: i for i, key in enumerate((m, n) for m in MODELS for n in ROWS)}
            result = {"command": "python benchmarks/optimizer_claims.py", "torch": torch.__version__, "machine": platform.machine(),
                      "rows": sorted(rows, key=lambda r: order[r["model"], r["row"]])}
            OUT.write_text(json.dumps(result, indent=1) + "\n")
            size = f"{made['peak_bytes'] / GIB:9.2f} GiB"
            print(f"{MODELS[model][0]:<12} {ROWS[name][0]:<44} {size} {made['cpu_seconds']:6.1f} s", flush=True)
            gc.collect()
    PAGE.write_text(page(result))


if __name__ == "__main__":
    main()
