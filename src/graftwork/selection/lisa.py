"""LISA: layer-wise importance sampling (arXiv 2403.17919). Full tuning in which few decoder layers train at a time.

    at step 0 and every `interval` steps: draw `layers` of the L decoder layers uniformly without replacement; only these, and
    (with always_on) embeddings, output head and final norm, train until the next draw.

Differs from the official code: the gradients *and the optimizer state* of layers that are frozen again are dropped, so memory
does not grow towards that of full AdamW; the optimizer is built over all layers before any is frozen, so every layer can
train later; the draw is a function of (seed, interval number), so a resume repeats it. always_on=false freezes the
embedding group too, which is most of what LISA trains on small or large-vocabulary models (no input needs a gradient for
that: activation checkpointing is non-reentrant here).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import Field

from ..errors import UsageError
from ..registry import MethodConfig, register
from .base import SHARE, Selection, SelectionContext, decoder_blocks, train_only


class LISA(MethodConfig):
    """Options of `lisa`."""

    layers: int = Field(2, ge=1, description="decoder layers that train at a time (gamma)")
    interval: int = Field(20, ge=1, description="optimizer steps between draws (K)")
    always_on: bool = Field(True, description="train embeddings, head and final norm all the time")


@register("selection", "lisa", config=LISA, title="LISA: Layerwise Importance Sampling", paper="2403.17919",
          summary="full tuning of a few random layers at a time; state of the others is dropped",
          bibtex="@inproceedings{pan2024lisa, title={LISA: Layerwise Importance Sampling for Memory-Efficient Large Language "
                 "Model Fine-Tuning}, author={Pan, Rui and Liu, Xiang and Diao, Shizhe and Pi, Renjie and Zhang, Jipeng and "
                 "Han, Chi and Zhang, Tong}, booktitle={NeurIPS}, year={2024}}")
class LISASelection(Selection):
    full_tuning_only = True
    shows = SHARE

    def __init__(self, config: LISA | None = None):
        super().__init__(config or LISA())
        self._drawn = -1

    def begin(self, ctx: SelectionContext) -> None:
        """Draw for the interval that ctx.step is in; the optimizer must know all parameters by now."""
        self._apply(ctx)

    def before_step(self, ctx: SelectionContext) -> None:
        if ctx.step // self.config.interval != self._drawn:
            self._apply(ctx)

    def heaviest_steps(self, ctx: SelectionContext) -> range:
        """The interval whose draw takes the most memory (`weight_of_draw`)."""
        total = len(decoder_blocks(ctx.model))
        return heaviest_interval(ctx, self.config, lambda interval: self.active_layers(ctx.seed, interval, total))

    def active_layers(self, seed: int, interval: int, total: int) -> list[int]:
        """The layers drawn for one interval, sorted."""
        if self.config.layers > total:
            raise UsageError(f"lisa: layers = {self.config.layers}, but the model has {total}", remedy=f"choose at most {total}")
        return sorted(sorted(range(total), key=lambda layer: draw(seed, interval, layer))[: self.config.layers])

    def _apply(self, ctx: SelectionContext) -> None:
        self._drawn = ctx.step // self.config.interval
        blocks = decoder_blocks(ctx.model)
        active = self.active_layers(ctx.seed, self._drawn, len(blocks))
        inside = {id(p) for block in blocks for p in block.parameters()}
        chosen = {id(p) for i in active for p in blocks[i].parameters()}
        train_only(ctx, chosen | {id(p) for _, p in ctx.parameters if self.config.always_on and id(p) not in inside})


def weight_of_draw(active: Sequence[int], always_on: bool) -> tuple[int, int]:
    """What orders draws of equal blocks by the peak of their step: how deep the backward pass goes (to the embedding if that trains),
    then how high the layers are, whose gradients are there while the activations below them still are."""
    return (0 if always_on else -min(active)), sum(active)


def heaviest_interval(ctx: SelectionContext, config: Any, active: Callable[[int], Sequence[int]]) -> range:
    """The steps of the heaviest of the run's first 200 intervals. config: with `interval` and `always_on`; active: the layers drawn for
    an interval."""
    length = config.interval
    intervals = range(max(1, min(200, -(-ctx.total_steps // length))))
    start = length * max(intervals, key=lambda interval: (*weight_of_draw(active(interval), config.always_on), -interval))
    return range(start, max(ctx.total_steps, start + 1))[:length]


def draw(seed: int, interval: int, layer: int) -> float:
    """A number from (0, 1), one for each layer and interval; the layers with the smallest are drawn. A hash, not a generator: it is
    the same also while a simulation runs on fake tensors."""
    digest = hashlib.blake2b(f"lisa/{seed}/{interval}/{layer}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") + 0.5) / 2**64
