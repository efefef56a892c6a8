"""LoRA training on SmolLM2, 8 rows of 256 tokens, with 0, 50 and 90 % of the tokens masked: ours, ours without the masked head,
PEFT + Transformers Trainer, PEFT + TRL's SFTTrainer at its defaults. Whole training steps (forward, backward, clipping, AdamW),
interleaved, medians; peak tensor bytes of one step from allocator events.

    python benchmarks/lora_training.py [--precision bf16] [--rounds 5] [--rows 8] [--tokens 256] [--layers 0] [--check] [--profile]

--check compares gradients of all four in fp32 on two layers. Writes benchmarks/results/lora_training-PRECISION.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
warnings.filterwarnings("ignore")

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RESULTS = Path(__file__).parent / "results"
RANK, ALPHA, LR = 8, 16, 1e-4
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load(args):
    """(a fresh base model, tokenizer); --layers cuts it short for a quick look."""
    from graftwork.modeling.models import load_model

    model, tokenizer = load_model("smollm2-135m-instruct", dtype=args.precision)
    if args.layers:
        model.model.layers = model.model.layers[: args.layers]
        model.config.num_hidden_layers = args.layers
    return model, tokenizer


def make_batch(args, masked: float) -> dict:
    """Random tokens; the first `masked` share of every row is untrained."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 40000, (args.rows, args.tokens), generator=generator)
    labels = ids.clone()
    labels[:, : round(masked * args.tokens)] = -100
    return {k: v.to(DEVICE) for k, v in {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}.items()}


class Ours:
    def __init__(self, args, masked_head: bool):
        import graftwork
        from graftwork.adapters.attach import attach
        from graftwork.modeling.arithmetic import widen
        from graftwork.registry import lookup, make_config
        from graftwork.training.step import TrainStep

        model, _ = load(args)
        widen(model.to(DEVICE))
        graft = attach(model, "lora", r=RANK, alpha=ALPHA, target_modules="all-linear")
        objective = lookup("objective", "causal_lm").cls(make_config("objective", "causal_lm", masked_head=masked_head))
        optimizer = graftwork.optimizer("adamw", graft.parameter_groups(), lr=LR)
        self.step_ = TrainStep(model, objective, lookup("estimator", "backprop").cls(None), list(graft.named_parameters()), [graft],
                               (), optimizer, 1.0)
        self.model, self.graft, self.count = model, graft, 0
        model.train()

    def step(self, batch):
        from graftwork.objectives.base import token_targets

        index, ids = token_targets(batch)
        result = self.step_.run([{**batch, "target_index": index, "target_ids": ids, "n_targets": len(ids)}], self.count)
        self.count += 1
        return float(result.loss)

    def factors(self):
        return {n: (a.lora_A, a.lora_B) for n, a in self.graft.adapters.items()}


class Peft:
    """PEFT's LoRA in a Trainer: its training_step, clipping and fused AdamW, called as its loop calls them."""

    def __init__(self, args, trl: bool):
        from peft import LoraConfig, get_peft_model
        from transformers import Trainer, TrainingArguments

        model, tokenizer = load(args)
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=MODULES, task_type="CAUSAL_LM")
        common = dict(output_dir=tempfile.mkdtemp(), per_device_train_batch_size=args.rows, learning_rate=LR, report_to="none",
                      use_cpu=not torch.cuda.is_available(), lr_scheduler_type="constant", max_steps=1000, disable_tqdm=True,
                      bf16=False, gradient_checkpointing=False, weight_decay=0.0)
        if trl:
            from datasets import Dataset
            from trl import SFTConfig, SFTTrainer

            row = make_batch(args, 0.0)
            data = Dataset.from_dict({"input_ids": row["input_ids"].tolist(), "labels": row["labels"].tolist()})
            self.trainer = SFTTrainer(model, args=SFTConfig(**common, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}),
                                      train_dataset=data, processing_class=tokenizer, peft_config=config)
        else:
            self.trainer = Trainer(get_peft_model(model, config), args=TrainingArguments(**common), train_dataset=[0])
        self.trainer.create_optimizer()
        self.model = self.trainer.model
        if args.precision == "bf16":  # learned tensors in fp32 for all contenders
            assert all(p.dtype == torch.float32 for p in self.model.parameters() if p.requires_grad)
        self.model.train()
        self.trainer.current_gradient_accumulation_steps = 1

    def step(self, batch):
        batch = dict(batch)
        items = (batch["labels"][:, 1:] != -100).sum()
        loss = self.trainer.training_step(self.model, batch, num_items_in_batch=items)
        torch.nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], 1.0)
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()
        return float(loss)

    def factors(self):
        return {n: (m.lora_A["default"].weight, m.lora_B["default"].weight)
                for n, m in self.model.base_model.model.named_modules() if hasattr(m, "lora_A") and "default" in m.lora_A}


CONTENDERS = {"ours": lambda a: Ours(a, True), "ours, unmasked head": lambda a: Ours(a, False),
              "PEFT + Trainer": lambda a: Peft(a, False), "PEFT + TRL": lambda a: Peft(a, True)}


@torch.no_grad()
def same_start(runs) -> None:
    """Every contender starts from the factors of the first, B not zero so that all gradients are non-zero."""
    generator = torch.Generator().manual_seed(1)
    first = next(iter(runs.values())).factors()
    for _, B in first.values():
        B.copy_(torch.randn(B.shape, generator=generator) * 0.02)
    for run in list(runs.values())[1:]:
        for name, (A, B) in run.factors().items():
            A.copy_(first[name][0])
            B.copy_(first[name][1])


