"""One SPSA estimator, of which the ZO-Bench family (arXiv 2402.11592) are presets: choices of difference, blocks and rule.

    g = 1/n * sum_q c_q z_q        z_q ~ N(0, I) as in mezo, c_q from a difference of losses
      two_sided   c_q = (L(theta + eps z_q) - L(theta - eps z_q)) / (2 eps)              2 n forwards
      one_sided   c_q = (L(theta + eps z_q) - L(theta)) / eps                            n + 1
      residual    c_q = (L(theta + eps z_q) - the evaluation before it) / eps            n (the first of a run moves nothing)
    theta <- theta - lr * (rule(g) + wd * theta)                                         (no decay on 1-D tensors)

Blocks: only one block of tensors is perturbed at a time; `sequential` moves it at once, before the next block is measured (a
Gauss-Seidel sweep), else all blocks move after the last (Jacobi).

Memory: the forward, the rule's state, and one piece of a tensor (2^20 values). All rules work entry by entry, so g is made, used
and forgotten in pieces; no gradient exists. State is fp32 (fp64 for fp64), counts per tensor, and is dropped for tensors that a
selection froze. Below fp32 tensors are perturbed inside their modules' forward and rounded as in mezo.

Differs from the official code: z is the same in the perturbation and in the update for every q (there the multi-query update
keeps the last query only and seeds anew per tensor), weight decay counts, any schedule of rates works, the sign rule takes the
sign of g entry by entry as in the paper (for n = 1 it equals the code's sign(c) sign(z), not its sign(c) z).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import repeat
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..modeling import repeated
from ..modeling.arithmetic import round_stochastic
from . import mezo
from .base import StepContext, StepResult
from .mezo import MeZO, MeZOEstimator, Named, evaluating, noise, perturbed_modules

#: values that a rule works on at a time: its temporaries are small beside the piece of g
SLICE = 1 << 15
ZO_BENCH = ("@inproceedings{zhang2024zobench, title={Revisiting Zeroth-Order Optimization for Memory-Efficient LLM Fine-Tuning: A "
            "Benchmark}, author={Zhang, Yihua and Li, Pingzhi and Hong, Junyuan and Li, Jiaxiang and Zhang, Yimeng and Zheng, "
            "Wenqing and Chen, Pin-Yu and Lee, Jason D. and Yin, Wotao and Hong, Mingyi and Wang, Zhangyang and Liu, Sijia and "
            "Chen, Tianlong}, booktitle={ICML}, year={2024}}")


class SPSA(MeZO):
    """Options that the family shares."""

    difference: Literal["two_sided", "one_sided", "residual"] = Field("two_sided", description="two, one, or no forward beside "
                                                                      "theta + eps z")
    blocks: Literal["all", "layer", "part", "map"] = Field("all", description="what is perturbed at a time: everything, a decoder "
                                                           "layer, its attention or MLP, one linear map")
    sequential: bool = Field(True, description="move each block before the next is measured; false: all after the last")


class SPSAEstimator(MeZOEstimator):
    """A subclass names the state of its rule (`slots`) and may define `rule`, `noise_of`, `masks`, `measure` and `move`."""

    slots: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: SPSA | None = None):
        super().__init__(config or self.config_class())
        self.kept: dict[str, dict[str, Tensor]] = {}
        self.counts: dict[str, int] = {}
        self.previous: Tensor | None = None  # the last evaluation, for `residual`

    # -- what a preset may define ------------------------------------------------------------------------------------
    def rule(self, g: Tensor, state: dict[str, Tensor], count: int) -> Tensor:
        """The direction for g, a piece of one tensor; `state`: the same piece of each slot; count: updates, this one included."""
        return g

    def noise_of(self, key: tuple, name: str, p: Tensor) -> Iterator[Tensor]:
        """z in the pieces of p."""
        return noise(key, name, p)

    def masks(self, name: str, p: Tensor) -> Iterator[Tensor | None]:
        """Which entries of each piece of p may move; None: all."""
        return repeat(None)

    # -- the step ----------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def step(self, ctx: StepContext) -> StepResult:
        moving = [(n, p) for n, p in ctx.parameters if p.requires_grad]
        for frozen in set(self.counts) - {n for n, _ in moving}:
            self.kept.pop(frozen, None)
            del self.counts[frozen]
        measured = []
        with evaluating(ctx.model):
            for block in blocks_of(moving, self.config.blocks):
                coefficients, loss, rows = self.measure(ctx, block)
                measured.append((block, coefficients, loss))
                if self.config.sequential:
                    self.move(ctx, block, coefficients)
            if not self.config.sequential:
                for block, coefficients, _ in measured:
                    self.move(ctx, block, coefficients)
        losses = torch.stack([loss for _, _, loss in measured])
        slopes = [c for _, coefficients, _ in measured for c in coefficients]
        names = ["projected_gradient", *(f"projected_gradient_{i}" for i in range(1, len(slopes)))]
        return StepResult(losses.mean().float(), dict(zip(names, slopes)), rows, updated=True)

    def measure(self, ctx: StepContext, moving: Named) -> tuple[list[Tensor], Tensor, list]:
        if self.config.difference == "two_sided":
            return super().measure(ctx, moving)
        in_place, in_forward = self.split(ctx, moving)
        eps, coefficients, losses, rows = self.config.eps, [], [], []
        base = self.previous
        if self.config.difference == "one_sided":
            base, rows = self._loss(ctx)
            losses.append(base)
        for sample in range(self.config.n_samples):
            key = (ctx.seed, ctx.step, sample)
            self.shift(in_place, [(key, eps)])
            with perturbed_modules(ctx.model, in_forward, self.add, [(key, eps)]):
                plus, seen = self._loss(ctx)
            self.shift(in_place, [(key, -eps)])
            coefficients.append(torch.zeros_like(plus) if base is None else (plus - base) / eps)
            if self.config.difference == "residual":
                base = self.previous = plus
                rows = seen
                losses.append(plus)
        return coefficients, torch.stack(losses).mean(), rows

    def add(self, key: tuple, name: str, p: Tensor, scale: float | Tensor) -> None:
        for piece, z in zip(mezo._pieces(p), self.noise_of(key, name, p)):
            mezo.add_scaled(piece, z, scale)

    def move(self, ctx: StepContext, moving: Named, coefficients: list[Tensor]) -> None:
        """One update of the tensors of `moving`, in place, piece by piece."""
        rate, n = self.rate(ctx), len(coefficients)
        for name, p in moving:
            decay = 1 - rate * self.config.weight_decay if p.dim() > 1 else 1.0
            kind = torch.promote_types(p.dtype, torch.float32)
            count = self.counts[name] = self.counts.get(name, 0) + 1
            kept = self.kept.get(name) or {s: torch.zeros(p.shape, dtype=kind, device=p.device) for s in self.slots}
            state = self.kept[name] = {s: t.to(p.device) for s, t in kept.items()}  # what was loaded may be elsewhere
            draws = [self.noise_of((ctx.seed, ctx.step, q), name, p) for q in range(n)]
            rounding = mezo._generator((ctx.seed, ctx.step, "rounding"), name, p)
            views = zip(*(mezo._pieces(t) if p.is_contiguous() else [t] for t in state.values())) if state else repeat(())
            for piece, mask, view in zip(mezo._pieces(p), self.masks(name, p), views):
                g = next(draws[0]).mul_(coefficients[0] / n)
                for draw, c in zip(draws[1:], coefficients[1:]):
                    g += next(draw).mul_(c / n)
                for part in repeated.each(_parts(piece)):
                    new = piece[part].to(kind) * decay
                    new -= self.rule(g[part], {slot: t[part] for slot, t in zip(state, view)}, count) * rate
                    if mask is not None:
                        new = torch.where(mask[part], new, piece[part])
                    piece[part] = new if p.dtype in mezo.EXACT else round_stochastic(new, p.dtype, rounding)

    # -- state -------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        tensors = {f"{slot}/{name}": t for name, slots in self.kept.items() for slot, t in slots.items()}
        return {"counts": dict(self.counts), **tensors, **({} if self.previous is None else {"previous": self.previous})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts, self.previous = dict(state.get("counts", {})), state.get("previous")
        self.kept = {name: {} for name in self.counts}
        for key, tensor in state.items():
            slot, _, name = key.partition("/")
            if slot in self.slots:
                self.kept[name][slot] = tensor.clone()

    @classmethod
    def state_bytes(cls, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> int:
        """Bytes of the state of one tensor of that shape and dtype."""
        return len(cls.slots) * torch.Size(shape).numel() * torch.promote_types(dtype, torch.float32).itemsize


def _parts(piece: Tensor) -> list[slice]:
    """The rows of a piece, about SLICE values at a time."""
    rows = max(1, SLICE * piece.shape[0] // piece.numel())
    return [slice(start, start + rows) for start in range(0, piece.shape[0], rows)]


def blocks_of(moving: Named, by: str) -> list[list[tuple[str, nn.Parameter]]]:
    """The tensors in blocks, in the order of their first tensor; what is outside the numbered layers goes by its owner."""
    found: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for name, p in moving:
        layer = re.match(r"(.*?\.\d+)\.([^.]+)", f".{name}")
        owner = name.rpartition(".")[0]
        key = {"all": "", "layer": layer[1] if layer else owner, "part": ".".join(layer.groups()) if layer else owner,
               "map": owner}[by]
        found.setdefault(key, []).append((name, p))
    return list(found.values())
