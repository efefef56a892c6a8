"""Products by packed weights against public ones of the same kind: `OMP_NUM_THREADS=1 python benchmarks/packed_product.py`.

    nf4 and fp4         bitsandbytes' Linear4bit, block 64 (nf4 also forward and backward)
    int8, a scale a row torchao's Int8WeightOnlyConfig as it comes, which has one scale a row; our default of 256 beside it
    int8, groups of ... torchao's Int8WeightOnlyConfig with PerGroup(256), our default, and PerGroup(64)
    int4, groups of 64  torchao's Int4OpaqueTensor (PyTorch's _weight_int4pack_mm_for_cpu): asymmetric, with float zero points
    int8, kernel        torch._weight_int8pack_mm, one scale a row: what torch.compile makes of torchao's module (bf16 is its fast type)

Ours and the peer of a family take turns, in another order every time (whoever comes after a product of another size finds a colder
cache); a ratio is the median of peer / ours in the same turn, above 1 when ours is faster. Where the memory of a process lies shifts a
ratio by more than its turns scatter, so each is measured in several processes (--runs): given is their median, and their range. One
thread is timed by processor time, so a busy machine does less harm; several threads by the wall clock. Before nf4 is timed, both must
return the same D(W), bit for bit; all products must be as near the dense one as 4 bits allow.

torchao wants an environment of its own (`make test-ao` makes .venv-ao; `pip install bitsandbytes` into it for all families in one run).
A peer that is not installed is skipped and named. Cells that are in the file already are kept, so that parts can be measured one by one,
unless --again is given. Writes benchmarks/results/packed_product.json (packed_product-2-threads.json with --threads 2, ...-quick.json with
--quick).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from graftwork.registry import make_config
from graftwork.storage.base import Storage, make_storage

RESULTS = Path(__file__).parent / "results"
SHAPES = ((576, 1536), (2048, 2048), (4096, 4096))
ROWS = (1, 8, 128)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
#: {family: (its peer's package, {ours: (storage, options)})}; group_size 0 stands for a row
FAMILIES = {
    "nf4": ("bitsandbytes", {"nf4": ("nf4", {})}),
    "nf4 forward and backward": ("bitsandbytes", {"nf4": ("nf4", {})}),
    "fp4": ("bitsandbytes", {"fp4, book bnb": ("fp4", {"book": "bnb"}), "fp4": ("fp4", {})}),
    "int8, a scale a row": ("torchao", {"int8, a row": ("int8", {"group_size": 0}), "int8, 256": ("int8", {})}),
    "int8, groups of 256": ("torchao", {"int8, 256": ("int8", {})}),
    "int8, groups of 64": ("torchao", {"int8, 64": ("int8", {"group_size": 64})}),
    "int4, groups of 64": ("torchao", {"int4": ("int4", {}), "int4, symmetric": ("int4", {"symmetric": True}),
                                       "int4, float zero": ("int4", {"zero_point": "float"})}),
    "int8, kernel": ("torch", {"int8, a row": ("int8", {"group_size": 0})}),
}
Call = Callable[[torch.Tensor], torch.Tensor]


def installed() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in ("torch", "bitsandbytes", "torchao"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def ours(weight: torch.Tensor, method: str, options: dict) -> Storage:
    options = {key: value or weight.shape[1] for key, value in options.items()}
    return make_storage(weight, method, make_config("storage", method, **options))


def peer(family: str, weight: torch.Tensor) -> Call:
    """The public product of a family by this weight (out, in)."""
    dtype, (out, columns) = weight.dtype, weight.shape
    linear = torch.nn.Linear(columns, out, bias=False, dtype=dtype)
    if FAMILIES[family][0] == "bitsandbytes":
        import bitsandbytes as bnb

        kind = family[:3]
        linear = bnb.nn.Linear4bit(columns, out, bias=False, compute_dtype=dtype, quant_type=kind)
        linear.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type=kind, blocksize=64)
        linear = linear.to("cpu").train()  # in eval mode it would re-pack its weight where AVX512-BF16 exists
        if kind == "nf4":
            theirs = bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
            assert torch.equal(theirs, ours(weight, "nf4", {}).dequantize())
        return linear
    if family == "int8, kernel":
        scale = weight.abs().amax(1) / 127
        codes = (weight / scale[:, None]).round().to(torch.int8)
        return lambda x: torch._weight_int8pack_mm(x, codes, scale)
    linear.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    if family.startswith("int4"):
        from torchao.prototype.quantization.int4 import Int4OpaqueTensor

        linear.weight = torch.nn.Parameter(Int4OpaqueTensor.from_hp(weight, [1, 64]), requires_grad=False)
        return linear
    from torchao.quantization import Int8WeightOnlyConfig, PerGroup, PerRow, quantize_

    granularity = PerRow() if family == "int8, a scale a row" else PerGroup(int(family.split()[-1]))
    quantize_(linear, Int8WeightOnlyConfig(granularity=granularity, set_inductor_config=False))
    return linear


def backward(call: Call) -> Call:
    def step(x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            y = call(leaf)
            return torch.autograd.grad(y, leaf, torch.ones_like(y))[0]

    return step


def in_turns(calls: dict[str, Call], x: torch.Tensor, seconds: float, clock: Callable[[], float]) -> dict[str, dict[str, float]]:
    """{ours: milliseconds, the peer's, ratio}, medians over at least three turns; the last of `calls` is the peer."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call(x)
    end, order, orders = clock() + seconds, list(calls), random.Random(0)
    while clock() < end or len(times[order[0]]) < 3:
        orders.shuffle(order)
        for name in order:
            start = clock()
            calls[name](x)
            times[name].append((clock() - start) * 1e3)
    *own, other = times
    return {name: {"ours_ms": statistics.median(times[name]), "peer_ms": statistics.median(times[other]),
                   "ratio": statistics.median(theirs / mine for mine, theirs in zip(times[name], times[other])),
                   "turns": len(times[name])} for name in own}


@torch.no_grad()
def measure(family: str, shape: tuple[int, int], dtype: torch.dtype, rows: tuple[int, ...], seconds: float, threads: int) -> dict:
    """{rows: {ours: ...}} of a family, in this process."""
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(shape, generator=generator) * 0.02).to(dtype)
    calls: dict[str, Call] = {name: ours(weight, *spec) for name, spec in FAMILIES[family][1].items()}
    calls["peer"] = peer(family, weight)
    probe = torch.randn(2, shape[1], generator=generator).to(dtype)
    expected = F.linear(probe, weight).float()
    for name, call in calls.items():
        assert (call(probe).float() - expected).norm() < 0.2 * expected.norm(), f"{name}: a wrong product"
    if family.endswith("backward"):
        calls = {name: backward(call) for name, call in calls.items()}
    return {str(count): in_turns(calls, torch.randn(count, shape[1], generator=generator).to(dtype), seconds, clock) for count in rows}


