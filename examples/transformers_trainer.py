"""Train a graft with the Trainer of Transformers.

    python examples/transformers_trainer.py MODEL ROWS.jsonl OUTPUT [--resume]

MODEL: a folder, a packaged name or a Hub id; a row is {"prompt": ..., "completion": ...}. OUTPUT/checkpoint-N holds the graft,
not the model; OUTPUT/graft is the result, for graftwork.attach_saved, `graft generate` and `graft convert`.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

import graftwork


class GraftOnlyTrainer(graftwork.TrainerMixin, Trainer):
    """Saves and loads the graft only."""


def encode(path, tokenizer):
    """Rows of token ids; only the completion is learned."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        completion = tokenizer(row["completion"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        rows.append({"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion})
    return rows


def collate(rows):
    width = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": -100}
    batch = {k: torch.tensor([row[k] + [fill[k]] * (width - len(row[k])) for row in rows]) for k in fill}
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    return {**batch, "attention_mask": (torch.arange(width) < lengths[:, None]).long()}


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
    trainer = GraftOnlyTrainer(
        model=model, train_dataset=encode(options.rows, tokenizer), data_collator=collate,
        args=TrainingArguments(output_dir=options.output, max_steps=options.steps, per_device_train_batch_size=8,
                               learning_rate=1e-2, warmup_steps=3, save_steps=10, logging_steps=1, report_to="none",
                               disable_tqdm=True, remove_unused_columns=False, use_cpu=not torch.cuda.is_available()))
    trainer.train(resume_from_checkpoint=options.resume)
    graft.save(Path(options.output) / "graft")
    return trainer


if __name__ == "__main__":
    main()
