"""One cell of a quality claim: an arm trained at one rate with one seed, and scored row by row.

A cell belongs to no claim: it is known by its recipe, with all defaults filled in, its base, its data and its seed. Claims with an arm in
common (AdamW, LoRA, GaLore on the same task) find it there.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..registry import lookup
from .bases import OWN, base_folder
from .cells import digest
from .kinds.base import merged
from .tasks import splits, task_of, write_split

#: {"rate", "seed", "validation": mean or None, "rows": scores of test rows or None, "trained", "file", "curve"} and "error"
#: where the run ended with one (then neither validation nor rows)
Trained = dict[str, Any]
#: dense bases that adapters share, by reference: loading costs more than a short run
_SHARED: dict[tuple[str, str, str], tuple[Any, Any]] = {}


def data_files(folder: Path, task: str, length: int, train: int, validation: int, test: int) -> dict[str, str]:
    """{split: file} of a task's rows; written once for each of its sizes."""
    counts = {"train": train, "validation": validation, "test": test}
    place = folder / f"{task}-{digest([length, counts])}"
    if not all((place / f"{split}.jsonl").exists() for split in counts):
        for split, rows in splits(task_of(task), length).items():
            write_split(place / f"{split}.jsonl", rows, counts[split])
    return {split: str(place / f"{split}.jsonl") for split in counts}


@dataclass(frozen=True)
class Cell:
    task: str
    base: str
    sections: dict[str, Any]
    rate: float
    seed: int
    files: dict[str, str]
    steps: int
    batch: int
    length: int
    eval_every: int
    schedule: str
    width: int
    blocks: int
    rows: int | None

    def of(self) -> dict[str, Any]:
        """What the result depends on: the resolved recipe without places on this machine, and what no recipe says."""
        from ..recipe import load_recipe

        document = load_recipe(self.recipe(Path(), "", model=self.base), check=False).document()
        document["data"] = {key: value for key, value in document["data"].items() if key not in ("train", "eval")}
        own = [self.width, self.blocks] if self.base in OWN else []
        return {"recipe": document, "task": self.task, "base": [self.base, *own], "data": Path(self.files["train"]).parent.name,
                "seed": self.seed, "rows": self.rows}

    @property
    def place(self) -> str:
        """Its name among the cells."""
        return f"trained/{self.task}/lr{self.rate:g}-seed{self.seed}-{digest(self.of())}"

    def recipe(self, models: Path, output: str, model: str | None = None) -> dict[str, Any]:
        """The rate goes where the method has it: to the optimizer, or to an estimator that moves the weights itself. model: instead of
        the base's."""
        task, sections = task_of(self.task), dict(self.sections)
        estimator = sections.get("estimator", "backprop")
        method = estimator if isinstance(estimator, str) else estimator["method"]
        moves = "optimizer" not in sections and "lr" in lookup("estimator", method).config.model_fields
        where = "estimator" if moves else "optimizer"
        own = sections.get(where)
        sections[where] = {**({"method": "adamw"} if own is None else {"method": own} if isinstance(own, str) else own), "lr": self.rate}
        evaluated = {"eval": self.files["validation"]} if self.eval_every else {}
        return merged({"model": model or base_folder(self.base, models, self.seed, width=self.width, blocks=self.blocks),
                       "objective": "classification" if task.classes else "causal_lm",
                       "train": {"max_steps": self.steps, "batch_size": self.batch, "precision": "fp32", "seed": self.seed,
                                 "schedule": self.schedule, "warmup": 0.1, "save_steps": 0, "eval_steps": self.eval_every},
                       "data": {"train": self.files["train"], "format": task.format, "max_length": self.length, **evaluated}},
                      sections, {"output_dir": output})

    def run(self, models: Path, wanted: Callable[[float], bool] | None = None) -> Trained:
        """wanted: of a search; validation rows are scored first, and test rows only where it says of their mean that they are needed."""
        from ..errors import TrainingError
        from ..files import folder_bytes
        from ..modeling.state import state_of
        from ..training.run import train_recipe

        models.mkdir(parents=True, exist_ok=True)
        made: Trained = {"rate": self.rate, "seed": self.seed, "validation": None, "rows": None, "trained": 0, "file": 0, "curve": []}
        with tempfile.TemporaryDirectory(dir=models) as place:
            recipe = self.recipe(models, f"{place}/run")
            model, tokenizer = self._shared(recipe)
            try:
                run = train_recipe(recipe, quiet=True, model=model, tokenizer=tokenizer, measure=False)
                if wanted is not None:
                    made["validation"] = statistics.mean(self._scores("validation", run.model, run.tokenizer))
                if wanted is None or wanted(made["validation"]):
                    made["rows"] = self._scores("test", run.model, run.tokenizer)
                trained = sum(g.parameter_count() for g in run.grafts) or sum(p.numel() for p in run.model.parameters())
                made |= {"trained": trained, "file": folder_bytes(run.graft), "curve": _curve(Path(place) / "run")}
            except TrainingError as error:  # it diverged; anything else is a fault of the claim or the data, and no result
                made["error"] = error.message
            finally:
                if model is not None:
                    for graft in list(state_of(model).grafts.values()):
                        graft.detach()
        return made

    def _shared(self, recipe: dict[str, Any]) -> tuple[Any, Any]:
        """A loaded dense base for an adapter; else none, and the run loads its own."""
        from .. import load

        task = task_of(self.task)
        train = recipe["train"]
        if (recipe.get("adapter", "lora") is None or recipe.get("storage", "dense") != "dense" or self.base == "scratch"
                or train.get("gradient_checkpointing")):
            return None, None
        key = (recipe["model"], self.task if task.classes else "causal_lm", train["precision"])
        if key not in _SHARED:
            _SHARED.clear()
            kind = {"task": "classification", "num_labels": len(task.classes)} if task.classes else {}
            _SHARED[key] = load(recipe["model"], dtype=train["precision"], **kind)
        return _SHARED[key]

    def _scores(self, split: str, model: Any, tokenizer: Any) -> list[float]:
        task = task_of(self.task)
        if task.classes is None:
            return row_losses(model, tokenizer, self.files[split], task.format, self.length, self.rows)
        from ..data import DataConfig
        from ..evaluation import evaluate

        found = evaluate(model, tokenizer, self.files[split], metrics=("loss",), labels=task.classes, batch_size=32, limit=self.rows,
                         config=DataConfig(train="-", format=task.format, max_length=self.length))
        return [100.0 * row["correct"] for row in found.rows]


