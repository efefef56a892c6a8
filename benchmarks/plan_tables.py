"""What tuning LLaMA-2-7B and 70B needs, method by method: plans from shapes alone, no weight, tokenizer or data is read.

    OMP_NUM_THREADS=1 python benchmarks/plan_tables.py [--models 7b 70b] [--only lora qlora ...] [--table-only]

One micro-batch of 1 x 2048 tokens, all trained, bf16 (learned tensors of adapters in fp32; full tuning: bf16 weights, fp32
state). Each row is the recipe's own step, run twice on fake tensors (graftwork.planning.simulate). The shapes are in
src/graftwork/modeling/configs/, each with its source. Rows are added to benchmarks/results/plan_tables.json one by one, and the whole
table is written to docs/plan-tables.md; a row that is there already is replaced. Not measured on a GPU.
"""

import argparse
import gc
import json
import platform
import time
from pathlib import Path

import torch

from graftwork.planning.measure import GIB
from graftwork.planning.simulate import plan
from graftwork.recipe import load_recipe

HERE = Path(__file__).parent
ROOT = HERE.parent
OUT, PAGE = HERE / "results" / "plan_tables.json", ROOT / "docs" / "plan-tables.md"
MODELS = {"7b": ("LLaMA-2-7B", "config:llama-2-7b"), "70b": ("LLaMA-2-70B", "config:llama-2-70b")}
LORA = {"method": "lora", "r": 16, "target_modules": "all-linear"}
FULL = {"adapter": None}
EXACT = "exact"
#: name -> (title, recipe sections, what the figure is, with activation checkpointing too)
METHODS = {
    "adamw": ("AdamW, full tuning", {**FULL, "optimizer": "adamw"}, EXACT, True),
    "galore": ("GaLore r=128, fused, full tuning",
               {**FULL, "optimizer": {"method": "galore", "rank": 128, "fused": True}, "train": {"max_grad_norm": 0}}, EXACT, True),
    "lisa": ("LISA, 2 layers at a time, AdamW", {**FULL, "optimizer": "adamw", "selection": [{"method": "lisa", "layers": 2}]},
             "one draw of layers", True),
    "lora": ("LoRA r=16, all linear", {"adapter": LORA}, EXACT, True),
    "qlora": ("QLoRA r=16: NF4, double quantization", {"storage": {"method": "nf4", "double_quant": True}, "adapter": LORA}, EXACT, True),
    "nola": ("NOLA r=16, 64 + 64 numbers a site", {"adapter": {**LORA, "method": "nola", "n_basis": 64}}, EXACT, True),
    "mos": ("MoS r=16", {"adapter": {**LORA, "method": "mos"}}, EXACT, True),
    "mixed": ("LoRA r=16 on a format for every matrix, 3.5 bits", {"storage": "mixed", "adapter": LORA}, "one allocation", True),
    "mezo": ("MeZO, full tuning", {**FULL, "estimator": "mezo"}, EXACT, False),
}
COLUMNS = ("weights", "adapters", "gradients", "optimizer_state", "activations", "logits", "other")


def recipe(model: str, method: str, checkpointing: bool) -> dict:
    """The recipe of one row."""
    sections = dict(METHODS[method][1])
    train = {"batch_size": 1, "max_steps": 100, "gradient_checkpointing": checkpointing, **sections.pop("train", {})}
    return {"model": MODELS[model][1], **sections, "train": train,
            "data": {"train": "from-the-shape.jsonl", "max_length": 2048}}


