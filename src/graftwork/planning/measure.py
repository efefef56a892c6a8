"""Memory, measured: the independent check on the planner, and the step from tensor bytes to bytes of a device.

Nothing here uses the ledger. On the CPU the source is the profiler's allocator events (every allocation and release of
PyTorch's CPU allocator, scratch inside kernels included), on CUDA the caching allocator's own counters. Beside it
stands the resident size of the whole process (RSS), from the kernel.

    peak = baseline + max over t of (bytes allocated - bytes released since the start),
    baseline = distinct storages of the tensors that Python can reach at the start (by data pointer), `.grad` included

The profiler says nothing of releases of memory that was allocated before it started, so each baseline storage reports
its own death with a time on the profiler's clock. Tensors that only C++ holds (a graph built before the start) are not
in the baseline: start between steps. The profiler keeps every event of the measured stretch until it stops, about
1 KiB each: measure single steps, not a run.
"""

from __future__ import annotations

import gc
import re
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError, nearest

KIB, MIB, GIB = 2**10, 2**20, 2**30


@dataclass(frozen=True)
class MeasuredPeak:
    """What was measured. Bytes; `source` and `rss_source` say from where; `result` is what the function returned."""

    peak_bytes: int
    baseline_bytes: int
    rss_peak: int
    rss_before: int
    seconds: float
    allocations: int
    source: str
    rss_source: str
    result: Any = None

    def to_dict(self) -> dict[str, Any]:
        """All but `result`, ready for JSON."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "result"}


def _status(field: str) -> int | None:
    """A kB field of /proc/self/status in bytes, None where the system has none."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as lines:
            for line in lines:
                if line.startswith(field + ":"):
                    return int(line.split()[1]) * KIB
    except OSError:
        pass
    return None


class RssWatch:
    """`with RssWatch() as watch: ...` then `watch.peak`, `watch.before` (bytes) and `watch.source`.

    The kernel's high-water mark, reset at the start, where the system lets a process reset its own; else a thread that
    looks every 5 ms; else the peak of the process since its start.
    """

    def __enter__(self) -> RssWatch:
        self.before = _status("VmRSS") or 0
        self.peak = self.before
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        try:
            with open("/proc/self/clear_refs", "w", encoding="ascii") as handle:
                handle.write("5")
            self.source = "kernel high-water mark (VmHWM), reset at the start"
        except OSError:
            if self.before:
                self.source = "VmRSS, looked at every 5 ms"
                self._thread = threading.Thread(target=self._look, daemon=True)
                self._thread.start()
            else:
                self.source = "getrusage, highest since the process started"
        return self

    def _look(self) -> None:
        while not self._stop.wait(0.005):
            self.peak = max(self.peak, _status("VmRSS") or 0)

    def __exit__(self, *error) -> None:
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self.peak = max(self.peak, _status("VmRSS") or 0)
        elif self.before:
            self.peak = max(self.before, _status("VmHWM") or 0)
        else:
            import resource
            import sys

            unit = 1 if sys.platform == "darwin" else KIB  # macOS reports bytes, the others kB
            self.peak = self.before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def window_peaks() -> dict[str, int]:
    """{process_bytes, device_bytes}: the highest bytes since the last call, of the process and of CUDA tensors; then both start
    anew. Where the system does not reset a process's high-water mark, the present size stands for it."""
    found = {}
    if torch.cuda.is_available():
        found["device_bytes"] = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    peak, now = _status("VmHWM"), _status("VmRSS")
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as handle:
            handle.write("5")
    except OSError:
        peak = now
    return found if peak is None else {"process_bytes": peak, **found}


def _live_cpu_storages() -> dict[int, torch.UntypedStorage]:
    """Distinct CPU storages, by data pointer, of every tensor that Python's collector knows, and of their `.grad`."""
    found: dict[int, torch.UntypedStorage] = {}

    def add(tensor: Tensor) -> None:
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # sparse and opaque layouts; their parts are tensors of their own
            return
        if storage.device.type == "cpu" and storage.nbytes() and (pointer := storage.data_ptr()):
            known = found.get(pointer)
            if known is None or known.nbytes() < storage.nbytes():
                found[pointer] = storage

    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor):  # not isinstance: that would resolve proxies
            add(thing)
            if thing.is_leaf and thing.grad is not None:
                add(thing.grad)
    return found


