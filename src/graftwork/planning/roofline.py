"""How long a machine needs for counted work: the roofline of Williams, Waterman and Patterson (CACM 52(4), 2009), per operation.

    seconds = sum over operations of  max(flops / rate(dtype), bytes / bandwidth) + overhead

rate, bandwidth and overhead are measured on this machine once and kept in the cache under a key of processor, PyTorch, threads and
device: the rate is the median of a few products of 1024 x 1024, the bandwidth of a sum of two arrays larger than any cache, the
overhead that of adding two numbers. For a CUDA device that is not here, the published peaks of its data sheet (gpus.json) times the
shares that large kernels usually reach; that is an assumption, and everything made from it says so.

A prediction ranks recipes; it is no promise. What it leaves out: Python between operations, kernels that miss the roofline,
decompositions (work.py), data loading.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..cache import remember
from ..errors import UsageError, nearest

GPUS = Path(__file__).with_name("gpus.json")


@dataclass(frozen=True)
class Roofline:
    """rates: {dtype: flops a second}; bandwidth: bytes a second; overhead: seconds an operation. basis: where they come from."""

    name: str
    rates: dict[str, float]
    bandwidth: float
    overhead: float
    measured: bool
    basis: str
    memory: int | None = None

    def seconds(self, work: Iterable[list[Any]]) -> float:
        """Of [dtype, flops, bytes, count] of a step's operations. A dtype without a rate of its own goes at the slowest."""
        slowest = min(self.rates.values())
        return sum(n * (max(flops / self.rates.get(dtype, slowest), moved / self.bandwidth) + self.overhead)
                   for dtype, flops, moved, n in work)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def here(device: str) -> Roofline:
    """This machine's, measured once. device: cpu, or the cuda device that this machine has."""
    found = remember("roofline", json.dumps(machine_key(device)), lambda: measure(device))
    return Roofline(**found)


def machine_key(device: str) -> list[Any]:
    """What the measured numbers depend on."""
    import torch

    what = torch.cuda.get_device_name() if device == "cuda" else _processor()
    return ["roofline 1", device, what, platform.machine(), torch.__version__, torch.get_num_threads()]


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    except OSError:
        return platform.processor()


def measure(device: str, *, size: int = 1024, numbers: int = 2**24) -> dict[str, Any]:
    """The fields of a Roofline, measured here (about a second)."""
    import torch

    # on a processor its own time, shared among the threads: what other programs do there changes it little
    clock = time.perf_counter if device == "cuda" else lambda: time.process_time() / torch.get_num_threads()

    def usual(run: Callable[[], Any], repeats: int = 5) -> float:
        times = []
        for _ in range(repeats + 1):
            start = clock()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(clock() - start)
        return max(statistics.median(times[1:]), 1e-9)

    from ..modeling.arithmetic import slow_on_cpu

    rates = {}
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            if device == "cpu" and slow_on_cpu(dtype):  # products of this dtype run in fp32 (modeling.arithmetic)
                continue
            a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
            rates[str(dtype).removeprefix("torch.")] = 2 * size**3 / usual(lambda a=a, b=b: a @ b)
        x, y = (torch.ones(numbers, device=device) for _ in range(2))
        bandwidth = 3 * x.nbytes / usual(lambda: torch.add(x, y, out=y))
        one, calls = torch.ones(1, device=device), 200
        overhead = usual(lambda: [one.add_(1) for _ in range(calls)]) / calls
    name = machine_key(device)[2]
    return asdict(Roofline(name, rates, bandwidth, overhead, True, f"measured here with {torch.get_num_threads()} threads"
                           if device == "cpu" else "measured here"))


def published() -> dict[str, Any]:
    """gpus.json: `shares` (of the peaks that are assumed to be reached), `overhead`, `cards`."""
    return json.loads(GPUS.read_text(encoding="utf-8"))


def card(name: str) -> Roofline:
    """A CUDA card by its published peaks. Raises UsageError for an unknown one."""
    table = published()
    cards, shares = table["cards"], table["shares"]
    if name not in cards:
        raise UsageError(f"no published peaks for '{name}'{nearest(name, cards)}", remedy=f"--gpu: {', '.join(cards)}")
    known = cards[name]
    rates = {dtype: 1e12 * peak * shares["flops"] for dtype, peak in known["tflops"].items()}
    basis = (f"published peaks, {shares['flops']:.0%} of the arithmetic and {shares['bandwidth']:.0%} of the bandwidth assumed; "
             "not measured")
    return Roofline(name, rates, 1e9 * known["gb_per_second"] * shares["bandwidth"], table["overhead"], False, basis,
                    known["memory_gb"] * 10**9)


def smallest_card(nbytes: int) -> str:
    """The name of the published card with the least memory that has `nbytes`; of those with the most memory where none has."""
    cards = published()["cards"]
    fitting = [name for name in cards if cards[name]["memory_gb"] * 10**9 >= nbytes * 0.93]  # 24 GiB is meant by 24 GB
    return min(fitting, key=lambda n: cards[n]["memory_gb"]) if fitting else max(cards, key=lambda n: cards[n]["memory_gb"])


__all__ = ["Roofline", "card", "here", "machine_key", "measure", "published", "smallest_card"]
