"""The V step of PV-Tuning (arXiv 2405.14852): after an optimizer step the codes of adapter `pv_tuning` move, a few at a time.

Every `interval` steps, at each site, D (out, in) the weight after the step, n = out in, G = dL/dD of the step's batch:

    direction   U_ij = G_ij / (|G_i.| |G_.j|),  norms of its row and column
    candidates  the k = ceil(max_code_change n) entries with the largest |U|;  u = U / rms of U over them
    target      W+ = D - code_lr rms(D) u   at the candidates, which are those with the largest |W+ - D|
    codes       of the candidates: nearest to W+;  in falling order of |W+ - D| the longest prefix with
                ||D_new - D|| <= trust_ratio ||D|| is kept, and the first change in any case. All other codes stay.

So a step is large for the few codes that move, and none for the rest: a small step for all would round back to the same codes.
A candidate moves when code_lr |u| rms(D) is over half a gap between codes: at about 0.8 for 2-bit integers, 0.2 for 4 bits.

Memory between backward and the move: an index and a gradient a candidate, 12 max_code_change bytes a weight, and the norms, 4 bytes a
row and a column; the dense G and W+ exist one site at a time. No state stays from step to step (the codes are in the checkpoint as what
the adapter `moves`).

Departures. U has the second moment of Adam's direction without momentum as the product of its rows' and columns', of this step alone;
a whole one would be 4 bytes a weight. It cannot be left out: by G itself all candidates meet the few inputs that are hundreds of times
the others in a language model, and to move those destroys it. Rates are relative to the weights, so that one fits all sites. There is no
straight-through buffer (`delta_decay` 1 in the official code). With micro-batches candidates and norms are those of the first and the
gradients are summed. A code is one weight here, so the beam search over several books is the nearest code. Entries that saw no gradient
(an expert without tokens) stay.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..registry import MethodConfig, register
from .base import Selection, SelectionContext

#: what a norm of no gradient at all is divided by
TINY = 1e-30


class PVCodes(MethodConfig):
    """Options of `pv_tuning`."""

    code_lr: float = Field(0.5, gt=0, description="how far a candidate is sent, of the root mean square of the weights")
    max_code_change: float = Field(0.01, gt=0, le=1, description="share of a site's codes that may change in a step")
    trust_ratio: float | None = Field(0.01, gt=0, description="bound of ||change|| / ||D|| of a site in a step; null: none")
    interval: int = Field(1, ge=1, description="steps from one move of the codes to the next")


@register("selection", "pv_tuning", config=PVCodes, paper="2405.14852",
          title="PV-Tuning: Beyond Straight-Through Estimation for Extreme LLM Compression",
          summary="moves the codes of adapter pv_tuning, few a step and far, against the gradient of the weight",
          bibtex="@inproceedings{malinovskii2024pv, title={{PV-Tuning}: Beyond Straight-Through Estimation for Extreme {LLM} "
                 "Compression}, author={Malinovskii, Vladimir and Mazur, Denis and Ilin, Ivan and Kuznedelev, Denis and Burlachenko, "
                 "Konstantin and Yi, Kai and Alistarh, Dan and Richtarik, Peter}, booktitle={NeurIPS}, year={2024}}")
class PVTuningSelection(Selection):
    adapters = ("pv_tuning",)
    reads_gradients = True

    def __init__(self, config: PVCodes | None = None):
        super().__init__(config or PVCodes())
        # site -> candidates (k,) int64, the sum of their gradients (k,), norms of rows (out, 1) and columns (1, in)
        self._seen: dict[str, tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def begin(self, ctx: SelectionContext) -> None:
        self.check_graft(ctx)

    def heaviest_steps(self, ctx: SelectionContext) -> range:
        return range(self.config.interval - 1, max(ctx.total_steps, self.config.interval), self.config.interval)

    def before_step(self, ctx: SelectionContext) -> None:
        self._seen.clear()
        watching = (ctx.step + 1) % self.config.interval == 0
        for name, adapter in ctx.graft.adapters.items():
            adapter.watch = partial(self._see, name) if watching else None

    @torch.no_grad()
    def _see(self, name: str, gradient: Tensor) -> None:
        flat = gradient.flatten()
        if name in self._seen:
            at, before, *norms = self._seen[name]
            self._seen[name] = (at, before + flat.index_select(0, at), *norms)
        else:
            rows, columns = (torch.linalg.vector_norm(gradient, dim=dim, keepdim=True).clamp(min=TINY) for dim in (1, 0))
            direction = (gradient / rows).div_(columns).abs_().flatten()
            at = direction.topk(math.ceil(self.config.max_code_change * flat.numel())).indices
            self._seen[name] = (at, flat.index_select(0, at), rows, columns)

    @torch.no_grad()
    def after_step(self, ctx: SelectionContext) -> None:
        for name, adapter in ctx.graft.adapters.items():
            adapter.watch = None
            if name in self._seen:
                self._move(adapter, *self._seen.pop(name))

    def _move(self, adapter: Any, at: Tensor, gradient: Tensor, rows: Tensor, columns: Tensor) -> None:
        """Shapes depend on the number of candidates only: the same step runs while a run is planned."""
        D = adapter.weight().flatten()
        shape = (adapter.out_features, adapter.in_features)
        u = gradient / rows.flatten()[at // shape[1]] / columns.flatten()[at % shape[1]]
        step = self.config.code_lr * D.square().mean().sqrt() * u / u.square().mean().sqrt().clamp(min=TINY)
        order = step.abs().argsort(descending=True, stable=True)
        at, step = at.index_select(0, order), step.index_select(0, order)
        target = D.index_add(0, at, -step)
        keep = target.index_select(0, at).isfinite()

        def moved(keep: Tensor) -> Tensor:
            return adapter.recoded(target.view(shape), torch.zeros_like(D, dtype=torch.bool).index_copy(0, at, keep).view(shape))

        codes = moved(keep)
        if self.config.trust_ratio is not None:
            change = (adapter.weight(codes).flatten() - D).index_select(0, at).double().square()
            total = change.cumsum(0)
            keep &= (F.pad(total[:-1], (1, 0)) == 0) | (total <= (self.config.trust_ratio * D.double().norm()) ** 2)
            codes = moved(keep)
        adapter.codes.copy_(codes)