class PeakMeter:
    """`with PeakMeter(device) as meter: one_step()` then `meter.peak: MeasuredPeak`. Device: "cpu" or "cuda[:i]".

    The resident size includes the profiler's own buffers; `RssWatch` alone measures it without them. Raises UsageError
    for another device, or when there is no CUDA device. Meters do not nest (PyTorch has one profiler).
    """

    peak: MeasuredPeak

    def __init__(self, device: str = "cpu"):
        self.device = torch.device(device)
        if self.device.type not in ("cpu", "cuda"):
            raise UsageError(f"cannot measure memory on {device!r}", remedy="use 'cpu' or 'cuda'")
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise UsageError("there is no CUDA device to measure on", remedy="use device='cpu'")

    def __enter__(self) -> PeakMeter:
        gc.collect()  # cycles left from before would count as live
        self._watch = RssWatch().__enter__()
        self._began = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._baseline = torch.cuda.memory_allocated(self.device)
            return self
        storages = _live_cpu_storages()
        self._baseline = sum(storage.nbytes() for storage in storages.values())
        self._deaths: list[tuple[int, int]] = []
        self._references = [_reporting(storage, self._deaths) for storage in storages.values()]
        del storages
        self._profile = torch.autograd.profiler.profile(use_cpu=True, profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        seconds = time.perf_counter() - self._began
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            peak, allocations = torch.cuda.max_memory_allocated(self.device), 0
            source = "CUDA caching allocator (max_memory_allocated)"
        else:
            self._profile.__exit__(kind, error, traceback)
            changes = [(event.start_ns(), event.nbytes()) for event in self._profile.kineto_results.events()
                       if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU]
            allocations = sum(nbytes > 0 for _, nbytes in changes)
            self._references.clear()
            changes += self._deaths
            changes.sort(key=lambda change: change[0])
            now = peak = self._baseline
            for _, nbytes in changes:
                now += nbytes
                peak = max(peak, now)
            source = "profiler allocator events, on top of the storages of all tensors alive at the start"
            del self._profile
        self._watch.__exit__(kind, error, traceback)
        self.peak = MeasuredPeak(peak, self._baseline, self._watch.peak, self._watch.before, seconds, allocations,
                                 source, self._watch.source)


def _reporting(storage: torch.UntypedStorage, deaths: list[tuple[int, int]]) -> weakref.ref:
    nbytes = storage.nbytes()
    return weakref.ref(storage, lambda _: deaths.append((time.time_ns(), -nbytes)))


def measure_peak(fn: Callable[[], Any], *, device: str = "cpu") -> MeasuredPeak:
    """Run `fn` once and measure the highest bytes of tensors during it (see the module docstring).

    An exception of `fn` passes through. Raises UsageError as `PeakMeter` does.
    """
    with PeakMeter(device) as meter:
        result = fn()
    return replace(meter.peak, result=result)


# ---- from tensor bytes to device bytes -----------------------------------------------------------------------------

#: shares and constants, named in the returned basis; the CPU's process size is the RSS of an interpreter with PyTorch
#: 2.13 and Transformers 5.23 imported, the others are assumptions that no GPU has confirmed
CUDA_CONTEXT, CUDA_FRAGMENTATION = 512 * MIB, 0.05
CPU_PROCESS, CPU_FRAGMENTATION = 520 * MIB, 0.05


def expected_device_bytes(tensor_peak: int, device: str = "cuda", *, pools: dict[str, int] | None = None,
                          blocks: int | None = None) -> dict[str, Any]:
    """What a device needs for a peak of `tensor_peak` tensor bytes: allocator, reserve, context.

    pools: bytes at the peak in blocks up to 1 MiB, below 10 MiB, and larger (`Ledger.peak_pools`), for exact segment
    rounding on CUDA; blocks: number of storages, for the rounding where the pools are unknown.
    Returns tensor_bytes, allocator_bytes (what rounding adds), reserve_bytes, context_bytes, total_bytes (their sum),
    basis (a sentence for each part), measured (a remark). Raises UsageError for another device or negative bytes.
    """
    if tensor_peak < 0:
        raise UsageError(f"a peak of {tensor_peak} bytes is negative")
    if device == "cuda":
        if pools is not None:
            segments = (-(-pools["small"] // (2 * MIB)) * 2 * MIB + -(-pools["medium"] // (20 * MIB)) * 20 * MIB
                        + pools["large"])
            rounding = max(0, segments - tensor_peak)
            how = "blocks rounded to 512 B in segments of 2 MiB and 20 MiB, those from 10 MiB up to a multiple of 2 MiB"
        else:
            rounding = 22 * MIB + 512 * (blocks or 0)
            how = "block sizes unknown: one partly filled segment of 2 MiB and one of 20 MiB, 512 B for each known block"
        reserve, context, remark = int(tensor_peak * CUDA_FRAGMENTATION), CUDA_CONTEXT, "not measured on a GPU"
        basis = (f"allocator: {how}; reserve: {CUDA_FRAGMENTATION:.0%} of the tensor bytes for fragmentation and kernel "
                 f"workspaces (assumed); context: {format_bytes(CUDA_CONTEXT)} for driver, kernels and libraries (assumed)")
    elif device == "cpu":
        rounding, reserve, context = 4 * KIB * (blocks or 0), int(tensor_peak * CPU_FRAGMENTATION), CPU_PROCESS
        remark = "process size, not a limit of the allocator"
        basis = (f"allocator: one page of 4 KiB for each known block; reserve: {CPU_FRAGMENTATION:.0%} of the tensor bytes "
                 f"for heap fragmentation and kernel scratch (assumed); context: {format_bytes(CPU_PROCESS)} for the "
                 "interpreter with PyTorch and Transformers imported (measured on Linux)")
    else:
        raise UsageError(f"no memory model for device {device!r}{nearest(device, ('cuda', 'cpu'))}",
                         remedy="use 'cuda' or 'cpu'")
    return {"tensor_bytes": tensor_peak, "allocator_bytes": rounding, "reserve_bytes": reserve,
            "context_bytes": context, "total_bytes": tensor_peak + rounding + reserve + context,
            "basis": basis, "measured": remark}


_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
          "kib": KIB, "mib": MIB, "gib": GIB, "tib": 2**40}


def format_bytes(nbytes: int) -> str:
    """Binary units, two decimals: `512 B`, `902.82 MiB`, `1.50 GiB`."""
    if abs(nbytes) < KIB:
        return f"{nbytes} B"
    for unit, size in (("KiB", KIB), ("MiB", MIB), ("GiB", GIB)):
        if round(abs(nbytes) / size, 2) < 1024:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes / 2**40:.2f} TiB"


