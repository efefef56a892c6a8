"""Train a graft with TRL's SFTTrainer.

    python examples/trl_sft.py MODEL ROWS.jsonl OUTPUT [--resume]

A row is {"prompt": ..., "completion": ...} or {"messages": [...]}, as TRL reads them. OUTPUT/checkpoint-N holds the graft, not
the model; OUTPUT/graft is the result.
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import graftwork


class GraftOnlySFTTrainer(graftwork.TrainerMixin, SFTTrainer):
    """Saves and loads the graft only."""


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("rows")
    parser.add_argument("output")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args(arguments)

    model, tokenizer = graftwork.load(options.model)
    graft = graftwork.attach(model, "lora", r=8, alpha=16, dropout=0.05, target_modules="all-linear")
    rows = [json.loads(line) for line in Path(options.rows).read_text(encoding="utf-8").splitlines()]
    trainer = GraftOnlySFTTrainer(
        model=model, processing_class=tokenizer, train_dataset=Dataset.from_list(rows),
        args=SFTConfig(output_dir=options.output, max_steps=options.steps, per_device_train_batch_size=8, max_length=256,
                       learning_rate=1e-2, warmup_steps=3, save_steps=10, logging_steps=1, report_to="none", disable_tqdm=True,
                       bf16=False, gradient_checkpointing=False, use_cpu=not torch.cuda.is_available()))
    trainer.train(resume_from_checkpoint=options.resume)
    graft.save(Path(options.output) / "graft")
    return trainer


if __name__ == "__main__":
    main()
