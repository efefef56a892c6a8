"""The server: decode with many adapters, the bare engine, thousands of adapters, ablations, overload, latency.

    OMP_NUM_THREADS=1 python benchmarks/serving.py [decode bare many ablations pools overload] [--quick] [--dtype fp32]

Without names all parts are run. Each part is written to benchmarks/results/serving-DTYPE.json when it is through, and not run again
with the same settings unless --again is given. --quick: fewer steps and requests. bf16 is for machines with instructions for it.
See docs/serving-benchmarks.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from serving_common import TARGETS, Results, load
from serving_decode import bare, decode
from serving_many import ablations, many
from serving_virtual import overload, pools

from graftwork.modeling.arithmetic import slow_on_cpu

PARTS = {"decode": decode, "bare": bare, "many": many, "ablations": ablations, "pools": pools, "overload": overload}
QUICK = {"steps": 5, "bare_rows": [32], "requests": 16, "counts": [1, 2000]}
FULL = {"steps": 16, "bare_rows": [1, 8, 32, 64], "requests": 192, "counts": [1, 8, 32, 100, 500, 2000]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), metavar="part", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--again", action="store_true", help="run parts that are in the file already")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS), help="of the part decode")
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 8, 32])
    for name, value in FULL.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, nargs="+" if isinstance(value, list) else None)
    options = parser.parse_args()
    for name, value in (QUICK if options.quick else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"there is no part {', '.join(sorted(unknown))}; parts: {', '.join(PARTS)}")
    if options.dtype == "bf16" and slow_on_cpu(torch.bfloat16):
        parser.error("this processor has no bf16 instructions: its bf16 products are converted to fp32; use --dtype fp32")
    results = Results(Path(__file__).parent / "results" / f"serving-{options.dtype}{'-quick' if options.quick else ''}.json", options)
    model, tokenizer = load(options)
    for name in options.parts:
        PARTS[name](options, results, model, tokenizer)
    print(f"\nwritten to {results.path.name}")


if __name__ == "__main__":
    main()
