"""The tasks of benchmarks/optimizers.py: a small Llama trained from scratch on a play, and SmolLM2 fine-tuned on two sets."""

from __future__ import annotations

import gzip
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from adapter_tasks import ROWS
from rows import data_folder, read_rows, row_losses, write_rows

import graftwork
from graftwork.modeling.models import load_tokenizer
from graftwork.modeling.state import state_of
from graftwork.planning.simulate import plan
from graftwork.training.run import Interrupted, train_recipe


@dataclass(frozen=True)
class Task:
    """folder: of the data pack. base: None trains from random weights. steps, batch, length: of every cell, so all methods see the
    same tokens. validation, test: rows that are scored."""

    name: str
    folder: str
    base: str | None
    steps: int
    batch: int
    length: int
    train: int
    validation: int
    test: int
    format: str = "completion"


_TUNED = {"base": "smollm2-135m-instruct", "steps": 10, "batch": 4, "length": 96, "train": 80, "validation": 40, "test": 100}
TASKS = {t.name: t for t in (
    Task("shakespeare", "lm/tinyshakespeare", None, steps=200, batch=8, length=128, train=10_000, validation=80, test=240, format="text"),
    Task("e2e", "e2e_nlg", **_TUNED), Task("word_problems", "math/word_problems", **_TUNED))}
#: tokens of shakespeare: the bytes, padding, end
VOCABULARY = 258
HIDDEN = {"shakespeare": 192, "e2e": 576, "word_problems": 576}


def characters() -> Any:
    """A tokenizer of one token a byte, with a padding token and an end token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<end>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


def small_llama(vocabulary: int, seed: int) -> Any:
    """1.9 million parameters: 4 blocks of width 192, untied head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, hidden_size=192, intermediate_size=512, num_hidden_layers=4,
                                        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256,
                                        pad_token_id=0, bos_token_id=None, eos_token_id=1, tie_word_embeddings=False)).eval()


class Bench:
    """One task with its rows as files; a fresh model for every cell."""

    def __init__(self, task: Task, folder: Path):
        self.task, self.folder = task, folder
        for split in ("train", "validation", "test"):
            write_rows(self.path(split), self._rows(data_folder() / task.folder, split), getattr(task, split))
        if task.base is None:
            self.tokenizer = characters()
            self.base = str(self.scratch(0))
        else:
            self.base = task.base
            self.tokenizer = load_tokenizer(task.base)

    def _rows(self, folder: Path, split: str) -> list[dict[str, Any]]:
        if self.task.format == "text":
            with gzip.open(folder / f"{split}.txt.gz", "rt", encoding="utf-8") as file:
                text, size = file.read(), self.task.length - 1  # and the end token
            return [{"text": text[i: i + size]} for i in range(0, len(text) - size, size)]
        return [ROWS[self.task.name](row) for row in read_rows(folder / f"{split}.jsonl.gz")]

    def scratch(self, seed: int) -> Path:
        """The folder of the small model with the random weights of this seed."""
        folder = self.folder / f"small-llama-{seed}"
        if not folder.exists():
            self.tokenizer.save_pretrained(folder)
            small_llama(len(self.tokenizer), seed).save_pretrained(folder)
        return folder

    def path(self, split: str) -> Path:
        return self.folder / f"{self.task.name}.{split}.jsonl"

    def recipe(self, sections: dict[str, Any], rate: float, seed: int, steps: int | None = None) -> dict[str, Any]:
        """sections: of a method; the learning rate goes where the method has it."""
        task = self.task
        rated = "estimator" if isinstance(sections.get("estimator"), dict) and "optimizer" not in sections else "optimizer"
        parts = {"adapter": None, **sections, rated: {**sections.get(rated, {}), "lr": rate}}
        train = {"max_steps": steps or task.steps, "batch_size": task.batch, "precision": "fp32", "seed": seed, "schedule": "cosine",
                 "warmup": 0.1, **parts.pop("train", {})}
        return {"model": self.base, **parts, "train": train, "output_dir": str(self.folder / "run"),
                "data": {"train": str(self.path("train")), "format": task.format, "max_length": task.length}}

    def model(self, seed: int, sections: dict[str, Any]) -> Any:
        """A fresh model in the storage and dtype of a method; from random weights of this seed, where there is no base."""
        kind = {"dtype": sections.get("train", {}).get("precision", "fp32"), "storage": sections.get("storage")}
        return graftwork.load(self.scratch(seed) if self.task.base is None else self.base, **kind)[0]

    def run(self, sections: dict[str, Any], rate: float, seed: int, steps: int | None = None,
            splits: Sequence[str] = ("validation", "test")) -> dict[str, Any]:
        """Train one cell; the mean loss (nats a token) on these splits, and that of each test row. A run that ends with an error has
        none."""
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            recipe = {**self.recipe(sections, rate, seed, steps), "output_dir": f"{place}/run"}
            model = self.model(seed, sections)
            try:
                result = train_recipe(recipe, quiet=True, model=model, tokenizer=self.tokenizer)
                trained = time.perf_counter() - start
                found = {split: row_losses(model, self.tokenizer, self.path(split), self.task.format, self.task.length)
                         for split in splits}
            except Interrupted:
                raise
            except graftwork.GraftworkError as error:
                return {"rate": rate, **dict.fromkeys(splits), "error": error.message, "sections": sections}
            finally:
                for graft in list(state_of(model).grafts.values()):
                    graft.detach()
        return {"rate": rate, **{k: statistics.mean(v) for k, v in found.items()}, "rows": found.get("test"),
                "peak_bytes": result.peak_bytes, "train_loss": result.loss, "sections": sections,
                "seconds": {"train": trained, "score": time.perf_counter() - start - trained}}

    def planned(self, sections: dict[str, Any], rate: float) -> dict[str, Any]:
        """What `graft plan` says of this recipe: bytes at the peak, and the most that the optimizer's state has in a step."""
        made = plan(self.recipe(sections, rate, 0), estimate_time=False)
        state = max(held["optimizer_state"] for *_, held in made.timeline)
        return {"peak_bytes": made.peak_bytes, "state_bytes": state, "categories": made.categories,
                "trained": made.trained}
