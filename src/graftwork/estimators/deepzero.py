"""DeepZero: finite differences coordinate by coordinate, on a sparse set of coordinates (arXiv 2310.02025).

    g_i = (L(theta + mu e_i) - L(theta)) / mu    for i in the mask S, else 0            |S| + 1 forwards a step
    S: of tensor t, round(rho_t n_t) random entries, drawn anew every `interval` steps; weights stay dense, only g is sparse
    rho_t by ZO-GraSP, once:  g0 = RGE(theta),  g1 = RGE(theta + mu g0),  H g0 = (g1 - g0) / mu,  score = -theta * H g0
          rho_t = share of t among the (1 - sparsity) n entries of highest score, over all tensors
    RGE(theta) = 1/Q sum_q (L(theta + mu u_q) - L(theta)) / mu u_q,   u_q ~ N(0, I)      2 (Q + 1) forwards, in the first step

Nearly the exact gradient on S, given to any optimizer. For adapters and tiny models: a forward a coordinate. `max_coordinates` bounds
a step; it then takes every s-th coordinate of S, another residue in the next step, so that all of S is measured once in s steps.

Feature reuse: a forward restarts from the recorded input of the block that holds the coordinate (`_restart.py`), with the same loss. The
values that are changed are saved and put back, never restored by arithmetic; the step that was taken (after rounding to the tensor's
type) is the denominator. Dropout is off.

State: a number per tensor. Memory: the forward, the outputs of the blocks, g, one permutation of a tensor's entries (int64); in the first
step three tensors of the size of theta.

Differs from the official code: scores keep their sign (there a pruning call takes |score|; `score: absolute` does that too). u is
Gaussian and g unbiased (there u has norm 1 per tensor, which weighs large tensors less), the same u serve g0 and g1, and the batch is
that of the first step. A tensor without any size (a fresh lora_B: theta = 0) has no score and gets 1 - sparsity; each tensor
keeps an entry at least. Not there: forwards shared out over several workers; one process does them all, one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ..modeling.protocols import has_values
from ..registry import MethodConfig, register
from . import mezo
from ._restart import Stack
from .base import Estimator, StepContext, StepResult, micro_forward
from .mezo import Named, evaluating


class DeepZero(MethodConfig):
    """Options of `deepzero`."""

    eps: float = Field(5e-3, gt=0, description="mu, the step along a coordinate")
    sparsity: float = Field(0.9, ge=0, lt=1, description="share of all entries that are not measured")
    ratios: Literal["grasp", "uniform"] = Field("grasp", description="how many entries of each tensor: by ZO-GraSP, or the same share")
    score: Literal["signed", "absolute"] = Field("signed", description="of ZO-GraSP; absolute: as the official code")
    grasp_samples: int = Field(192, ge=1, description="directions of ZO-GraSP's estimates")
    interval: int = Field(100, ge=1, description="steps that a mask lasts")
    max_coordinates: int | None = Field(1000, ge=1, description="forwards a step at most, beside the first; null: the whole mask")
    reuse: bool = Field(True, description="restart forwards at the block of the coordinate")


@register("estimator", "deepzero", config=DeepZero, paper="2310.02025", title="DeepZero",
          summary="finite differences on a sparse set of coordinates: near-exact gradients for any optimizer, without backward",
          bibtex="@inproceedings{chen2024deepzero, title={DeepZero: Scaling up Zeroth-Order Optimization for Deep Model Training}, "
                 "author={Chen, Aochuan and Zhang, Yimeng and Jia, Jinghan and Diffenderfer, James and Liu, Jiancheng and Parasyris, "
                 "Konstantinos and Zhang, Yihua and Zhang, Zheng and Kailkhura, Bhavya and Liu, Sijia}, booktitle={ICLR}, year={2024}}")
class DeepZeroEstimator(Estimator):
    differentiates = False
    heaviest_first = True  # that of ZO-GraSP

    def __init__(self, config: DeepZero | None = None):
        super().__init__(config or DeepZero())
        self.counts: dict[str, int] = {}  # entries of each tensor that a mask has
        self._restarts: bool | None = None  # whether restarted losses are the whole ones; None: not compared yet

    @torch.no_grad()
    def step(self, ctx: StepContext) -> StepResult:
        moving = [(n, p) for n, p in ctx.parameters if p.requires_grad]
        with evaluating(ctx.model):
            if not self.counts:
                self.counts = self._counts(ctx, moving)
            stack = Stack(ctx.model) if self.config.reuse and self._restarts is not False else None
            base, rows = self._loss(ctx, stack, record=True)
            if stack is not None and self._restarts is None:
                self._restarts = self._comparable(ctx, stack, base)
                stack = stack if self._restarts else None
            for p, index in self.coordinates(ctx, moving):
                depth = stack.depth(p) if stack else 0
                slopes = [self._slope(ctx, p, index[j:j + 1], base, stack, depth) for j in range(len(index))]
                p.grad = torch.zeros_like(p)
                if slopes:
                    table(p.grad).index_put_(places(index, p), torch.stack(slopes).to(p.dtype))
        return StepResult(base.float(), {}, rows)

    def _slope(self, ctx: StepContext, p: Tensor, i: Tensor, base: Tensor, stack: Stack | None, depth: int) -> Tensor:
        at, value = places(i, p), table(p.detach())
        old = value[at].clone()
        new = (old.to(torch.promote_types(p.dtype, torch.float32)) + self.config.eps).to(p.dtype)
        value.index_put_(at, new)
        try:
            moved, _ = self._loss(ctx, stack, depth=depth)
        finally:
            value.index_put_(at, old)
        gap = (new.double() - old.double())[0]
        return torch.where(gap > 0, (moved - base) / gap, 0.0)  # a step that rounding swallowed says nothing

    def _loss(self, ctx: StepContext, stack: Stack | None, depth: int = 0, record: bool = False) -> tuple[Tensor, list]:
        total, rows = [], []
        for micro in range(len(ctx.batches)):
            scope = nullcontext() if stack is None else stack.recording(ctx.model, micro) if record else stack.restarted(micro, depth)
            with scope, micro_forward(ctx, micro) as out:
                total.append(out.loss.double())
                rows.append((out.row_loss, out.row_tokens))
        extra = ctx.graft_losses()
        return torch.stack(total + ([] if extra is None else [extra.double()])).sum(), rows

    def _comparable(self, ctx: StepContext, stack: Stack, base: Tensor) -> bool:
        config = getattr(getattr(ctx.model, "module", ctx.model), "config", None)
        if not stack.blocks or getattr(config, "output_router_logits", False) or ctx.graft_losses() is not None:
            return False
        if not all((m, k) in stack.records for m in range(len(ctx.batches)) for k in range(len(stack.blocks))):
            return False
        again, _ = self._loss(ctx, stack, depth=max(1, len(stack.blocks) // 2))
        return bool(again == base) if has_values(base) else True

    # -- masks -------------------------------------------------------------------------------------------------------
    def coordinates(self, ctx: StepContext, moving: Named) -> Iterator[tuple[Tensor, Tensor]]:
        """(tensor, flat indices (k,) of the entries to measure) in this step."""
        counts = [self.counts.setdefault(n, self._share(p.numel())) for n, p in moving]
        stride = math.ceil(sum(counts) / min(self.config.max_coordinates or sum(counts), sum(counts)))
        turn, start = ctx.step % stride, 0
        for (name, p), count in zip(moving, counts):
            generator = mezo._generator((ctx.seed, ctx.step // self.config.interval, "mask"), name, p)
            index = torch.randperm(p.numel(), generator=generator, device=p.device)[:count]
            yield p, index[(turn - start) % stride::stride]
            start += count

    def _share(self, size: int) -> int:
        return max(1, round((1 - self.config.sparsity) * size))

    def _counts(self, ctx: StepContext, moving: Named) -> dict[str, int]:
        if self.config.ratios == "uniform" or self.config.sparsity == 0:
            return {n: self._share(p.numel()) for n, p in moving}
        scores = self.scores(ctx, moving)
        if not has_values(moving[0][1]):
            return {n: self._share(p.numel()) for n, p in moving}
        plain = {n: self._share(p.numel()) for n, p in moving if not bool(p.any())}
        scored = [n for n, _ in moving if n not in plain]
        pool = torch.cat([scores[n].flatten() for n in scored]) if scored else None
        if pool is None:
            return plain
        threshold = pool.topk(self._share(len(pool))).values[-1]
        return plain | {n: max(1, int((scores[n] >= threshold).sum())) for n in scored}

    @torch.no_grad()
    def scores(self, ctx: StepContext, moving: Named) -> dict[str, Tensor]:
        """-theta * H g0 of every tensor, with its sign or without."""
        kept = {n: p.detach().clone() for n, p in moving}
        try:
            first = self._random_gradient(ctx, moving, kept)
            shifted = {n: (kept[n].to(g.dtype) + self.config.eps * g).to(kept[n].dtype) for n, g in first.items()}
            second = self._random_gradient(ctx, moving, shifted)
        finally:
            for n, p in moving:
                p.copy_(kept[n])
        scores = {n: second[n].sub_(first[n]).div_(self.config.eps).mul_(kept[n]).neg_() for n, _ in moving}
        return scores if self.config.score == "signed" else {n: s.abs_() for n, s in scores.items()}

    def _random_gradient(self, ctx: StepContext, moving: Named, at: dict[str, Tensor]) -> dict[str, Tensor]:
        """RGE at the values `at`; the parameters are left there."""
        found = {n: torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for n, t in at.items()}
        for n, p in moving:
            p.copy_(at[n])
        base, _ = self._loss(ctx, None)
        for q in range(self.config.grasp_samples):
            key = (ctx.seed, "grasp", q)
            for n, p in moving:
                mezo.add_noise(key, n, p, self.config.eps)
            slope = (self._loss(ctx, None)[0] - base) / self.config.eps
            for n, p in moving:
                mezo.add_noise(key, n, found[n], slope / self.config.grasp_samples)
                p.copy_(at[n])
        return found

    # -- state -------------------------------------------------------------------------------------------------------
    def state_dict(self):
        return {"counts": dict(self.counts)}

    def load_state_dict(self, state):
        self.counts = dict(state.get("counts", {}))


def table(t: Tensor) -> Tensor:
    """t with a dimension to index."""
    return t.view(1) if t.dim() == 0 else t


def places(index: Tensor, p: Tensor) -> tuple[Tensor, ...]:
    """Flat indices as one tensor per dimension of p."""
    found: list[Tensor] = []
    for size in reversed(p.shape):
        found.insert(0, index % size)
        index = index // size
    return tuple(found) or (torch.zeros_like(index),)
