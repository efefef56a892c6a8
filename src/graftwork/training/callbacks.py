"""Events of a run: progress on stderr, Ctrl-C, the peak of one step, and the selections' turn after each step."""

from __future__ import annotations

import signal
import sys
import time
from typing import Any

from transformers import TrainerCallback

from .step import TrainStep


class AfterStep(TrainerCallback):
    """Tells the selections that the optimizer has moved."""

    def __init__(self, step: TrainStep):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        self.step.finish(state.global_step - 1)


class Interrupt(TrainerCallback):
    """First Ctrl-C (or SIGTERM): finish the step, write a checkpoint, stop. A second one stops at once."""

    def __init__(self, say=lambda text: None):
        self.asked, self.say, self._before = False, say, {}

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._handle)
            except ValueError:  # not the main thread: the caller keeps its own handling
                pass
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number, frame) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self.say("stopping after this step; the run can be resumed with --resume")

    def on_step_end(self, args, state, control, **kwargs):
        if self.asked:
            control.should_save = control.should_training_stop = True


class PeakOfStep(TrainerCallback):
    """Measures the memory peak of one step, the heaviest of the run, from allocator events."""

    def __init__(self, meter: Any, at: int = 1):
        self.meter, self.at, self.result, self.step, self._running = meter, at, None, None, None

    def on_step_begin(self, args, state, control, **kwargs):
        if self.result is None and self._running is None and state.global_step >= min(self.at, state.max_steps - 1):
            self._running = self.meter()
            self._running.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        if self._running is not None:
            self.close()
            self.result, self.step = self._last.peak, state.global_step

    def close(self) -> None:
        """Ends a measurement that a failing step left running (there is one profiler per process)."""
        if self._running is not None:
            self._last, self._running = self._running, None
            self._last.__exit__(None, None, None)


class Progress(TrainerCallback):
    """A progress bar on a terminal, a plain line every few seconds elsewhere, nothing when quiet."""

    def __init__(self, label: str, trainer: Any = None, *, quiet: bool = False, interval: float = 10.0):
        self.label, self.trainer, self.quiet, self.interval = label, trainer, quiet, interval
        self._bar = self._task = None
        self._last = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self._start, self._first = time.monotonic(), state.global_step
        if not self.quiet and sys.stderr.isatty():
            from rich import progress as rp
            from rich.console import Console

            columns = (rp.TextColumn("{task.description}"), rp.BarColumn(), rp.MofNCompleteColumn(),
                       rp.TextColumn("loss {task.fields[loss]}"), rp.TimeElapsedColumn(), rp.TimeRemainingColumn())
            self._bar = rp.Progress(*columns, console=Console(stderr=True), transient=False)
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=state.max_steps, completed=state.global_step, loss="-")

    def on_step_end(self, args, state, control, **kwargs):
        loss = self.trainer.last_loss if self.trainer is not None else float("nan")
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step, loss=f"{loss:.4f}")
        elif not self.quiet and (time.monotonic() - self._last > self.interval or state.global_step == state.max_steps):
            self._last = time.monotonic()
            rate = (self._last - self._start) / max(state.global_step - self._first, 1)
            left = rate * (state.max_steps - state.global_step)
            print(f"{self.label}: step {state.global_step}/{state.max_steps}  loss {loss:.4f}  {rate:.2f} s/step  "
                  f"{left:.0f} s left", file=sys.stderr, flush=True)

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
