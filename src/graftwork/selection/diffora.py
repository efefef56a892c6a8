"""DiffoRA: differential adaptation matrix (arXiv 2502.08905). Learns which sites keep their LoRA; the others lose it.

    search      change of site (i, j) = g_ij s B A,   g = sigmoid(logit) in (0, 1), logit 0 at the start
                most steps train the weights with the gates held; every `every`-th one trains the gates on its rows instead
    choice      in each layer the round(keep M) of its M sites with the largest logits stay (g = 1), the others are removed
    afterwards  the sites that stay train on, which repairs what the choice broke
    dL/dg = <B, dL/dB> / g, divided by |s B A| (by its root mean square over the sites, too), so that (c B, A / c) and a large B
    rank no higher;   logit -= lr g (1 - g) dL/dg, normalized

Trained values afterwards: sum over the sites that stay of r (in + out). `search` and `settle` are shares of the run. B = 0 at the start
gives a gate no gradient, so the gates wait `settle`. The choice multiplies g into B of the sites that stay, so that these go on
from where they are. per: model takes the round(keep L M) largest of all sites instead of the same number in each layer.

Departures and gaps: no official code is known, and the paper's details are not confirmed here. The rows of a gate step are not
used for the weights in that epoch, in place of a second data set. The paper lets sites that are not chosen share factors; how is not
specified, and they are removed. A graft that is saved before the choice holds all sites, without gates. A trained bias
(bias: lora_only) has no gate and goes with its site.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..errors import IncompatibleError, UsageError
from ..modeling.protocols import has_values
from ..registry import MethodConfig, register
from .base import Selection, SelectionContext, drop_state


class DiffoRA(MethodConfig):
    """Options of `diffora`."""

    keep: float = Field(0.5, gt=0.0, le=1.0, description="share of the sites that keep their adapter (rho)")
    per: Literal["layer", "model"] = Field("layer", description="choose among the sites of each layer, or among all")
    search: float = Field(0.3, gt=0.0, lt=1.0, description="share of the run before the choice")
    settle: float = Field(0.1, gt=0.0, lt=1.0, description="share of the run in which gates wait for B to leave zero")
    every: int = Field(2, ge=2, description="every so many steps of the search one trains the gates")
    lr: float = Field(0.1, gt=0.0, description="rate of the gates' logits")

    @model_validator(mode="after")
    def _gates_move(self):
        if self.settle >= self.search:
            raise ValueError("settle: the gates must move before the search ends; choose settle < search")
        return self


@register("selection", "diffora", config=DiffoRA, paper="2502.08905",
          title="DiffoRA: Enabling Parameter-Efficient LLM Fine-Tuning via Differential Low-Rank Matrix Adaptation",
          summary="learns which sites of a lora keep their adapter, by one gate a site, and removes the others",
          bibtex="@article{jiang2025diffora, title={DiffoRA: Enabling Parameter-Efficient LLM Fine-Tuning via Differential Low-Rank "
                 "Matrix Adaptation}, author={Jiang, Tangyu and Wang, Haodi and Yuan, Chun}, journal={arXiv:2502.08905}, "
                 "year={2025}}")
class DiffoRASelection(Selection):
    reads_gradients = True
    shows = "gate"
    adapters = ("lora",)

    def __init__(self, config: DiffoRA | None = None):
        super().__init__(config or DiffoRA())
        self.logits: Tensor | None = None
        self.kept: list[str] | None = None  # names of the sites that stay, once they are chosen
        self.plain: dict[str, float] = {}  # scale of each adapter without its gate

    def bounds(self, total: int) -> tuple[int, int]:
        """(first step of the gates, step of the choice)."""
        return math.ceil(self.config.settle * total), math.ceil(self.config.search * total)

    def begin(self, ctx: SelectionContext) -> None:
        graft = ctx.graft
        if graft is None or graft.method not in self.adapters:
            raise IncompatibleError(f"selection 'diffora' acts on adapter lora, not on {graft and repr(graft.method) or 'full tuning'}",
                                    remedy="adapter: lora, or remove this selection")
        own = {id(p) for p in graft.parameters()}
        if any(id(p) not in own for _, p in ctx.parameters if p.requires_grad):
            raise IncompatibleError("selection 'diffora' chooses the sites of one adapter, and several are trained",
                                    remedy="train the files one by one")
        if any(a.base_edit() is not None for a in graft.adapters.values()):
            raise IncompatibleError("diffora scales whole adapters, and this initializer has put a part of W into them",
                                    remedy="initializer: default")
        first, choice = self.bounds(ctx.total_steps)
        if not first < choice < ctx.total_steps:
            raise UsageError(f"diffora: of {ctx.total_steps} steps the gates begin at step {first} and the choice is at {choice}",
                             remedy="train longer, or choose settle < search < 1 further apart")
        if self.kept is not None or self.plain:
            return
        self.plain = {name: adapter.scale for name, adapter in graft.adapters.items()}
        device = next(iter(graft.adapters.values())).lora_B.device
        self.logits = torch.zeros(len(self.plain), device=device) if self.logits is None else self.logits.to(device)

    @property
    def gates(self) -> dict[str, Tensor]:
        """{site: its gate} while the search lasts, 0-d tensors."""
        return dict(zip(self.plain, torch.sigmoid(self.logits).unbind()))

    def before_step(self, ctx: SelectionContext) -> None:
        if self.kept is None:
            for name, gate in self.gates.items():
                ctx.graft.adapters[name].scale = gate * self.plain[name]
            if ctx.step >= self.bounds(ctx.total_steps)[1]:
                self._choose(ctx)

    def after_backward(self, ctx: SelectionContext) -> None:
        first, _ = self.bounds(ctx.total_steps)
        if self.kept is not None or ctx.step < first or (ctx.step - first) % self.config.every:
            return
        gates = torch.stack(list(self.gates.values()))
        step = gates * (1 - gates) * self.slopes(ctx.graft)
        tiny = torch.finfo(step.dtype).tiny
        self.logits = self.logits - self.config.lr * step / step.square().mean().sqrt().clamp_min(tiny)
        for _, parameter in ctx.parameters:
            parameter.grad = None  # these rows train the gates

    def site_map(self, ctx: SelectionContext) -> dict[str, float]:
        """Gates while the search lasts, then 1 for the sites that stay; the others are gone."""
        if self.kept is None:
            return {name: float(gate) for name, gate in self.gates.items()}
        return dict.fromkeys(self.kept, 1.0)

    @torch.no_grad()
    def slopes(self, graft: Any) -> Tensor:
        """Derivative of the loss by each gate, per norm of the site's change: (sites,), fp32."""
        found = []
        for name, gate in self.gates.items():
            B, A = graft.adapters[name].lora_B, graft.adapters[name].lora_A
            grad = torch.zeros_like(B) if B.grad is None else B.grad
            size = self.plain[name] * ((B.T @ B) * (A @ A.T)).sum().clamp_min(0.0).sqrt()
            found.append((B * grad).sum().float() / gate / size.float().clamp_min(torch.finfo(torch.float32).tiny))
        return torch.stack(found)

    def choice(self, graft: Any) -> list[str]:
        """The sites that stay, by today's logits; without values (a simulation) the first ones of each group."""
        values = self.logits.tolist() if has_values(self.logits) else [0.0] * len(self.plain)
        groups: dict[int, list[tuple[float, int, str]]] = {}
        for place, (name, value) in enumerate(zip(self.plain, values)):
            group = graft.sites[name].layer if self.config.per == "layer" else 0
            groups.setdefault(group, []).append((-value, place, name))
        chosen = {name for group in groups.values() for *_, name in sorted(group)[: max(1, round(self.config.keep * len(group)))]}
        return [name for name in self.plain if name in chosen]

    @torch.no_grad()
    def _choose(self, ctx: SelectionContext) -> None:
        self.kept, gates = self.choice(ctx.graft), self.gates
        for name, adapter in list(ctx.graft.adapters.items()):
            adapter.scale = self.plain[name]
            if name in self.kept:
                adapter.lora_B.mul_(gates[name])
                continue
            for parameter in adapter.parameters():
                drop_state(ctx.optimizer, parameter)
        self._remove(ctx.graft)

    def _remove(self, graft: Any) -> None:
        for name in [n for n in graft.adapters if n not in self.kept]:
            for parameter in graft.adapters[name].parameters():
                parameter.grad = None
                parameter.requires_grad_(False)
            graft.remove(name)

    def structure(self):
        return {} if self.kept is None else {"kept": self.kept}

    def restore_structure(self, structure, model, graft):
        if "kept" in structure:
            self.kept = list(structure["kept"])
            self._remove(graft)

    def state_dict(self):
        return {} if self.logits is None else {"logits": self.logits}

    def load_state_dict(self, state):
        self.logits = state.get("logits")
