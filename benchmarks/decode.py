"""Decode of 32 rows on 1, 8 and 32 different rank-8 LoRA adapters: ours, PEFT's `adapter_names`, and the bare base.

    OMP_NUM_THREADS=2 python benchmarks/decode.py [--steps 32] [--rounds 5] [--rows 32] [--prompt 16] [--dtype bf16] [--tiny]

All run in the same loop (graftwork's, one key/value cache with reserved room), so that the difference is the adapters'; what
PEFT's own `generate` needs stands beside it (`peft generate`, the prompt's share subtracted). The factors are the same random
numbers everywhere, PEFT's in the compute dtype too (faster than its fp32 default). Only decode steps are timed, not the
prompt. Every round times each contender once, in a rotating order; ratios are formed within a round, and medians printed: by
the time that passed and by the processor time of all threads (the one to read on a busy machine). The byte bound
base / (base + adapters) is what a step that is limited by reading weights could reach, each adapter read once.
Written to benchmarks/results/decode.json (a tiny run: nowhere).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

import graftwork
from graftwork.serving.generate import _Row, _Settings, _steps

OUT = Path(__file__).parent / "results" / "decode.json"
TOKENIZER = SimpleNamespace(pad_token_id=0, eos_token_id=None)
TARGETS = {"q,v": ["q_proj", "v_proj"], "all-linear": "all-linear"}


class PeftRows(nn.Module):
    """A PEFT model that answers row i by names[i], as a model of the loop."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.inner, self.names, self.config = model, [], model.config

    def get_input_embeddings(self) -> nn.Module:
        return self.inner.get_input_embeddings()

    def forward(self, input_ids=None, logits_to_keep=0, **inputs: Any) -> Any:
        return self.inner(input_ids=input_ids, logits_to_keep=logits_to_keep, adapter_names=self.names, **inputs)


def base_model(options: argparse.Namespace) -> nn.Module:
    if not options.tiny:
        return graftwork.load(options.model, dtype=options.dtype)[0]
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, tie_word_embeddings=True)
    return AutoModelForCausalLM.from_config(config, dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype]).eval()


def with_grafts(options: argparse.Namespace, targets: Any, count: int) -> nn.Module:
    model = base_model(options)
    for k in range(count):
        graft = graftwork.attach(model, "lora", name=f"a{k}", r=options.rank, alpha=options.rank, target_modules=targets, seed=k)
        generator = torch.Generator().manual_seed(k)
        with torch.no_grad():
            for parameter in graft.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02).requires_grad_(False)
    return model


def with_peft(options: argparse.Namespace, targets: Any, ours: nn.Module) -> PeftRows:
    """PEFT's layers with the factors of our grafts, in the base's dtype."""
    from peft import LoraConfig, get_peft_model

    model, wrapped = base_model(options), None
    config = LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=targets, task_type="CAUSAL_LM")
    for name, graft in ours.graft_state.grafts.items():
        if wrapped is None:
            wrapped = get_peft_model(model, config, adapter_name=name, autocast_adapter_dtype=False)
        else:
            wrapped.add_adapter(name, config, autocast_adapter_dtype=False)
        with torch.no_grad():
            for site, (B, A) in graft.to_lora()[0].items():
                layer = model.get_submodule(site)
                layer.lora_A[name].weight.copy_(A)
                layer.lora_B[name].weight.copy_(B)
                for factor in (layer.lora_A[name], layer.lora_B[name]):
                    factor.to(next(model.parameters()).dtype)
    return PeftRows(wrapped.eval())


def prompts(options: argparse.Namespace, model: nn.Module) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, model.config.vocab_size, (options.rows, options.prompt), generator=generator).tolist()


def decode(model: nn.Module, ids: list[list[int]], names: list[str] | None, steps: int) -> tuple[float, float, list[list[int]]]:
    """(seconds, processor seconds, tokens by row) of `steps` decode steps after the prompt."""
    settings = _Settings(steps + 1, 0.0, 1.0, 0, (), False, frozenset())
    rows = [_Row(i, row, names[i] if names else None, steps + 1, torch.Generator()) for i, row in enumerate(ids)]
    loop = _steps(model, TOKENIZER, rows, settings, routed=names is not None)
    next(loop)  # the prompt, and the first token
    start, used = time.perf_counter(), time.process_time()
    for _ in loop:
        pass
    return time.perf_counter() - start, time.process_time() - used, [row.ids for row in rows]


