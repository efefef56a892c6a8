"""SoRA's proximal step: gates of adapter `sora` are shrunk after each optimizer step and become exactly zero (arXiv 2311.11696).

    g <- sign(g) max(|g| - xi, 0)      the proximal operator of xi |.|_1

xi is `threshold`; by_rate multiplies it by the gates' learning rate (the paper's eta lambda; the official code does not). With
`final_threshold` the run keeps `threshold` for its first `hold` share and then raises xi in `stages` equal steps of time to
final_threshold, linearly or (spacing: log) by equal factors: the paper's schedule within one run.

A gate that is zero may come back: its gradient or the optimizer's momentum moves it, and the next proximal step judges it
again. After the last step all gates are judged, so the zeros of the artifact are exact.

official: the operator of the official code, whose last statement also zeroes what was shrunk to below xi: zero below 2 xi, shrunk
by xi from there.

Acts on events alone; no state: the threshold is a function of the step.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..errors import UsageError
from ..registry import MethodConfig, register
from .base import Selection, SelectionContext, live_ranks


class SoRASchedule(MethodConfig):
    """Options of `sora`."""

    threshold: float = Field(3e-4, gt=0.0, description="xi, by which each step shrinks the gates")
    final_threshold: float | None = Field(None, gt=0.0, description="xi at the end; default: constant")
    stages: int = Field(5, ge=1, description="stages from threshold to final_threshold")
    hold: float = Field(0.5, ge=0.0, lt=1.0, description="share of the run before the first stage")
    spacing: Literal["linear", "log"] = "linear"
    by_rate: bool = Field(False, description="xi times the learning rate of the gates")
    official: bool = Field(False, description="the official code's operator, which zeroes everything below 2 xi")

    @model_validator(mode="before")
    @classmethod
    def _stages_need_an_end(cls, data):
        idle = [k for k in ("stages", "hold", "spacing") if k in data] if isinstance(data, dict) else []
        if idle and data.get("final_threshold") is None and any(data[k] != cls.model_fields[k].default for k in idle):
            raise ValueError(f"{', '.join(idle)}: without final_threshold the threshold is constant")
        return data


@register("selection", "sora", config=SoRASchedule, title="SoRA: proximal gradient on the gates", paper="2311.11696",
          summary="soft-thresholds the gates of adapter sora after each step, on a schedule; ranks become exactly zero",
          bibtex="@inproceedings{ding2023sora, title={Sparse Low-rank Adaptation of Pre-trained Language Models}, author={Ding, Ning "
                 "and Lv, Xingtai and Wang, Qiaosen and Chen, Yulin and Zhou, Bowen and Liu, Zhiyuan and Sun, Maosong}, "
                 "booktitle={EMNLP}, year={2023}}")
class SoRASelection(Selection):
    adapters = ("sora",)
    shows = "rank"

    def begin(self, ctx: SelectionContext) -> None:
        self.check_graft(ctx)
        if self.config.by_rate and ctx.optimizer is None:
            raise UsageError("selection 'sora': by_rate needs an optimizer's learning rate", remedy="by_rate: false")

    def threshold_at(self, step: int, total: int) -> float:
        """xi of step `step` (from 0) of `total`."""
        c = self.config
        if c.final_threshold is None or step < c.hold * total:
            return c.threshold
        passed = (step - c.hold * total) / max((1.0 - c.hold) * total, 1.0)
        share = (min(int(passed * c.stages), c.stages - 1) + 1) / c.stages
        if c.spacing == "log":
            return c.threshold * (c.final_threshold / c.threshold) ** share
        return c.threshold + (c.final_threshold - c.threshold) * share

    def site_map(self, ctx: SelectionContext) -> dict[str, float]:
        return live_ranks(ctx)

    @torch.no_grad()
    def after_step(self, ctx: SelectionContext) -> None:
        xi = self.threshold_at(ctx.step, ctx.total_steps)
        rates = {}
        if self.config.by_rate:
            rates = {id(p): group["lr"] for group in ctx.optimizer.param_groups for p in group["params"]}
        for adapter in ctx.graft.adapters.values():
            shrink(adapter.gate, xi * rates.get(id(adapter.gate), 1.0), official=self.config.official)


def shrink(gate: Tensor, xi: float, *, official: bool = False) -> None:
    """The proximal operator of xi |.|_1, in place on a tensor of any shape; official: zero below 2 xi."""
    size = gate.abs() - xi
    size = size.where(size >= xi, torch.zeros_like(size)) if official else size.clamp_min(0.0)
    gate.copy_(gate.sign() * size)
