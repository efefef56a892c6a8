"""The tasks of benchmarks/adapters.py: their rows, their base, and how a row is scored."""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rows import data_folder, read_rows, row_losses, write_rows

import graftwork
from graftwork.data import DataConfig
from graftwork.evaluation import evaluate
from graftwork.files import folder_bytes
from graftwork.modeling.state import state_of
from graftwork.training.run import train_recipe


@dataclass(frozen=True)
class Task:
    """folder: of the data pack. base, steps, batch, length: of every cell. validation, test: how many rows are scored.
    classes: number of labels of a score head, 0 for a causal model. unit: of the score, higher is better."""

    name: str
    folder: str
    base: str
    classes: int
    steps: int
    batch: int
    length: int
    train: int
    validation: int
    test: int
    unit: str

    def row(self, row: dict[str, Any]) -> dict[str, Any]:
        return ROWS[self.name](row)

    @property
    def format(self) -> str:
        return "classification" if self.classes else "completion"

    def labels(self) -> tuple[str, ...] | None:
        return LABELS.get(self.name)


LABELS = {"sst2": ("no", "yes"), "trec": ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")}
ROWS = {
    "sst2": lambda row: {"text": row["sentence"], "label": LABELS["sst2"][row["label"]]},
    "trec": lambda row: {"text": row["question"], "label": row["coarse"]},
    "e2e": lambda row: {"prompt": f"{row['mr']}\n", "completion": row["ref"] if "ref" in row else row["refs"][0]},
    "word_problems": lambda row: {"prompt": f"{row['question']}\n", "completion": f"{row['answer']}"},
}
_ENCODER = {"base": "all-minilm-l6-v2", "steps": 32, "batch": 16, "length": 32, "train": 800, "validation": 200, "test": 400,
            "unit": "points of accuracy"}
_DECODER = {"base": "smollm2-135m-instruct", "classes": 0, "steps": 10, "batch": 4, "length": 128, "train": 80, "validation": 40,
            "test": 200, "unit": "0.01 nats a token"}
TASKS = {t.name: t for t in (
    Task("sst2", "glue/sst2", classes=2, **_ENCODER), Task("trec", "text_classification/trec", classes=6, **_ENCODER),
    Task("e2e", "e2e_nlg", **_DECODER), Task("word_problems", "math/word_problems", **_DECODER))}
ENCODER, DECODER = ("sst2", "trec"), ("e2e", "word_problems")


class Bench:
    """One task with its loaded base and its rows as files."""

    def __init__(self, task: Task, folder: Path):
        self.task, self.folder = task, folder
        for split in ("train", "validation", "test"):
            rows = read_rows(data_folder() / task.folder / f"{split}.jsonl.gz")
            write_rows(self.path(split), [task.row(row) for row in rows], getattr(task, split))
        kind = {"task": "classification", "num_labels": task.classes} if task.classes else {}
        self.model, self.tokenizer = graftwork.load(task.base, dtype="fp32", **kind)

    def path(self, split: str) -> Path:
        return self.folder / f"{self.task.name}.{split}.jsonl"

    def count(self, method: str, options: dict[str, Any]) -> int:
        graft = graftwork.attach(self.model, method, name="counted", **options)
        try:
            return graft.parameter_count()
        finally:
            graft.detach()

    def run(self, method: str, options: dict[str, Any], rate: float, seed: int, split: str, steps: int | None = None) -> dict[str, Any]:
        """Train and score one cell. A run that ends with an error (a loss that is no number) has no scores."""
        task, start, grafts = self.task, time.perf_counter(), []
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            recipe = {"model": task.base, "adapter": {"method": method, **options},
                      "objective": "classification" if task.classes else "causal_lm", "optimizer": {"method": "adamw", "lr": rate},
                      "data": {"train": str(self.path("train")), "format": task.format, "max_length": task.length},
                      "train": {"max_steps": steps or task.steps, "batch_size": task.batch, "precision": "fp32", "seed": seed,
                                "schedule": "linear", "warmup": 0.1}, "output_dir": f"{place}/run"}
            try:
                result = train_recipe(recipe, quiet=True, model=self.model, tokenizer=self.tokenizer)
                grafts, trained = result.grafts, time.perf_counter() - start
                scores = self.correct(split) if task.classes else self.likelihood(split)
                return {"rate": rate, "scores": scores, "mean": statistics.mean(scores), "parameters": grafts[0].parameter_count(),
                        "file_bytes": folder_bytes(result.graft), "peak_bytes": result.peak_bytes, "loss": result.loss,
                        "seconds": {"train": trained, "score": time.perf_counter() - start - trained}, "options": options}
            except graftwork.GraftworkError as error:
                return {"rate": rate, "scores": [], "mean": None, "error": error.message, "options": options,
                        "seconds": {"train": time.perf_counter() - start}}
            finally:
                for graft in grafts or list(state_of(self.model).grafts.values()):
                    graft.detach()

    def config(self) -> DataConfig:
        return DataConfig(train="-", format=self.task.format, max_length=self.task.length)

    def correct(self, split: str) -> list[float]:
        """100 for a row that is classified rightly, else 0."""
        found = evaluate(self.model, self.tokenizer, self.path(split), metrics=("loss",), labels=self.task.labels(), batch_size=50,
                         config=self.config())
        return [100.0 * row["correct"] for row in found.rows]

    def likelihood(self, split: str) -> list[float]:
        """Mean log-likelihood of each row's answer tokens, in hundredths of a nat."""
        losses = row_losses(self.model, self.tokenizer, self.path(split), self.task.format, self.task.length)
        return [-100 * loss for loss in losses]

    def step_ratio(self, method: str, options: dict[str, Any], baseline: dict[str, Any], pairs: int = 7) -> dict[str, Any]:
        """Seconds of one forward, backward and AdamW step, in interleaved pairs with LoRA."""
        batch = self.tokenizer(["a film that takes its time and is the better for it"] * self.task.batch, return_tensors="pt",
                               padding="max_length", max_length=self.task.length)
        labels, times = torch.zeros(self.task.batch, dtype=torch.long), {"lora": [], method: []}
        for i in range(pairs + 1):
            for name, own in (("lora", baseline), (method, options)):
                graft = graftwork.attach(self.model, name, name="timed", **own)
                optimizer = graftwork.optimizer("adamw", graft.parameter_groups(), lr=1e-4)
                self.model.train()
                for timed in (False, True):
                    start = time.perf_counter()
                    self.model(**batch, labels=labels).loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    if timed and i:
                        times[name].append(time.perf_counter() - start)
                self.model.eval()
                graft.detach()
        return {"ratio": statistics.median(b / a for a, b in zip(times["lora"], times[method])), "seconds": times}
