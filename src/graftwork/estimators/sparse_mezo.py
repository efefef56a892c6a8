"""Sparse MeZO (arXiv 2402.15751): MeZO in which only a part of the entries is perturbed and moves, by default the small ones.

    h_i = the (1 - sparsity) quantile of |theta_i|, per tensor, taken once before the first step
    m = 1 where |theta| <= h_i       (magnitude)      or drawn anew every `resample` steps, 1 with probability 1 - sparsity (random)
    c_q = (L(theta + eps m z_q) - L(theta - eps m z_q)) / (2 eps),   theta <- theta - lr m (mean_q c_q z_q + wd theta)

m is that of the unperturbed theta in both forwards and in the update. A model's own tensors (full tuning) are therefore perturbed
inside their modules' forward and copied back at its end, so that m never sees a perturbed weight, and one module's copy is alive at a
time: the paper's memory-efficient form. An adapter's tensors are moved in place, with m kept for the step, one byte an entry. Random masks
need no such care. State: one fp32 number per tensor (magnitude), none (random). Memory: the forward, one module's tensors, one piece.

h is the exact order statistic, found by bisection over the bits of fp32 numbers: counting passes over pieces, no sorted copy. A
tensor whose entries all have the same size (a fresh lora_B, unit norms) has no small ones: it moves as a whole. Thresholds are
fixed, as published: weights drift across them, and so does the share that moves.

Differs from the paper's listing: |theta| is compared, not theta. The official code could not be had.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..registry import register
from . import mezo
from ._spsa import SPSA, SPSAEstimator
from .base import StepContext
from .mezo import Named


class SparseMeZO(SPSA):
    """Options of `sparse_mezo`."""

    sparsity: float = Field(0.8, ge=0, lt=1, description="share of each tensor's entries that stay")
    mask: Literal["magnitude", "random"] = Field("magnitude", description="which entries move: the smallest, or any")
    resample: int = Field(1, ge=1, description="steps that a random mask lasts")


@register("estimator", "sparse_mezo", config=SparseMeZO, paper="2402.15751", title="Sparse MeZO",
          summary="MeZO on the small weights only, which bear larger rates; the memory of inference",
          bibtex="@inproceedings{liu2025sparsemezo, title={Sparse MeZO: Less Parameters for Better Performance in Zeroth-Order LLM "
                 "Fine-Tuning}, author={Liu, Yong and Zhu, Zirui and Gong, Chaoyu and Cheng, Minhao and Hsieh, Cho-Jui and You, Yang}, "
                 "booktitle={NeurIPS}, year={2025}}")
class SparseMeZOEstimator(SPSAEstimator):
    """Difference -> masked g -> SGD."""

    def __init__(self, config: SparseMeZO | None = None):
        super().__init__(config)
        self.thresholds: dict[str, Tensor] = {}
        self._fixed: dict[str, Tensor] = {}  # masks of tensors that are perturbed in place, while a step lasts
        self._draw: tuple = ()

    def step(self, ctx: StepContext):
        self._draw = (ctx.seed, ctx.step // self.config.resample, "mask")
        if self.config.mask == "magnitude":
            for name, p in ctx.parameters:  # all of them: a selection may let a tensor train later
                if name not in self.thresholds:
                    self.thresholds[name] = threshold(p, self.config.sparsity)
                self.thresholds[name] = self.thresholds[name].to(p.device)
        try:
            return super().step(ctx)
        finally:
            self._fixed = {}

    def split(self, ctx: StepContext, moving: Named) -> tuple[Named, dict[int, str]]:
        if self.config.mask == "random":
            return super().split(ctx, moving)
        grafted = {id(p) for graft in ctx.holder.grafts.values() for p in graft.parameters()}
        in_place = [(n, p) for n, p in moving if id(p) in grafted and p.dtype in mezo.EXACT]
        with torch.no_grad():
            self._fixed = {n: p.detach().float().abs() <= self.thresholds[n] for n, p in in_place}
        chosen = {n for n, _ in in_place}
        return in_place, {id(p): n for n, p in moving if n not in chosen}

    def masks(self, name: str, p: Tensor) -> Iterator[Tensor | None]:
        if self.config.sparsity == 0:
            yield from repeat(None)
        elif self.config.mask == "random":
            generator = mezo._generator(self._draw, name, p)
            for piece in mezo._pieces(p):
                yield torch.rand(piece.shape, generator=generator, device=p.device) >= self.config.sparsity
        elif name in self._fixed:
            mask = self._fixed[name]
            yield from mezo._pieces(mask) if p.is_contiguous() else [mask]
        else:
            for piece in mezo._pieces(p):
                yield piece.float().abs() <= self.thresholds[name]

    def noise_of(self, key: tuple, name: str, p: Tensor) -> Iterator[Tensor]:
        for z, mask in zip(super().noise_of(key, name, p), self.masks(name, p)):
            yield z if mask is None else z.mul_(mask)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "thresholds": dict(self.thresholds)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.thresholds = dict(state.get("thresholds", {}))


@torch.no_grad()
def threshold(p: Tensor, sparsity: float) -> Tensor:
    """The k-th smallest |p|, k the rounded (1 - sparsity) share of the entries but at least 1, as a 0-dim fp32 tensor; infinite where
    all entries have the same size. Reads no value on the host."""
    keep = max(1, round((1 - sparsity) * p.numel()))

    def sizes() -> Iterator[Tensor]:  # non-negative floats are in the order of their bits
        return (piece.float().abs().reshape(-1).view(torch.int32) for piece in mezo._pieces(p))

    low = torch.zeros((), dtype=torch.int64, device=p.device)
    high = torch.full((), 0x7F800000, dtype=torch.int64, device=p.device)
    for _ in range(31):
        middle = (low + high) // 2
        enough = torch.stack([(bits <= middle).sum() for bits in sizes()]).sum() >= keep
        low, high = torch.where(enough, low, middle + 1), torch.where(enough, middle, high)
    ends = [torch.aminmax(bits) for bits in sizes()]
    same = torch.stack([e.min for e in ends]).amin() == torch.stack([e.max for e in ends]).amax()
    return torch.where(same, torch.inf, high.to(torch.int32).view(torch.float32))
