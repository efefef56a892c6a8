"""BAdam: block coordinate descent (arXiv 2404.02827). Full tuning of one block at a time, for `interval` steps each, in an order.

    step t trains block order[(t // interval) mod B]        order: random (a new permutation each cycle), ascending, descending
    blocks: the L decoder layers; with embeddings = true also what is before and after them, as one more block at either end

Each cycle visits every block once. At a switch the gradients and the optimizer state of the block before are dropped, as published,
so memory is that of one block; its moments and step counts start anew at its next turn. Nothing trains all the time: the rest
(embeddings, head, final norm) stays as it is unless it is a block. Tensors before the first layer are those that come before it in the
model; a tied head is with the embeddings. The order is a function of (seed, cycle): a resume repeats it.

Differs from the official package: it keeps an fp32 master copy of the active block of a 16-bit model; here the weights have the
precision of the recipe (fp32 learned tensors by default).
"""

from __future__ import annotations

import hashlib
from typing import Literal

from pydantic import Field

from ..registry import MethodConfig, register
from .base import SHARE, Selection, SelectionContext, parts_of_model, train_only


class BAdam(MethodConfig):
    """Options of `badam`."""

    interval: int = Field(50, ge=1, description="optimizer steps that a block trains (K)")
    order: Literal["random", "ascending", "descending"] = "random"
    embeddings: bool = Field(False, description="the tensors before and after the layers are blocks too")


@register("selection", "badam", config=BAdam, title="BAdam: block coordinate descent", paper="2404.02827",
          summary="full tuning of one layer at a time, in turn; gradients and state of the others do not exist",
          bibtex="@inproceedings{luo2024badam, title={BAdam: A Memory Efficient Full Parameter Optimization Method for Large Language "
                 "Models}, author={Luo, Qijun and Yu, Hengxu and Li, Xiao}, booktitle={NeurIPS}, year={2024}}")
class BAdamSelection(Selection):
    full_tuning_only = True
    shows = SHARE

    def __init__(self, config: BAdam | None = None):
        super().__init__(config or BAdam())
        self._turn = -1

    def begin(self, ctx: SelectionContext) -> None:
        """The block of the turn that ctx.step is in; the optimizer must know all parameters by now."""
        self._apply(ctx)

    def before_step(self, ctx: SelectionContext) -> None:
        if ctx.step // self.config.interval != self._turn:
            self._apply(ctx)

    def heaviest_steps(self, ctx: SelectionContext) -> range:
        """The first turn of the largest block; of equal ones that of the lowest, whose backward pass is the longest."""
        sizes, interval = {id(p): p.numel() for _, p in ctx.parameters}, self.config.interval
        blocks = self.blocks(ctx)
        turns = range(len(blocks) if ctx.total_steps <= 1 else min(len(blocks), -(-ctx.total_steps // interval)))  # a run of unknown length
        trained = {turn: self.active_block(ctx.seed, turn, len(blocks)) for turn in turns}
        turn = max(trained, key=lambda turn: (sum(sizes.get(key, 0) for key in blocks[trained[turn]]), -trained[turn]))
        return range(turn * interval, max(ctx.total_steps, turn * interval + 1))[:interval]

    def active_block(self, seed: int, turn: int, total: int) -> int:
        """Which of `total` blocks trains in that turn."""
        cycle, place = divmod(turn, total)
        if self.config.order == "random":
            return sorted(range(total), key=lambda b: hashlib.blake2b(f"badam/{seed}/{cycle}/{b}".encode(), digest_size=8).digest())[place]
        return place if self.config.order == "ascending" else total - 1 - place

    def blocks(self, ctx: SelectionContext) -> list[set[int]]:
        """The ids of each block's parameters, in the order of the model."""
        before, layers, after = parts_of_model(ctx)
        return [block for block in (before, *layers, after) if block] if self.config.embeddings else layers

    def _apply(self, ctx: SelectionContext) -> None:
        self._turn = ctx.step // self.config.interval
        blocks = self.blocks(ctx)
        train_only(ctx, blocks[self.active_block(ctx.seed, self._turn, len(blocks))])