def _curve(folder: Path) -> list[tuple[int, float]]:
    """[(step, validation loss)] of a run, one a step: the last evaluation may stand twice."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return sorted({line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}.items())


def row_losses(model: Any, tokenizer: Any, path: str, kind: str, length: int, limit: int | None = None) -> list[float]:
    """Mean negative log-likelihood (nats) of the trained tokens of each row of a file."""
    import torch
    import torch.nn.functional as F

    from ..data.dataset import build

    data = build(tokenizer, path, format=kind, max_length=length)
    collate, losses = data.collator(), []
    order = sorted(range(min(len(data), limit or len(data))), key=lambda i: len(data[i]["input_ids"]))
    with torch.no_grad():
        for first in range(0, len(order), 8):
            batch = collate([data[i] for i in order[first:first + 8]])
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
            labels = batch["labels"][:, 1:]
            asked = labels != -100
            if logits.shape[1] > labels.shape[1]:  # virtual tokens stand before the text
                logits = logits[:, logits.shape[1] - labels.shape[1]:]
            loss = F.cross_entropy(logits[asked].float(), labels[asked], reduction="none")
            losses += (torch.zeros(len(asked)).index_add_(0, asked.nonzero()[:, 0], loss) / asked.sum(1).clamp(min=1)).tolist()
    return [loss for _, loss in sorted(zip(order, losses))]