@torch.no_grad()
def peft_generate(model: PeftRows, ids: list[list[int]], names: list[str], steps: int) -> tuple[float, float, None]:
    """The same through PEFT's own `generate`; the time of a call for one token is subtracted."""
    times = []
    for new in (1, steps + 1):
        start, used = time.perf_counter(), time.process_time()
        model.inner.generate(input_ids=torch.tensor(ids), attention_mask=torch.ones(len(ids), len(ids[0]), dtype=torch.long),
                             adapter_names=names, do_sample=False, min_new_tokens=new, max_new_tokens=new, pad_token_id=0)
        times.append((time.perf_counter() - start, time.process_time() - used))
    return times[1][0] - times[0][0], times[1][1] - times[0][1], None


def byte_bound(model: nn.Module, adapters: int) -> float:
    """Weights a step reads (the input embedding's rows aside; a tied head counts once) against those plus the adapters."""
    from graftwork.modeling.protocols import StoredWeight

    held = {id(p): p for n, m in model.named_modules() if isinstance(m, (nn.Linear, StoredWeight)) and ".graft" not in n
            for p in m._parameters.values() if p is not None}
    base = sum(p.nbytes for p in held.values())
    size = next(model.parameters()).element_size()
    grafts = list(model.graft_state.grafts.values())[:adapters]
    own = sum(p.numel() * size for graft in grafts for _, p in graft.named_parameters(trainable=False))
    return base / (base + own)


def measure(options: argparse.Namespace, label: str) -> list[dict[str, Any]]:
    base, ours = base_model(options), with_grafts(options, TARGETS[label], max(options.adapters))
    theirs = with_peft(options, TARGETS[label], ours)
    ids, found = prompts(options, base), []
    for count in options.adapters:
        names = [f"a{i % count}" for i in range(options.rows)]
        theirs.names = names
        contenders = {"base": lambda: decode(base, ids, None, options.steps),
                      "graftwork": lambda names=names: decode(ours, ids, names, options.steps),
                      "peft": lambda: decode(theirs, ids, None, options.steps),
                      "peft generate": lambda names=names: peft_generate(theirs, ids, names, options.steps)}
        for run in contenders.values():  # warm
            run()
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
        tokens: dict[str, Any] = {}
        order = list(contenders)
        for k in range(options.rounds):
            for name in order[k % len(order):] + order[:k % len(order)]:
                seconds, used, tokens[name] = contenders[name]()
                times[name].append((seconds, used))
            print(f"{label}, {count} adapters: round {k + 1} of {options.rounds}", flush=True)
        same = sum(a == b for left, right in zip(tokens["graftwork"], tokens["peft"]) for a, b in zip(left, right))
        bound = byte_bound(ours, count)
        found.append({"targets": label, "adapters": count, "byte_bound": bound,
                      "tokens_per_second": {name: options.rows * options.steps / statistics.median(t for t, _ in each)
                                            for name, each in times.items()},
                      "of_base": ratio(times, "base", "graftwork"), "over_peft": ratio(times, "peft", "graftwork"),
                      "over_peft_generate": ratio(times, "peft generate", "graftwork"),
                      "same_tokens_as_peft": same / (options.rows * (options.steps + 1)), "times": times})
    return found


def ratio(times: dict[str, list[tuple[float, float]]], other: str, own: str) -> dict[str, float]:
    """Speed of `own` relative to `other`: median of the rounds' ratios, by the clock and by processor time."""
    pairs = list(zip(times[own], times[other]))
    return {kind: statistics.median(b[i] / a[i] for a, b in pairs) for i, kind in enumerate(("wall", "cpu"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--tiny", action="store_true", help="a two-layer random model, nothing written: does the script work?")
    options = parser.parse_args()
    found = [row for label in options.targets for row in measure(options, label)]
    print(f"\n{'targets':<11} {'adapters':>8} {'base tok/s':>11} {'ours':>9} {'PEFT':>9} {'generate':>9}"
          f" {'of base':>8} {'bound':>6} {'x PEFT':>7} {'cpu: of base':>13} {'x PEFT':>7}")
    for row in found:
        speed = row["tokens_per_second"]
        print(f"{row['targets']:<11} {row['adapters']:>8} {speed['base']:>11.1f} {speed['graftwork']:>9.1f}"
              f" {speed['peft']:>9.1f} {speed['peft generate']:>9.1f} {row['of_base']['wall']:>8.2f} {row['byte_bound']:>6.2f}"
              f" {row['over_peft']['wall']:>7.1f} {row['of_base']['cpu']:>13.2f} {row['over_peft']['cpu']:>7.1f}")
    if not options.tiny:
        OUT.parent.mkdir(exist_ok=True)
        OUT.write_text(json.dumps({"machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(),
                                               "threads": torch.get_num_threads(), "torch": torch.__version__},
                                   "settings": vars(options), "rows": found}, indent=1) + "\n")
        print(f"written to {OUT.name}")


if __name__ == "__main__":
    main()
