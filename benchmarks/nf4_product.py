"""NF4 forward and backward against bitsandbytes' Linear4bit: `python benchmarks/nf4_product.py`.

The seven block matrices of SmolLM2-135M (and through them its 30 layers, 106 M weights), double quantization, block 64, bf16.
Pairs are interleaved (ours, theirs, ours, ...); a ratio is the median of the ratios of neighbours, above 1 when ours is
faster. Both must return the same D(W) bit for bit before anything is timed. Writes benchmarks/results/nf4_product.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from graftwork.storage.base import product_dtype
from graftwork.storage.nf4 import NF4, NF4Storage, _vector_code

LAYERS = 30
SHAPES = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576), "gate": (1536, 576), "up": (1536, 576),
          "down": (576, 1536)}
ROWS = (1, 8, 32, 400)


def interleaved(first, second, repeats: int) -> dict[str, float]:
    """Medians in milliseconds of two callables, and the median ratio second / first of neighbouring runs."""
    first(), second()
    times = []
    for _ in range(repeats):
        pair = []
        for call in (first, second):
            start = time.perf_counter()
            call()
            pair.append((time.perf_counter() - start) * 1e3)
        times.append(pair)
    ours, theirs = zip(*times)
    return {"ours_ms": round(statistics.median(ours), 3), "bitsandbytes_ms": round(statistics.median(theirs), 3),
            "ours_best_ms": round(min(ours), 3), "bitsandbytes_best_ms": round(min(theirs), 3),
            "ratio": round(statistics.median(t / o for o, t in times), 3)}


def forward(modules: list, x: dict[int, torch.Tensor]) -> None:
    for module in modules:
        module(x[module.in_features])


def step(modules: list, x: dict[int, torch.Tensor]) -> None:
    for module in modules:
        y = module(x[module.in_features])
        torch.autograd.grad(y, x[module.in_features], torch.ones_like(y))


def measure(repeats: int, dtype: torch.dtype) -> dict:
    import bitsandbytes as bnb
    from bitsandbytes import functional

    generator = torch.Generator().manual_seed(0)
    ours, theirs, raw, dense = [], [], [], []
    for shape in SHAPES.values():
        weight = (torch.randn(shape, generator=generator) * 0.02).to(dtype)
        ours.append(NF4Storage.from_weight(weight, NF4()))
        raw.append(functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True))
        linear = bnb.nn.Linear4bit(shape[1], shape[0], bias=False, compute_dtype=dtype, quant_type="nf4")
        linear.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4", blocksize=64)
        theirs.append(linear.to("cpu").train())  # in eval mode it would re-pack its weight where AVX512-BF16 exists
        dense.append(ours[-1].dequantize())
        assert torch.equal(dense[-1], functional.dequantize_4bit(*raw[-1]))
    plain = [NF4Storage.from_weight(d, NF4(compute="pytorch")) for d in dense]
    result = {"dequantize in PyTorch alone": interleaved(lambda: [m.dequantize() for m in plain],
                                                         lambda: [functional.dequantize_4bit(*r) for r in raw], repeats),
              "dequantize": interleaved(lambda: [m.dequantize() for m in ours],
                                        lambda: [functional.dequantize_4bit(*r) for r in raw], repeats)}
    for rows in ROWS:
        x = {n: torch.randn(rows, n, generator=generator).to(dtype) for n in (576, 1536)}
        with torch.no_grad():
            result[f"forward, {rows} rows"] = interleaved(partial(forward, ours, x), partial(forward, theirs, x), repeats)
        leaf = {n: t.clone().requires_grad_() for n, t in x.items()}
        result[f"forward and backward, {rows} rows"] = interleaved(partial(step, ours, leaf), partial(step, theirs, leaf),
                                                                   max(3, repeats // 3))
    x = {n: torch.randn(400, n, generator=generator).to(dtype) for n in (576, 1536)}
    times = []
    for _ in range(3):
        start = time.perf_counter()
        for weight in dense:
            F.linear(x[weight.shape[1]], weight)
        times.append((time.perf_counter() - start) * 1e3)
    result["dense product alone, 400 rows"] = {"ms": round(statistics.median(times), 3)}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "nf4_product.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    import bitsandbytes

    machine = {"cpu": platform.processor() or platform.machine(), "capability": torch.backends.cpu.get_cpu_capability(),
               "threads": options.threads, "torch": torch.__version__, "bitsandbytes": bitsandbytes.__version__,
               "load_average": os.getloadavg()}
    report = {"machine": machine,
              "chosen": {"dequantize": "bitsandbytes, " + ("bf16" if _vector_code() else "fp32 rounded by PyTorch"),
                         "product of bf16 inputs": str(product_dtype(torch.empty(0, dtype=torch.bfloat16)))},
              "matrices": SHAPES, "scale_to_the_model": f"times {LAYERS} layers",
              "bits_per_weight": NF4Storage.from_weight(torch.ones(1536, 576), NF4()).bits_per_weight,
              "results": {str(dtype): measure(options.repeats, dtype) for dtype in (torch.bfloat16, torch.float32)}}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    for dtype, rows in report["results"].items():
        for what, values in rows.items():
            print(dtype, what, values)


if __name__ == "__main__":
    main()
