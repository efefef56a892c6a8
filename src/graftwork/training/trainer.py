"""The Trainer: Transformers' loop around our step, our checkpoints and our log.

The Trainer sees one epoch whose batches are whole optimizer steps (gradient_accumulation_steps = 1, clipping off): the
estimator gets all micro-batches of a step at once, and a resume skips to a step without replaying data.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from ..errors import TrainingError
from ..files import atomic_write_text
from ..optim import load_optimizer_state, optimizer_state_tensors
from . import checkpoint as ckpt
from .batches import identity
from .schedule import GroupSchedule, NoOptimizer
from .step import TrainStep

#: keys of a metrics line that depend on the clock and on the process
TIME_FIELDS = ("seconds", "tokens_per_second", "process_bytes", "device_bytes")
#: times in a run at which what selections show of the sites is written down
MAPS = 64


class TrainerMixin:
    """For one's own Trainer or SFTTrainer on a model with grafts: saves and loads grafts only, not the base.

        class MyTrainer(graftwork.TrainerMixin, transformers.Trainer): ...

    Checkpoints then hold `graft/NAME/` folders instead of the model's weights. Each micro-batch sets the clock from which
    adapters draw their dropout: it depends on (seed, step, micro-batch), so a resume repeats it."""

    _graft_clock = (-1, -1)

    def training_step(self, model, inputs, *args, **kwargs):
        from ..modeling.state import state_of

        step = self.state.global_step
        micro = self._graft_clock[1] + 1 if self._graft_clock[0] == step else 0
        self._graft_clock = (step, micro)
        with state_of(self.model).scope(seed=self.args.seed, step=step, micro=micro):
            return super().training_step(model, inputs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        from ..modeling.state import state_of

        folder = Path(output_dir or self.args.output_dir)
        grafts = state_of(self.model).grafts
        if not grafts:
            return super()._save(output_dir, state_dict)
        for graft in grafts.values():
            graft.save(folder / "graft" / graft.name)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        from ..artifact import load_tensors, read_card, read_tensors
        from ..modeling.state import state_of

        grafts = state_of(self.model).grafts
        if not grafts:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        for graft in grafts.values():
            folder = Path(resume_from_checkpoint) / "graft" / graft.name
            card = read_card(folder)
            load_tensors(graft, read_tensors(folder, card), card)

    def _load_best_model(self) -> None:
        from ..modeling.state import state_of

        if not state_of(self.model).grafts:
            return super()._load_best_model()
        self._load_from_checkpoint(self.state.best_model_checkpoint)


class _Loader(torch.utils.data.Dataset):
    def __init__(self, steps: Any):
        self.steps = steps

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, i: int) -> Any:
        return self.steps[i]


class GraftTrainer(Trainer):
    """Runs a TrainStep over StepBatches. `evaluate_with()` gives the eval metrics; hooks of the run come as callbacks."""

    def __init__(self, step: TrainStep, batches: Any, output_dir: str | Path, *, factor: Callable[[dict[str, Any], int], float],
                 save_steps: int, save_total_limit: int | None, eval_steps: int = 0, logging_steps: int = 1,
                 early_stopping: int = 0, restore_best: bool = False, evaluate_with: Callable[[], dict[str, float]] | None = None,
                 tensorboard: bool = False, callbacks: list[TrainerCallback] | None = None, seed: int = 0,
                 describe_batch: Callable[..., str] | None = None, on_stopped: Callable[[str], None] | None = None):
        self.run, self.batches, self.factor, self.folder = step, batches, factor, Path(output_dir)
        self.evaluate_with, self.early_stopping, self.restore_best = evaluate_with, early_stopping, restore_best
        self.keep, self.window, self.every = save_total_limit, [], logging_steps
        self.best: dict[str, Any] = {"loss": None, "step": 0, "waited": 0, "at": -1}
        self.last_loss = math.nan
        self.describe_batch = describe_batch or (lambda batches, rows, member=None: "")
        self.on_stopped = on_stopped or (lambda text: None)
        self.tensorboard, self.board = tensorboard, None
        if tensorboard:
            _summary_writer()
        total = len(batches)
        args = TrainingArguments(
            output_dir=str(self.folder), max_steps=total, per_device_train_batch_size=1, gradient_accumulation_steps=1,
            max_grad_norm=0.0, save_strategy="steps" if save_steps else "no", save_steps=save_steps or total,
            eval_strategy="steps" if eval_steps and evaluate_with else "no", eval_steps=eval_steps or None, logging_strategy="no",
            report_to="none", disable_tqdm=True, remove_unused_columns=False, seed=seed, use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(), log_level="error")
        super().__init__(model=step.model, args=args, train_dataset=_Loader(batches),
                         eval_dataset=_Loader([None]) if evaluate_with else None, callbacks=callbacks)
        from transformers.trainer_callback import PrinterCallback

        self.remove_callback(PrinterCallback)

    # -- loop -------------------------------------------------------------------------------------------------------
    def train(self, *args, **kwargs):
        self._memory()  # what loading the model took is no step's
        return super().train(*args, **kwargs)

    def get_train_dataloader(self):
        return torch.utils.data.DataLoader(self.train_dataset, batch_size=1, shuffle=False, collate_fn=identity)

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            if self.run.optimizer is None:
                lr = getattr(self.run.estimator.config, "lr", 0.0)
                self.optimizer = NoOptimizer([p for _, p in self.run.parameters], lr)
            else:
                self.optimizer = self.run.optimizer
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.lr_scheduler is None:
            self.lr_scheduler = GroupSchedule(self._plain_optimizer(), self.factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _plain_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def training_step(self, model, inputs, num_items_in_batch=None):
        step = self.state.global_step
        model.train()
        self.run.forward_model = None if model is self.run.model else model
        start = time.perf_counter()
        if not inputs:  # the members of a fleet that had steps left have diverged
            return self._nothing_left()
        before = set(self.run.stopped)
        batches = [{k: v.to(self.args.device) if isinstance(v, torch.Tensor) else v for k, v in b.items()} for b in inputs]
        result = self.run.compute(batches, step, self.lr_scheduler.get_last_lr()[0])
        for name in [name for name in self.run.stopped if name not in before]:
            self.run.stopped[name] += self.describe_batch(inputs, result.rows, name)
            self.on_stopped(name)
        if self.run.stopped and len(self.run.stopped) == len(self.run.grafts):
            raise self._not_finite("; ".join(f"'{name}': {why}" for name, why in self.run.stopped.items()))
        loss, numbers = float(result.loss), {k: float(v) for k, v in result.metrics.items()}
        if self.run.stopped and not any(key.startswith("loss/") for key in numbers):
            return self._nothing_left()
        bad = [(what, x) for what, x in [("loss", loss), *numbers.items()] if not math.isfinite(x)]
        if bad:
            where = self.describe_batch(inputs, result.rows)
            raise self._not_finite(f"the {bad[0][0]} became {bad[0][1]} at step {step + 1}{where}")
        self.last_loss = loss
        self.window.append({"loss": loss, "tokens": sum(b.get("n_tokens", 0) for b in inputs),
                            "seconds": time.perf_counter() - start, "metrics": numbers})
        return result.loss

    def _nothing_left(self) -> torch.Tensor:
        self.control.should_training_stop = True
        return torch.zeros((), device=self.args.device)

    def _not_finite(self, what: str) -> TrainingError:
        last = ckpt.complete(self.folder)
        good = f"last good checkpoint: {last[-1]} (--resume)" if last else "there is no checkpoint yet"
        return TrainingError(what, remedy=f"lower the learning rate or look at those rows; {good}")

    def floating_point_ops(self, inputs) -> int:
        return 0

    def _get_grad_norm(self, model, grad_norm=None):
        return None

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time,
                                 learning_rate=None):
        step = self.state.global_step
        if self.window and (len(self.window) >= self.every or step == self.state.max_steps):
            self._write_window(step, learning_rate)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate)

    def _write_window(self, step: int, learning_rate: float) -> None:
        window, self.window = self.window, []
        tokens, seconds = sum(w["tokens"] for w in window), sum(w["seconds"] for w in window)
        row = {"step": step, "loss": sum(w["loss"] for w in window) / len(window), "lr": learning_rate}
        stride = -(-self.state.max_steps // MAPS)  # a function of the step: a resumed run writes the same lines
        maps = self.run.site_maps(step - 1) if step // stride > (step - len(window)) // stride else {}
        self.record({**row, **window[-1]["metrics"], "tokens": tokens, "seconds": round(seconds, 4), "steps": len(window),
                     "tokens_per_second": round(tokens / max(seconds, 1e-9), 1), **self._memory(), **({"sites": maps} if maps else {})})

    def _memory(self) -> dict[str, int]:
        """Highest bytes since the last line: of the process, and of tensors on the device."""
        from ..planning.measure import window_peaks

        return window_peaks()

    def record(self, row: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl (and TensorBoard)."""
        line = (json.dumps(row) + "\n").encode()
        with open(self.folder / "metrics.jsonl", "ab") as out:
            out.write(line)
        if self.tensorboard:
            if self.board is None:
                self.board = _summary_writer()(str(self.folder / "tensorboard"), purge_step=row["step"])
            for key, value in row.items():
                if isinstance(value, (int, float)) and key != "step":
                    self.board.add_scalar(key, value, row["step"])

    # -- evaluation ---------------------------------------------------------------------------------------------------
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        self.model.eval()
        metrics = {f"eval_{k}": v for k, v in self.evaluate_with().items()}
        step = self.state.global_step
        self.record({"step": step, **metrics, **self._memory()})
        if not math.isfinite(metrics["eval_loss"]):
            raise self._not_finite(f"the eval loss became {metrics['eval_loss']} at step {step}")
        better = self.best["loss"] is None or metrics["eval_loss"] < self.best["loss"]
        self.best = ({"loss": metrics["eval_loss"], "step": step, "waited": 0, "at": step} if better else
                     {**self.best, "waited": self.best["waited"] + 1, "at": step})
        if better and self.restore_best:
            self._write_checkpoint(self.folder / "checkpoints" / "best")
        if self.early_stopping and self.best["waited"] >= self.early_stopping:
            self.control.should_training_stop = True
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # -- checkpoints ---------------------------------------------------------------------------------------------------
    def _names(self) -> dict[torch.nn.Parameter, str]:
        return {p: n for n, p in self.run.parameters}

    def _save_checkpoint(self, model, trial) -> None:
        self._write_checkpoint(ckpt.folder_of(self.folder, self.state.global_step))
        ckpt.rotate(self.folder, self.keep)

    def _write_checkpoint(self, folder: Path) -> None:
        optimizer, header = {}, None
        if self.run.optimizer is not None:
            optimizer, header = optimizer_state_tensors(self.run.optimizer, self._names())
        parts: dict[str, torch.Tensor] = {}
        learned = ckpt.learned_tensors(self.run.model, self.run.parameters, self.run.grafts)
        spoilt = [k for k, t in learned.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())
                  and k.split(":")[-1].split("/")[0] not in self.run.stopped]
        if spoilt:
            raise self._not_finite(f"{spoilt[0]} is no longer finite at step {self.state.global_step}")
        metrics = self.folder / "metrics.jsonl"
        if metrics.exists():
            sync_file(metrics)  # its length is part of the checkpoint
        progress = {
            "step": self.state.global_step, "optimizer": header, "schedule": self.lr_scheduler.state_dict(),
            "estimator": ckpt.split(self.run.estimator.state_dict(), "estimator", parts),
            "selections": [{"structure": s.structure(), "state": ckpt.split(s.state_dict(), f"selection{i}", parts)}
                           for i, s in enumerate(self.run.selections)],
            "best": self.best, "diverged": self.run.stopped, "window": self.window,
            "metrics_bytes": metrics.stat().st_size if metrics.exists() else 0,
            "stopped": bool(self.early_stopping and self.best["waited"] >= self.early_stopping),
        }
        ckpt.write(folder, learned=learned, optimizer=optimizer, parts=parts,
                   progress=progress, trainer_state=json.dumps(_plain_state(self.state)))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        """Structure first, then tensors; the optimizer follows when it exists."""
        folder = Path(resume_from_checkpoint)
        for selection, saved in zip(self.run.selections, ckpt.read_progress(folder)["selections"]):
            selection.restore_structure(saved["structure"], self.run.model, self.run.grafts[0] if self.run.grafts else None)
        ckpt.restore_learned(folder, self.run.model, self.run.parameters, self.run.grafts)

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        progress, parts = ckpt.read_progress(folder), ckpt.read(folder, "parts")
        if self.run.optimizer is not None:
            load_optimizer_state(self.run.optimizer, ckpt.read(folder, "optimizer"), progress["optimizer"], self._names())
        self.lr_scheduler.load_state_dict(progress["schedule"])
        self.run.estimator.load_state_dict(ckpt.join(progress["estimator"], parts))
        for selection, saved in zip(self.run.selections, progress["selections"]):
            selection.load_state_dict(ckpt.join(saved["state"], parts))
        self._take(progress)

    def _take(self, progress: dict[str, Any]) -> None:
        self.best, self.window = progress["best"], progress["window"]
        self.run.stopped.update(progress.get("diverged", {}))
        self._cut_metrics(progress["metrics_bytes"])

    def load_finished(self, folder: Path) -> None:
        """Take the place of `train` for a run that early stopping had ended when this checkpoint was written."""
        self._load_from_checkpoint(folder)
        progress = ckpt.read_progress(folder)
        self._take(progress)
        self.state.global_step = progress["step"]

    def close(self) -> None:
        """Flush what is open, also after a failure."""
        if self.board is not None:
            self.board.close()
            self.board = None

    def _cut_metrics(self, size: int) -> None:
        """Lines after the checkpoint are of steps that will be redone."""
        metrics = self.folder / "metrics.jsonl"
        if metrics.exists() and metrics.stat().st_size > size:
            atomic_write_text(metrics, metrics.read_bytes()[:size].decode())

    def _load_rng_state(self, checkpoint) -> None:
        if checkpoint is not None:
            folder = Path(checkpoint)
            ckpt.set_rng_state(ckpt.read(folder, "rng"), ckpt.read_progress(folder)["rng"])

    def _load_scaler(self, checkpoint) -> None:
        return None

    def load_best(self) -> int | None:
        """Put the weights of the best evaluation back; returns its step."""
        folder = self.folder / "checkpoints" / "best"
        if not folder.exists():
            return None
        self._load_from_checkpoint(folder)  # a selection may have changed the structure since
        return ckpt.read_progress(folder)["step"]


def sync_file(path: Path) -> None:
    with open(path, "rb+") as handle:
        os.fsync(handle.fileno())


def _plain_state(state: Any) -> dict[str, Any]:
    kept = ("global_step", "max_steps", "epoch", "num_train_epochs", "train_batch_size", "logging_steps", "eval_steps",
            "save_steps")
    return {k: getattr(state, k) for k in kept if hasattr(state, k)}


def _summary_writer():
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise TrainingError("report_to: tensorboard needs the package tensorboard", remedy="pip install tensorboard") from None
    return SummaryWriter