def row(model: str, method: str, checkpointing: bool) -> dict:
    """The plan of one recipe with the time that it took."""
    document = recipe(model, method, checkpointing)
    start, cpu = time.perf_counter(), time.process_time()
    made = plan(load_recipe(document), use_data=False, device="cuda", estimate_time=False)
    took = {"seconds": round(time.perf_counter() - start, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
    bound = [note for note in made.notes if note.startswith("upper bound")]
    return {"model": model, "method": method, "checkpointing": checkpointing, "figure": "upper bound" if bound else METHODS[method][2],
            "peak_bytes": made.peak_bytes, "categories": made.categories, "cuda": made.device, "trained": made.trained,
            "flops_per_step": made.flops, "notes": made.notes, **took, "recipe": document}


def key(each: dict) -> tuple:
    return list(MODELS).index(each["model"]), list(METHODS).index(each["method"]), each["checkpointing"]


def table(rows: list[dict], model: str) -> list[str]:
    """Markdown of one model."""
    lines = [f"## {MODELS[model][0]}", "",
             "| method | activation checkpointing | trained | " + " | ".join(c.replace("_", " ") for c in COLUMNS)
             + " | **tensors at peak** | expected on CUDA | figure | planned in |",
             "|---|---|--:|" + "--:|" * (len(COLUMNS) + 2) + "---|--:|"]
    for each in rows:
        if each["model"] == model:
            sizes = " | ".join(f"{each['categories'][c] / GIB:.2f}" for c in COLUMNS)
            name, checkpointed = METHODS[each["method"]][0], "yes" if each["checkpointing"] else "no"
            lines.append(f"| {name} | {checkpointed} | {millions(each['trained'])} | {sizes} | **{each['peak_bytes'] / GIB:.2f}** | "
                         f"{each['cuda']['total_bytes'] / GIB:.2f} | {each['figure']} | {each['cpu_seconds']:.0f} s |")
    return lines


def millions(n: int) -> str:
    return f"{n / 1e6:,.2f} M" if n < 1e8 else f"{n / 1e6:,.0f} M"


def page(result: dict) -> str:
    rows = result["rows"]
    cuda = rows[0]["cuda"]
    lines = ["# What tuning LLaMA-2 needs: plans from shapes", "",
             "Written by `python benchmarks/plan_tables.py`; raw figures with every recipe in `benchmarks/results/plan_tables.json`.", "",
             "GiB (2^30 bytes) by category at the peak of a step, batch 1 x 2048 tokens, bf16, one device, no offloading. "
             "**Not measured on a GPU.** Tensor bytes come from the recipe's own training step on fake tensors; the column "
             "`expected on CUDA` adds what a device is assumed to need beside them:", "", f"> {cuda['basis']}.", "",
             "`planned in` is the processor time of the plan on the machine that wrote this page (one thread). `figure` says what the "
             "tensor bytes are: *exact* for the shapes of this step; *one draw of layers*: which layers LISA draws moves the peak by the "
             "gradients of the drawn layers at most (0.75 GiB for 7B, 3.2 GiB for 70B), this is the draw of seed 0; *one allocation*: "
             "formats are chosen by errors, which no shape tells, so that they fill the budget. Not in the figures: "
             "scratch memory inside one operation, such as that of GaLore's SVD or of attention kernels.", ""]
    for model in dict.fromkeys(each["model"] for each in rows):
        lines += [*table(rows, model), ""]
    lines += ["## One row by hand", "", "```bash",
              "graft plan examples/recipes/qlora.yaml model=config:llama-2-70b train.batch_size=1 \\",
              "    data.max_length=2048 --no-data --device cuda", "```", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--only", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--table-only", action="store_true", help="write the page from the raw results")
    options = parser.parse_args()
    result = json.loads(OUT.read_text()) if OUT.exists() else {"rows": []}
    for model in options.models if not options.table_only else []:
        for method in options.only:
            for checkpointing in (False, True) if METHODS[method][3] else (False,):
                made = row(model, method, checkpointing)
                rows = [each for each in result["rows"] if key(each) != key(made)]
                result = {"command": "python benchmarks/plan_tables.py", "torch": torch.__version__, "machine": platform.machine(),
                          "rows": sorted([*rows, made], key=key)}
                OUT.parent.mkdir(exist_ok=True)
                OUT.write_text(json.dumps(result, indent=1) + "\n")
                print(f"{MODELS[model][0]:<12} {METHODS[method][0]:<40} {'checkpointed' if checkpointing else '':<13}"
                      f"{made['peak_bytes'] / GIB:9.2f} GiB {made['cpu_seconds']:7.1f} s of processor time", flush=True)
                gc.collect()
    PAGE.write_text(page(result))
    print(f"not measured on a GPU; table in {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
