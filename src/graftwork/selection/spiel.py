"""SpIEL's drop and growth of the positions of a sparse graft (arXiv 2401.16405, the variant that accumulates gradients).

Every `interval` steps, of the k positions of each site (adapter spiel):

    watch    in the last `phase` steps before: candidates are the k largest |G| of the first backward pass, wherever they are;
             their gradients are summed from then on, step by step, and their squares
    drop     the n = share_t * k positions with the smallest |delta|
    grow     the candidates with the largest |sum G| among those that are not active; a dropped one that is grown stays as it is
    share_t  `first_share` at the first event, then share * (1 - t / T); none at the last step, after which nothing could learn

k stays what it is, and no position occurs twice; where fewer candidates than n can grow, the weakest drop stays. New positions
start at delta = 0 with Adam moments m = mean(G) (1 - b1^s), v = mean(G^2) (1 - b2^s), s the optimizer's step: bias correction
then gives back the means. State of other kinds starts at zero.

Differs from the official code: one age for all positions instead of one each (it is in the factors above); gradients of
micro-batches are summed to those of their step; clipping does not enter what is watched. Sites that saw no gradient (an expert
without tokens) keep their positions. One graft at a time: a fleet is refused.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ..errors import UsageError
from ..modeling.state import state_of
from ..registry import MethodConfig, register
from .base import Selection, SelectionContext


class SpIELGrowth(MethodConfig):
    """Options of `spiel`."""

    interval: int = Field(20, ge=1, description="steps between events")
    phase: int = Field(5, ge=1, description="steps before an event in which candidates are watched, at most interval")
    first_share: float = Field(1.0, ge=0.0, le=1.0, description="share of the positions dropped at the first event")
    share: float = Field(0.2, ge=0.0, le=1.0, description="share dropped later, falling linearly to zero")


@register("selection", "spiel", config=SpIELGrowth, title="SpIEL: Scaling Sparse Fine-Tuning to Large Language Models",
          paper="2401.16405", summary="moves a sparse graft's positions to where gradients are large",
          bibtex="@article{ansell2024scaling, title={Scaling Sparse Fine-Tuning to Large Language Models}, author={Ansell, Alan "
                 "and Vuli{\\'c}, Ivan and Sterz, Hannah and Korhonen, Anna and Ponti, Edoardo M.}, journal={arXiv preprint "
                 "arXiv:2401.16405}, year={2024}}")
class SpIELSelection(Selection):
    adapters = ("spiel",)
    reads_gradients = True

    def __init__(self, config: SpIELGrowth | None = None):
        super().__init__(config or SpIELGrowth())
        self._sites: dict[str, Any] = {}
        self._seen: dict[str, dict[str, Any]] = {}  # site -> candidates, sum, squares (k,), steps
        self._step: dict[str, Tensor] = {}  # site -> gradient of the candidates in this step

    def begin(self, ctx: SelectionContext) -> None:
        self.check_graft(ctx)
        if sum(bool(g.parameters()) for g in state_of(ctx.model).grafts.values()) > 1:
            raise UsageError("selection 'spiel' moves the positions of one graft at a time, and several are trained",
                             remedy="train them one after the other, or without this selection")
        self._sites = dict(ctx.graft.adapters)
        for name, seen in self._seen.items():  # loaded on the CPU
            device = self._sites[name].values.device
            seen.update({k: v.to(device) for k, v in seen.items() if isinstance(v, Tensor)})

    def share_at(self, step: int, total: int) -> float:
        """Share of the positions dropped after step `step` (from 0); 0 where there is no event."""
        done = step + 1
        if done % self.config.interval or done >= total:
            return 0.0
        return self.config.first_share if done == self.config.interval else self.config.share * (1.0 - done / total)

    def before_step(self, ctx: SelectionContext) -> None:
        place = ctx.step % self.config.interval
        event = ctx.step - place + self.config.interval - 1
        watching = event - ctx.step < self.config.phase and self.share_at(event, ctx.total_steps) > 0.0
        for name, adapter in self._sites.items():
            adapter.watch = partial(self._see, name) if watching else None

    @torch.no_grad()
    def _see(self, name: str, gradient: Tensor) -> None:
        flat, k = gradient.flatten(), self._sites[name].values.numel()
        if name not in self._seen:
            zeros = flat.new_zeros(k)
            self._seen[name] = {"candidates": flat.abs().topk(k).indices, "sum": zeros, "squares": zeros.clone(), "steps": 0}
        own = flat.index_select(0, self._seen[name]["candidates"])
        self._step[name] = own if name not in self._step else self._step[name] + own

    @torch.no_grad()
    def after_step(self, ctx: SelectionContext) -> None:
        for name, own in self._step.items():
            seen = self._seen[name]
            seen["sum"].add_(own)
            seen["squares"].addcmul_(own, own)
            seen["steps"] += 1
        self._step.clear()
        share = self.share_at(ctx.step, ctx.total_steps)
        if share > 0.0:
            for name, seen in self._seen.items():
                self._reselect(self._sites[name], seen, share, ctx.optimizer)
            self._seen.clear()

    @staticmethod
    def _reselect(adapter: Any, seen: dict[str, Any], share: float, optimizer: torch.optim.Optimizer | None) -> None:
        """Shapes depend on k and share only: the same step runs while a run is planned."""
        positions, values = adapter.positions.long(), adapter.values
        n = int(share * values.numel())
        if n == 0:
            return
        slots = values.abs().topk(n, largest=False).indices
        dropped = positions.index_select(0, slots)
        active = positions.index_fill(0, slots, -1)  # -1 is no position
        score = torch.where(torch.isin(seen["candidates"], active), -1.0, seen["sum"].abs())
        best = score.topk(n)
        grown = torch.where(best.values >= 0, seen["candidates"].index_select(0, best.indices), -1)
        stays, new = torch.isin(dropped, grown), (grown >= 0) & ~torch.isin(grown, dropped)
        # free slots first, new positions first: the i-th of these takes the i-th of those, as far as there are both
        by_slot, by_new = (torch.argsort(flag.to(torch.int8), stable=True) for flag in (stays, ~new))
        slots, chosen = slots.index_select(0, by_slot), best.indices.index_select(0, by_new)
        takes = ~stays.index_select(0, by_slot) & new.index_select(0, by_new)

        def put(tensor: Tensor, fresh: Tensor | float) -> None:
            old = tensor.index_select(0, slots)
            tensor.index_copy_(0, slots, torch.where(takes, fresh, old).to(tensor.dtype))

        put(adapter.positions, grown.index_select(0, by_new))
        put(values, 0.0)
        state = {} if optimizer is None else optimizer.state.get(values, {})
        betas = getattr(getattr(optimizer, "config", None), "betas", None) or (optimizer and optimizer.defaults.get("betas"))
        means = {"exp_avg": ("sum", 0), "exp_avg_sq": ("squares", 1)}
        for name, tensor in state.items():
            if tensor.shape != values.shape:
                continue
            fresh: Tensor | float = 0.0
            if name in means and betas:
                key, number = means[name]
                fresh = seen[key].index_select(0, chosen) / seen["steps"] * (1.0 - betas[number] ** state["step"])
            put(tensor, fresh)

    # -- resume: the positions themselves are in the checkpoint as what the adapter `moves` ------------------------------
    def state_dict(self) -> dict[str, Any]:
        return {"seen": self._seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._seen = {name: {k: v.clone() if isinstance(v, Tensor) else v for k, v in seen.items()}
                      for name, seen in state["seen"].items()}