def check(args) -> None:
    """Gradients of all contenders in fp32 agree within 1e-5 of the largest."""
    runs = {n: make(args) for n, make in CONTENDERS.items()}
    same_start(runs)
    batch, grads = make_batch(args, 0.5), {}
    for name, run in runs.items():
        optimizer = run.step_.optimizer if isinstance(run, Ours) else run.trainer.optimizer
        kept = {}
        handle = optimizer.register_step_pre_hook(
            lambda *_, kept=kept, run=run: kept.update({n: (A.grad.clone(), B.grad.clone()) for n, (A, B) in run.factors().items()}))
        run.step(batch)
        handle.remove()
        grads[name] = kept
    reference = grads.pop("PEFT + Trainer")
    largest = max(float(g.abs().max()) for pair in reference.values() for g in pair)
    for name, found in grads.items():
        worst = max(float((a - b).abs().max()) for n in reference for a, b in zip(reference[n], found[n]))
        print(f"gradients of {name} against PEFT + Trainer: {worst / largest:.1e} of the largest")
        assert worst / largest < 1e-5


def profile_steps(args) -> None:
    """Shares of the operations of one step, by the profiler's own time."""
    from torch.profiler import ProfilerActivity, profile

    batch = make_batch(args, float(args.masked.split(",")[0]))
    for name in ("ours", "PEFT + Trainer"):
        run = CONTENDERS[name](args)
        run.step(batch)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            run.step(batch)
        events = sorted(seen.key_averages(), key=lambda e: -e.self_cpu_time_total)
        total = sum(e.self_cpu_time_total for e in events)
        print(f"{name}: {total / 1e6:.2f} s; " + ", ".join(f"{e.key} {e.self_cpu_time_total / total:.0%}" for e in events[:9]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--masked", default="0,0.5,0.9")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--profile", action="store_true", help="print where a step of ours and of PEFT + Trainer goes; writes nothing")
    args = parser.parse_args()
    if args.profile:
        return profile_steps(args)
    if args.check:
        args.precision, args.layers, args.rows, args.tokens = "fp32", args.layers or 2, 4, 64
        return check(args)
    from graftwork.modeling.arithmetic import slow_on_cpu
    from graftwork.planning.measure import PeakMeter

    runs = {n: make(args) for n, make in CONTENDERS.items()}
    same_start(runs)
    tokens, rows = args.rows * args.tokens, []
    for masked in (float(m) for m in args.masked.split(",")):
        batch, times, peaks, losses = make_batch(args, masked), {n: [] for n in runs}, {}, {n: [] for n in runs}
        for round_ in range(args.rounds + 1):
            for name, run in runs.items():
                if round_ == 0:  # a warm-up that measures memory instead of time
                    others = sum(p.untyped_storage().nbytes() for n, r in runs.items() if n != name for p in {
                        id(p): p for p in r.model.parameters()}.values())
                    run.step(batch)
                    with PeakMeter(DEVICE) as meter:
                        losses[name].append(run.step(batch))
                    peaks[name] = meter.peak.peak_bytes - others
                    continue
                start = time.perf_counter()
                losses[name].append(run.step(batch))  # reads the loss, so a device has finished
                times[name].append(time.perf_counter() - start)
        for name in runs:
            median = statistics.median(times[name])
            rows.append({"masked": masked, "contender": name, "seconds": times[name], "median_seconds": median,
                         "tokens_per_second": tokens / median, "peak_bytes": peaks[name], "losses": losses[name]})
            print(f"{masked:4.0%} masked  {name:20}  {median:7.3f} s/step  {tokens / median:8.1f} tokens/s  "
                  f"{peaks[name] / 2**20:8.1f} MiB  loss {losses[name][-1]:.5f}", flush=True)
        ours = next(r for r in rows if r["masked"] == masked and r["contender"] == "ours")
        for name in ("PEFT + Trainer", "PEFT + TRL"):
            other = next(r for r in rows if r["masked"] == masked and r["contender"] == name)
            print(f"      ours against {name}: {other['median_seconds'] / ours['median_seconds']:.2f}x speed, "
                  f"{ours['peak_bytes'] / other['peak_bytes']:.2f}x peak bytes")
    RESULTS.mkdir(exist_ok=True)
    out = RESULTS / f"lora_training-{args.precision}{f'-{args.layers}layers' * bool(args.layers)}.json"
    size = {k: v for k, v in vars(args).items() if k in ("rows", "tokens", "layers")}
    if out.exists():  # shares of masked tokens that this run did not measure stay
        before = json.loads(out.read_text())
        if before.get("size") == size:
            rows = [r for r in before["rows"] if r["masked"] not in {row["masked"] for row in rows}] + rows
    out.write_text(json.dumps({
        "command": "python benchmarks/lora_training.py " + " ".join(
            f"--{k} {v}" for k, v in vars(args).items() if k not in ("check", "profile")),
        "size": size,
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
                    "bf16_products": not slow_on_cpu(torch.bfloat16), "torch": torch.__version__}, "rows": rows}, indent=1))
    print(f"written: {out}")


if __name__ == "__main__":
    main()