def several(runs: int, *arguments: Any) -> dict[str, dict[str, dict[str, Any]]]:
    """What `measure` finds, over so many processes."""
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        found = list(pool.map(measure, *([argument] * runs for argument in arguments)))

    def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
        ratios = [part["ratio"] for part in parts]
        return {**{key: round(statistics.median(part[key] for part in parts), 4) for key in ("ours_ms", "peer_ms")},
                "ratio": round(statistics.median(ratios), 3), "range": [round(min(ratios), 3), round(max(ratios), 3)],
                "runs": runs, "turns": sum(part["turns"] for part in parts)}

    return {count: {who: joined([run[count][who] for run in found]) for who in cell} for count, cell in found[0].items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=3, help="processes")
    parser.add_argument("--seconds", type=float, default=0.5, help="of a process, for every family, shape and number of rows")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="default: both")
    parser.add_argument("--family", choices=FAMILIES, action="append", help="default: all")
    parser.add_argument("--shape", choices=["x".join(map(str, shape)) for shape in SHAPES], action="append", help="default: all")
    parser.add_argument("--rows", type=int, choices=ROWS, action="append", help="default: all")
    parser.add_argument("--quick", action="store_true", help="576x1536 alone, fp32, a tenth of a second each")
    parser.add_argument("--again", action="store_true", help="measure what is in the file already, too")
    options = parser.parse_args()
    if options.quick:
        options.shape, options.dtype, options.seconds, options.runs = ["576x1536"], ["fp32"], 0.1, 1
    kind = ("" if options.threads == 1 else f"-{options.threads}-threads") + ("-quick" if options.quick else "")
    path, found = RESULTS / f"packed_product{kind}.json", installed()
    report = json.loads(path.read_text()) if path.exists() else {"results": {}}
    report["machine"] = {"cpu": platform.processor() or platform.machine(), "capability": torch.backends.cpu.get_cpu_capability(),
                         "threads": options.threads, "load_average": os.getloadavg()}
    report["packages"] = {name: wanted or "not installed" for name, wanted in found.items()}
    for name in options.dtype or DTYPES:
        for shape in options.shape or ["x".join(map(str, shape)) for shape in SHAPES]:
            for family in options.family or FAMILIES:
                cells = report["results"].setdefault(name, {}).setdefault(shape, {}).setdefault(family, {})
                rows = tuple(count for count in options.rows or ROWS if options.again or str(count) not in cells)
                package = FAMILIES[family][0]
                if not found[package]:
                    print(f"{family}: {package} is not installed, skipped", file=sys.stderr)
                    continue
                if not rows or family == "int8, kernel" and name == "fp32":  # that is a scalar loop, for no one to use
                    continue
                size = tuple(map(int, shape.split("x")))
                cells.update(several(options.runs, family, size, DTYPES[name], rows, options.seconds, options.threads))
                path.write_text(json.dumps(report, indent=1) + "\n")
                for count in rows:
                    for who, values in cells[str(count)].items():
                        low, high = values["range"]
                        print(f"{name} {shape} rows {count:3d}  {who:18s} {values['ratio']:7.2f} ({low:.2f} to {high:.2f}) of {package} "
                              f"({family})", flush=True)


if __name__ == "__main__":
    main()