def format_seconds(seconds: float) -> str:
    """Three digits in the largest unit of which there are two or more: `0.0213 s`, `98.1 s`, `50.8 min`, `2.12 h`."""
    unit, size = next(((u, s) for u, s in (("h", 3600), ("min", 60)) if seconds >= 2 * s), ("s", 1))
    return f"{seconds / size:.3g} {unit}"


def parse_bytes(text: str | int) -> int:
    """Bytes of `16GiB` (2^30), `24GB` (10^9), `512 MiB`, `1.5e3 kB`, or a plain number of bytes. Raises UsageError."""
    if isinstance(text, int) and not isinstance(text, bool) and text > 0:
        return text
    remedy = "write a positive number with B, kB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB (powers of 1024)"
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)(e\d+)?\s*([a-z]*)\s*", str(text), re.IGNORECASE)
    if match is None:
        raise UsageError(f"{text!r} is not an amount of memory", remedy=remedy)
    number, exponent, unit = match.groups()
    if unit and unit.lower() not in _UNITS:
        near = nearest(unit, ("GiB", "GB", "MiB", "MB", "KiB", "kB", "TiB", "TB"))
        raise UsageError(f"unknown unit {unit!r} in {text!r}{near}", remedy=remedy)
    try:
        nbytes = float(number + (exponent or "")) * _UNITS[unit.lower() or "b"]
        whole = round(nbytes)
    except OverflowError:
        whole = 0
    if whole < 1:
        raise UsageError(f"{text!r} is not a positive amount of memory", remedy=remedy)
    return whole
