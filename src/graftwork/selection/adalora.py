"""AdaLoRA's rank allocation: one budget of ranks over all sites, shrinking on a cubic schedule (arXiv 2303.10512).

    each step, for every entry w of A, g and B:   I = |w dL/dw|;   S <- b1 S + (1 - b1) I;   U <- b2 U + (1 - b2) |I - S|
    score of rank i of a site = (S U)(g_i) + mean_j (S U)(A_ij) + mean_j (S U)(B_ji)
    budget(t) = r n                                                    t <= t_i
                r* n + int((r n - r* n) (1 - (t - t_i) / (T - t_f - t_i))^3)   t_i < t <= T - t_f,  n sites, r* = target_r
                r* n                                                   t > T - t_f
    every `interval` steps: the gates outside the budget(t) best scores of all sites are set to zero

t counts finished steps. A gate that was zeroed goes on learning and may come back until T - t_f (`final`); from there the scores
are frozen and the same ranks stay zero. Two values of state per trained value.

Differs from PEFT: scores are taken between backward and the optimizer's step, from the weights at which the gradient was taken, as
in the paper's algorithm (PEFT takes them after it); exactly the budget is kept where scores tie (PEFT drops all of a tie).
"""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..errors import UsageError
from ..modeling.protocols import has_values
from ..registry import MethodConfig, register
from .base import Selection, SelectionContext, live_ranks


class AdaLoRABudget(MethodConfig):
    """Options of `adalora`."""

    target_r: int = Field(8, ge=1, description="mean rank of a site at the end")
    warmup: float = Field(0.1, ge=0.0, description="steps before the budget shrinks (t_i); below 1: share of the run")
    final: float = Field(0.3, ge=0.0, description="steps at the end with fixed ranks (t_f); below 1: share of the run")
    interval: int = Field(10, ge=1, description="steps between allocations")
    beta1: float = Field(0.85, gt=0.0, lt=1.0, description="decay of the sensitivity")
    beta2: float = Field(0.85, gt=0.0, lt=1.0, description="decay of the uncertainty")

    @model_validator(mode="after")
    def _room_to_shrink(self):
        if self.warmup < 1 and self.final < 1 and self.warmup + self.final >= 1:
            raise ValueError("warmup and final leave no steps in which the budget could shrink")
        return self


@register("selection", "adalora", config=AdaLoRABudget, title="AdaLoRA: adaptive budget allocation", paper="2303.10512",
          summary="prunes the ranks of adapter adalora to one budget over all sites, by sensitivity",
          bibtex="@inproceedings{zhang2023adalora, title={AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning}, "
                 "author={Zhang, Qingru and Chen, Minshuo and Bukharin, Alexander and Karampatziakis, Nikos and He, Pengcheng and "
                 "Cheng, Yu and Chen, Weizhu and Zhao, Tuo}, booktitle={ICLR}, year={2023}}")
class AdaLoRASelection(Selection):
    adapters = ("adalora",)
    reads_gradients = True
    shows = "rank"

    def __init__(self, config: AdaLoRABudget | None = None):
        super().__init__(config or AdaLoRABudget())
        self.sensitivity: dict[str, Tensor] = {}  # S and U by parameter name
        self.uncertainty: dict[str, Tensor] = {}

    def begin(self, ctx: SelectionContext) -> None:
        self.check_graft(ctx)
        if self.config.target_r > ctx.graft.config.r:
            raise UsageError(f"selection 'adalora': target_r {self.config.target_r} is more than the adapter's r "
                             f"{ctx.graft.config.r}", remedy="raise adapter.r; the paper takes 1.5 target_r")
        first, last = self.phases(ctx.total_steps)
        if first >= last and has_values(next(iter(ctx.graft.adapters.values())).gate):
            raise UsageError(f"selection 'adalora': warmup and final leave none of the {ctx.total_steps} steps to shrink the budget in",
                             remedy="smaller warmup and final, or a longer run")

    def phases(self, total: int) -> tuple[int, int]:
        """(t_i, T - t_f) in steps."""
        first, final = (int(v * total) if v < 1 else int(v) for v in (self.config.warmup, self.config.final))
        return first, total - final

    def budget(self, t: int, total: int, start: int, target: int) -> tuple[int, bool]:
        """(ranks after t finished steps, whether to allocate now); start and target are sums over the sites."""
        first, last = self.phases(total)
        if t <= first:
            return start, False
        if t > last:
            return target, True
        left = 1 - (t - first) / (last - first)
        return int((start - target) * left**3 + target), t % self.config.interval == 0

    @torch.no_grad()
    def after_backward(self, ctx: SelectionContext) -> None:
        if ctx.step + 1 >= self.phases(ctx.total_steps)[1]:
            return
        b1, b2 = self.config.beta1, self.config.beta2
        for name, p in self._named(ctx):
            if name not in self.sensitivity:
                self.sensitivity[name], self.uncertainty[name] = torch.zeros_like(p), torch.zeros_like(p)
            now = torch.zeros_like(p) if p.grad is None else (p * p.grad).abs()
            S = self.sensitivity[name] = self.sensitivity[name].to(p.device).mul_(b1).add_(now, alpha=1 - b1)
            self.uncertainty[name] = self.uncertainty[name].to(p.device).mul_(b2).add_((now - S).abs_(), alpha=1 - b2)

    @torch.no_grad()
    def after_step(self, ctx: SelectionContext) -> None:
        adapters = ctx.graft.adapters
        start = sum(a.gate.shape[0] for a in adapters.values())
        budget, now = self.budget(ctx.step + 1, ctx.total_steps, start, min(self.config.target_r * len(adapters), start))
        if not now or not self.sensitivity:
            return
        place = next(iter(adapters.values())).gate.device
        scores = torch.cat([self.scores(name).to(place) for name in adapters])
        keep = torch.zeros_like(scores, dtype=torch.bool)
        keep[scores.sort(descending=True, stable=True).indices[:budget]] = True
        for adapter, kept in zip(adapters.values(), keep.split([a.gate.shape[0] for a in adapters.values()])):
            adapter.gate.masked_fill_(~kept.to(adapter.gate.device), 0.0)

    def site_map(self, ctx: SelectionContext) -> dict[str, float]:
        return live_ranks(ctx)

    def scores(self, site: str) -> Tensor:
        """Score of each rank of a site, (r,)."""
        g, A, B = (self.sensitivity[f"{site}.{n}"] * self.uncertainty[f"{site}.{n}"] for n in ("gate", "lora_A", "lora_B"))
        return g + A.mean(1) + B.mean(0)

    @staticmethod
    def _named(ctx: SelectionContext):
        for site, adapter in ctx.graft.adapters.items():
            for name in ("gate", "lora_A", "lora_B"):
                yield f"{site}.{name}", getattr(adapter, name)

    def state_dict(self):
        return {"sensitivity": dict(self.sensitivity), "uncertainty": dict(self.uncertainty)}

    def load_state_dict(self, state):
        self.sensitivity, self.uncertainty = ({k: v.clone() for k, v in state[n].items()} for n in ("sensitivity", "uncertainty"))
