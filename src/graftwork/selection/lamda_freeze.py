"""LaMDA's schedule: the columns of each adapter's output factor stop training one after another (arXiv 2406.12832).

    before optimizer step i of T:  t_i = min(r, floor(r i / (fraction T))) columns of B (out, r) are frozen, the first (of the largest
    singular values) first; from step fraction T on, B is frozen as a whole and only the inner factors train

A frozen column does not move by a bit, whatever the optimizer: its gradient is cleared before clipping, and its values are put
back after the step, since momentum and weight decay would go on moving a column without gradient. When the last column is
frozen, B asks for no gradient any more and its optimizer state is dropped: this is where the memory is saved.

Made for `lamda`; it acts on every graft with an output factor of this form (`lora` too). The count is a function of the step, so
a resume needs nothing. Differs from the released code, whose schedule lacks the factor r (at most three columns are ever frozen)
and which clears gradients alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from pydantic import Field
from torch import Tensor, nn

from ..errors import UsageError
from ..registry import MethodConfig, register
from .base import Selection, SelectionContext, drop_state

#: what output factors (out, r) are called
FACTORS = ("B", "lora_B")


class LaMDAFreeze(MethodConfig):
    """Options of `lamda_freeze`."""

    fraction: float = Field(0.3, gt=0.0, le=1.0, description="share of the run after which all columns are frozen")


@register("selection", "lamda_freeze", config=LaMDAFreeze, paper="2406.12832",
          title="LaMDA: Large Model Fine-Tuning via Spectrally Decomposed Low-Dimensional Adaptation",
          summary="freezes the columns of the adapters' output factors one by one early in the run",
          bibtex="@inproceedings{azizi2024lamda, title={LaMDA: Large Model Fine-Tuning via Spectrally Decomposed Low-Dimensional "
                 "Adaptation}, author={Azizi, Seyedarmin and Kundu, Souvik and Pedram, Massoud}, booktitle={Findings of EMNLP}, "
                 "year={2024}}")
class LaMDAFreezeSelection(Selection):
    shows = "share of the columns that train"

    def __init__(self, config: LaMDAFreeze | None = None):
        super().__init__(config or LaMDAFreeze())
        self._kept: list[tuple[nn.Parameter, Tensor]] = []

    def frozen_columns(self, r: int, step: int, total: int) -> int:
        """t_i of an output factor with r columns."""
        return min(r, int(r * step / (self.config.fraction * max(total, 1)) + 1e-9))

    def begin(self, ctx: SelectionContext) -> None:
        if not any(True for _ in output_factors(ctx)):
            raise UsageError("lamda_freeze freezes the columns of an output factor, and the graft has none that trains",
                             remedy="use it with adapter: lamda (or lora), or remove it")
        self._freeze_whole(ctx)

    def before_step(self, ctx: SelectionContext) -> None:
        self._freeze_whole(ctx)
        self._kept = []
        for factor in output_factors(ctx):
            count = self.frozen_columns(factor.shape[1], ctx.step, ctx.total_steps)
            if count:
                self._kept.append((factor, factor.detach()[:, :count].clone()))

    def after_backward(self, ctx: SelectionContext) -> None:
        for factor, kept in self._kept:
            if factor.grad is not None:
                factor.grad[:, : kept.shape[1]] = 0.0

    def after_step(self, ctx: SelectionContext) -> None:
        with torch.no_grad():
            for factor, kept in self._kept:
                factor[:, : kept.shape[1]] = kept
        self._kept = []

    def site_map(self, ctx: SelectionContext) -> dict[str, float]:
        """Of each output factor, by the name of its site."""
        found = {}
        for name, parameter in ctx.parameters:
            site, _, last = name.rpartition(".")
            if last in FACTORS and parameter.dim() == 2:
                found[site] = 1.0 - self.frozen_columns(parameter.shape[1], ctx.step, ctx.total_steps) / parameter.shape[1]
        return found

    def _freeze_whole(self, ctx: SelectionContext) -> None:
        for factor in output_factors(ctx):
            if factor.requires_grad and self.frozen_columns(factor.shape[1], ctx.step, ctx.total_steps) == factor.shape[1]:
                factor.requires_grad_(False)
                factor.grad = None
                drop_state(ctx.optimizer, factor)


def output_factors(ctx: SelectionContext) -> Iterator[nn.Parameter]:
    """The output factors among the run's parameters, whether frozen by now or not."""
    for name, parameter in ctx.parameters:
        if name.rpartition(".")[2] in FACTORS and parameter.dim() == 2:
            yield parameter
