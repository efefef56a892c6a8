"""Freeze and unfreeze: what trains from which step to which. Gradual unfreezing from the top is ULMFiT's (arXiv 1801.06146).

    the model from the top: head side (what comes after the layers), layers L .. 1, input side (embeddings; a tied head)
    gradual: unfreeze   stage k = t // interval trains the head side and the top (k + 1) `layers` layers; the stage after the one
                        that reaches layer 1 adds the input side
    gradual: freeze     the reverse: all trains at first; stage k >= 1 has frozen the input side and the lowest (k - 1) `layers`
                        layers; the head side and the top `layers` layers always train
    windows             {pattern: [start, stop]}: a parameter whose name the regular expression is found in trains in steps
                        start <= t < stop (stop null: to the end; [0, 0]: never), whatever `gradual` says; the first pattern counts

Times below 1 are shares of the run. With gradual: null everything outside of the windows trains all the time.

At a change the gradients and the optimizer state of what is frozen are dropped, as in `lisa` and `badam`: what is frozen holds no byte but
its value, and what trains again starts as a new parameter. Works on full weights and on adapters alike (a graft's tensors belong to
the layer that they are in). The set is a function of the step, so a resume needs nothing. A schedule that leaves some step with nothing to
train is refused.

Differs from ULMFiT: times are in steps instead of whole epochs; its rates per layer and their slanted schedule are not part of this.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Literal

from pydantic import Field, field_validator, model_validator

from ..errors import UsageError
from ..registry import MethodConfig, register
from .base import SHARE, Selection, SelectionContext, parts_of_model, train_only

#: the stop of what trains to the end
NEVER = 1 << 62


class Freeze(MethodConfig):
    """Options of `freeze`."""

    gradual: Literal["unfreeze", "freeze"] | None = Field("unfreeze", description="layers join from the top, or leave from below; null: "
                                                                                  "windows alone")
    interval: float = Field(0.1, gt=0.0, description="time between two stages: steps; below 1: share of the run")
    layers: int = Field(1, ge=1, description="layers that change at a stage")
    windows: dict[str, tuple[float, float | None]] = Field({}, description="pattern of parameter names -> [start, stop]")

    @field_validator("windows")
    @classmethod
    def _patterns(cls, windows):
        for pattern, (start, stop) in windows.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
            if start < 0 or (stop is not None and stop < 0):
                raise ValueError(f"{pattern!r}: times cannot be negative")
        return windows

    @model_validator(mode="after")
    def _something_changes(self):
        if self.gradual is None:
            if not self.windows:
                raise ValueError("neither gradual nor windows: nothing would ever be frozen")
            idle = {"interval", "layers"} & self.model_fields_set
            if any(getattr(self, name) != type(self).model_fields[name].default for name in idle):
                raise ValueError(f"{', '.join(sorted(idle))}: without gradual there are no stages")
        return self


def in_steps(time: float, total: int) -> int:
    """A time of the options as a number of steps."""
    return int(time * total + 1e-9) if time < 1 else int(time)


@register("selection", "freeze", config=Freeze, title="Freezing and gradual unfreezing (ULMFiT)", paper="1801.06146",
          summary="trains layers or named parameters from one step to another; state of what is frozen is dropped",
          bibtex="@inproceedings{howard2018ulmfit, title={Universal Language Model Fine-tuning for Text Classification}, "
                 "author={Howard, Jeremy and Ruder, Sebastian}, booktitle={ACL}, year={2018}}")
class FreezeSelection(Selection):
    shows = SHARE

    def __init__(self, config: Freeze | None = None):
        super().__init__(config or Freeze())
        self._spans: dict[int, tuple[int, int]] = {}  # id of a parameter -> (first step, step after the last)

    def begin(self, ctx: SelectionContext) -> None:
        """The spans of all parameters, and what trains in ctx.step."""
        self._spans = self.spans(ctx)
        for change in sorted({0, *(t for span in self._spans.values() for t in span)}):
            if change < ctx.total_steps and not self.active(change):
                raise UsageError(f"selection 'freeze' leaves nothing to train in step {change + 1}",
                                 remedy="let some window begin earlier or end later, or train more of the model")
        train_only(ctx, self.active(ctx.step))

    def before_step(self, ctx: SelectionContext) -> None:
        if any(ctx.step in span for span in self._spans.values()):
            train_only(ctx, self.active(ctx.step))

    def active(self, step: int) -> set[int]:
        """The ids of what trains in a step."""
        return {key for key, (first, last) in self._spans.items() if first <= step < last}

    def heaviest_steps(self, ctx: SelectionContext) -> range:
        self._spans, sizes = self.spans(ctx), {id(p): p.numel() for _, p in ctx.parameters}
        end = ctx.total_steps if ctx.total_steps > 1 else NEVER  # a run of unknown length is planned as one step: all its stages count
        changes = sorted({0, end, *(time for span in self._spans.values() for time in span if time < end)})
        return max((range(*pair) for pair in pairwise(changes)), key=lambda steps: sum(sizes[key] for key in self.active(steps.start)))

    def spans(self, ctx: SelectionContext) -> dict[int, tuple[int, int]]:
        """The steps in which each of the run's parameters trains."""
        staged, total, found = self._stages(ctx), ctx.total_steps, {}
        for name, parameter in ctx.parameters:
            window = next((w for pattern, w in self.config.windows.items() if re.search(pattern, name)), None)
            if window is None:
                found[id(parameter)] = staged.get(id(parameter), (0, NEVER))
                continue
            first, last = in_steps(window[0], total), NEVER if window[1] is None else in_steps(window[1], total)
            if last < first:
                raise UsageError(f"selection 'freeze': the window of '{name}' stops in step {last}, before it starts in step {first}",
                                 remedy="write windows as [start, stop]")
            found[id(parameter)] = first, last
        for pattern in self.config.windows:
            if not any(re.search(pattern, name) for name, _ in ctx.parameters):
                raise UsageError(f"selection 'freeze': no trained parameter has {pattern!r} in its name",
                                 remedy=f"names look like {ctx.parameters[0][0]}")
        return found

    def _stages(self, ctx: SelectionContext) -> dict[int, tuple[int, int]]:
        """The spans that `gradual` gives to the input side and the layers; what it does not name trains all the time."""
        if self.config.gradual is None:
            return {}
        before, layers, _ = parts_of_model(ctx)
        groups = [set().union(*layers[max(0, end - self.config.layers):end]) for end in range(len(layers), 0, -self.config.layers)]
        groups, every = [*groups, before], max(1, in_steps(self.config.interval, ctx.total_steps))
        spans = [(stage * every, NEVER) for stage in range(len(groups))]
        if self.config.gradual == "freeze":
            spans = [(0, NEVER if not stage else (len(groups) - stage) * every) for stage in range(len(groups))]
        return {key: span for group, span in zip(groups, spans) for key in group}
