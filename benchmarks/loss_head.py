"""The loss head alone, forward and backward, at SmolLM2's size: the chunked masked head against the whole product.

    OMP_NUM_THREADS=2 python benchmarks/loss_head.py [--tokens 2048] [--dtype bfloat16] [--rounds 7] [--chunks 128 256 512]

Baselines: `all positions` is what a Transformers model does (head on every position, fp32 copy, cross-entropy that ignores
the masked ones); `trained positions` is the same on the trained positions only, unchunked. The head is frozen. Interleaved:
every round times one call of each in rotating order. Medians are printed, of the time that passed and of the processor
time of all threads (the one to read on a machine that is busy with other work); all times, and the peak of live tensor bytes
by the profiler's memory events, are added to benchmarks/results/loss_head.json under dtype and token count.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from graftwork.objectives._head import LogitRule, _Call, _ChunkedLoss

VOCABULARY, WIDTH = 49152, 576
OUT = Path(__file__).parent / "results" / "loss_head.json"


def candidates(tokens: int, dtype: torch.dtype, masked: float, chunks: list[int]) -> dict:
    """name -> function that runs a forward and a backward and returns (loss, gradient at the hidden states)."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).mul_(0.05).to(dtype)
    hidden = torch.randn(tokens, WIDTH, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (tokens,), generator=generator)
    index = torch.randperm(tokens, generator=generator)[: round(tokens * (1 - masked))].sort().values
    labels = torch.full_like(targets, -100).index_copy_(0, index, targets[index])
    scale = torch.full((len(index),), 1 / len(index))

    def finish(loss):
        loss.backward()
        grad, hidden.grad = hidden.grad, None
        return loss.detach(), grad

    def everything():
        return finish(F.cross_entropy(F.linear(hidden, weight).float(), labels))

    def trained():
        return finish(F.cross_entropy(F.linear(hidden.index_select(0, index), weight).float(), targets[index]))

    def ours(chunk):
        call = _Call(LogitRule(), chunk, 0.0, False, dtype, True)
        return lambda: finish(_ChunkedLoss.apply(hidden.index_select(0, index), weight, None, targets[index], scale, call)[0])

    return {"all positions": everything, "trained positions": trained, **{f"chunks of {c}": ours(c) for c in chunks}}


def peak_bytes(run) -> int:
    """Highest sum of allocations above the start."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--tokens", type=int, default=2048)
    options.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--chunks", type=int, nargs="+", default=[128, 256, 512])
    options.add_argument("--masked", type=float, nargs="+", default=[0.0, 0.5, 0.9])
    chosen = options.parse_args()
    shares = {}
    for masked in chosen.masked:
        runs = candidates(chosen.tokens, getattr(torch, chosen.dtype), masked, chosen.chunks)
        answers = {name: run() for name, run in runs.items()}  # also warms up
        loss, grad = (value.float() for value in answers["all positions"])
        times, names = {name: [] for name in runs}, list(runs)
        for turn in range(chosen.rounds):
            for name in names[turn % len(names):] + names[: turn % len(names)]:
                start, used = time.perf_counter(), time.process_time()
                runs[name]()
                times[name].append((time.perf_counter() - start, time.process_time() - used))
        rows = {}
        for name, run in runs.items():
            rows[name] = {
                "median_seconds": statistics.median(wall for wall, _ in times[name]),
                "median_cpu_seconds": statistics.median(cpu for _, cpu in times[name]),
                "wall_and_cpu_seconds": times[name], "peak_bytes": peak_bytes(run),
                "loss_difference": float((answers[name][0].float() - loss).abs()),
                "gradient_difference": float((answers[name][1].float() - grad).norm() / grad.norm())}
            row, whole = rows[name], rows["all positions"]
            print(f"{chosen.dtype} masked {masked:.0%} {name:20s} {row['median_seconds']:8.3f} s "
                  f"{whole['median_seconds'] / row['median_seconds']:6.2f}x (processor time {row['median_cpu_seconds']:7.3f} s "
                  f"{whole['median_cpu_seconds'] / row['median_cpu_seconds']:6.2f}x) {row['peak_bytes'] / 2**20:8.1f} MiB, "
                  f"gradient differs by {row['gradient_difference']:.1e}", flush=True)
        shares[f"{masked:g}"] = rows
    results = json.loads(OUT.read_text()) if OUT.exists() else {}
    results[f"{chosen.dtype} {chosen.tokens} tokens"] = {
        "torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(), "masked": shares,
        "bf16_products": torch.ops.mkldnn._is_mkldnn_bf16_supported(), "vocabulary": VOCABULARY, "width": WIDTH}
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
