"""IncreLoRA's growth: ranks are added where the loss is sensitive to the ones there are, up to a total (arXiv 2308.12043).

    each step, per site:   S = sum_k |g_k dL/dg_k| / sqrt(in out);   I <- b1 I + (1 - b1) S;   U <- b2 U + (1 - b2) |S - I|
    after `warmup` steps, every `interval` steps, while the ranks of all sites are fewer than final_r n (n sites): the `top` sites
    with the largest I U turn their reserve into ranks and get a new one; the last growth stops at exactly final_r n,
    and there all reserves are dropped

A site grows to min(in, out) at most, reserve included. Optimizer state stays with the rows it belongs to; a new row begins
with a first moment of zero and the mean second moment of the old rows, so that its steps start small and need no warm-up of
their own. State that is not Adam's is dropped for the tensors that grew.

Differs from the paper: its score takes the full gradient of each site's change, (out, in); here the sum over ranks of
|g_k dL/dg_k| is used, which is the same product summed along each rank before the absolute value and costs nothing. All new ranks
follow the run's own learning-rate schedule; the official code restarts warm-up for each.

A graph from before a growth cannot be used after it; nothing in a step keeps one.

Under fake tensors (a plan) the growth of the whole run happens at once, at the largest sites: an upper bound.
"""

from __future__ import annotations

import hashlib

import torch
from pydantic import Field
from torch import Tensor, nn

from ..errors import UsageError
from ..modeling.protocols import has_values
from ..registry import MethodConfig, register
from .base import Selection, SelectionContext, drop_state, live_ranks


class IncreLoRAGrowth(MethodConfig):
    """Options of `increlora`."""

    final_r: int = Field(8, ge=1, description="mean rank of a site when growth ends")
    top: int = Field(8, ge=1, description="sites that grow at a time")
    warmup: float = Field(0.05, ge=0.0, description="steps before the first growth; below 1: share of the run")
    interval: int = Field(10, ge=1, description="steps between growths")
    beta1: float = Field(0.85, gt=0.0, lt=1.0, description="decay of the sensitivity")
    beta2: float = Field(0.85, gt=0.0, lt=1.0, description="decay of the uncertainty")


@register("selection", "increlora", config=IncreLoRAGrowth, title="IncreLoRA: incremental parameter allocation", paper="2308.12043",
          summary="grows the ranks of adapter increlora where they matter, without changing the function",
          bibtex="@article{zhang2023increlora, title={IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient "
                 "Fine-tuning}, author={Zhang, Feiyu and Li, Liangzhi and Chen, Junhao and Jiang, Zhouqiang and Wang, Bowen and "
                 "Qian, Yiming}, journal={arXiv:2308.12043}, year={2023}}")
class IncreLoRASelection(Selection):
    adapters = ("increlora",)
    reads_gradients = True
    shows = "rank"

    def __init__(self, config: IncreLoRAGrowth | None = None):
        super().__init__(config or IncreLoRAGrowth())
        self.sensitivity: Tensor | None = None  # I and U, (n,)
        self.uncertainty: Tensor | None = None
        self._shapes: dict[str, list[int]] = {}  # site -> [ranks, rows]

    def begin(self, ctx: SelectionContext) -> None:
        self.check_graft(ctx)
        if self.config.final_r < ctx.graft.config.r:
            raise UsageError(f"selection 'increlora': final_r {self.config.final_r} is less than the adapter's r {ctx.graft.config.r}",
                             remedy=f"final_r: {ctx.graft.config.r} or more")
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise UsageError("selection 'increlora' changes the shapes of tensors, which distributed data parallelism does not follow",
                             remedy="train on one device")
        if not has_values(next(iter(ctx.graft.adapters.values())).gate):
            largest = sorted(ctx.graft.adapters, key=lambda n: -self._size(ctx.graft.adapters[n]))
            while self._grow(ctx, largest, close=False):
                pass
        self._note(ctx)

    @torch.no_grad()
    def after_backward(self, ctx: SelectionContext) -> None:
        adapters = list(ctx.graft.adapters.values())
        place = adapters[0].gate.device
        now = torch.stack([torch.zeros((), device=place) if a.gate.grad is None else
                           (a.gate * a.gate.grad).abs().sum().to(place) / (a.in_features * a.out_features) ** 0.5 for a in adapters])
        if self.sensitivity is None:
            self.sensitivity, self.uncertainty = torch.zeros_like(now), torch.zeros_like(now)
        b1, b2 = self.config.beta1, self.config.beta2
        self.sensitivity = b1 * self.sensitivity.to(place) + (1 - b1) * now
        self.uncertainty = b2 * self.uncertainty.to(place) + (1 - b2) * (now - self.sensitivity).abs()

    @torch.no_grad()
    def after_step(self, ctx: SelectionContext) -> None:
        t, total = ctx.step + 1, ctx.total_steps
        warmup = int(self.config.warmup * total) if self.config.warmup < 1 else int(self.config.warmup)
        gate = next(iter(ctx.graft.adapters.values())).gate
        if t <= warmup or t % self.config.interval or self.sensitivity is None or not has_values(gate):
            return
        scores = (self.sensitivity * self.uncertainty).tolist()
        names = list(ctx.graft.adapters)
        if self._grow(ctx, [names[i] for i in sorted(range(len(names)), key=lambda i: (-scores[i], i))]):
            self._note(ctx)

    def site_map(self, ctx: SelectionContext) -> dict[str, float]:
        return live_ranks(ctx)

    def _grow(self, ctx: SelectionContext, order: list[str], close: bool = True) -> bool:
        """Let the first `top` sites of the order that can grow do so; True when something changed."""
        adapters = ctx.graft.adapters
        missing = self.config.final_r * len(adapters) - sum(a.gate.shape[0] for a in adapters.values())
        able = [n for n in order if self._room(adapters[n])][: self.config.top]
        for name in able:
            adapter = adapters[name]
            count = min(adapter.reserve, missing, self._room(adapter))
            if count > 0:
                with _Resized(ctx.optimizer, adapter):
                    adapter.grow(count, self._generator(ctx.seed, name, adapter.gate.shape[0]))
                missing -= count
        if close and (missing <= 0 or not able):
            left = [a for a in adapters.values() if a.lora_A.shape[0] > a.gate.shape[0]]
            for adapter in left:
                with _Resized(ctx.optimizer, adapter):
                    adapter.close()
            return bool(able or left)
        return bool(able) and missing > 0

    @staticmethod
    def _size(adapter: nn.Module) -> int:
        return adapter.in_features + adapter.out_features

    @staticmethod
    def _room(adapter: nn.Module) -> int:
        """How many rows may still be added; a site without reserve has ended its growth."""
        rows = adapter.lora_A.shape[0]
        return min(adapter.in_features, adapter.out_features) - rows if rows > adapter.gate.shape[0] else 0

    @staticmethod
    def _generator(seed: int, site: str, rank: int) -> torch.Generator:
        digest = hashlib.blake2b(f"increlora/{seed}/{site}/{rank}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") & (2**63 - 1))

    def _note(self, ctx: SelectionContext) -> None:
        self._shapes = {n: [a.gate.shape[0], a.lora_A.shape[0]] for n, a in ctx.graft.adapters.items()}

    def structure(self):
        return dict(self._shapes)

    def restore_structure(self, structure, model, graft):
        for name, (ranks, rows) in structure.items():
            graft.adapters[name].resize(ranks, rows)
        self._shapes = dict(structure)

    def state_dict(self):
        return {} if self.sensitivity is None else {"sensitivity": self.sensitivity, "uncertainty": self.uncertainty}

    def load_state_dict(self, state):
        self.sensitivity, self.uncertainty = (state[n].clone() if state else None for n in ("sensitivity", "uncertainty"))


class _Resized:
    """Scope in which an adapter's tensors change their number of rows; the optimizer's moments follow."""

    def __init__(self, optimizer: torch.optim.Optimizer | None, adapter: nn.Module):
        self.optimizer = optimizer
        self.before = [(p, p.shape) for p in (adapter.gate, adapter.lora_A, adapter.lora_B)]

    def __enter__(self):
        return self

    def __exit__(self, kind, *error) -> None:
        if kind is not None or self.optimizer is None:
            return
        for p, shape in self.before:
            if p.shape == shape or p not in self.optimizer.state:
                continue
            state = self.optimizer.state[p]
            if any(t.dim() and (t.shape != shape or not name.startswith("exp_avg")) for name, t in state.items()):
                drop_state(self.optimizer, p)
                continue
            dim = next(d for d in range(p.dim()) if p.shape[d] != shape[d])
            for name, t in state.items():
                if t.dim():
                    state[name] = _followed(t, dim, p.shape[dim], mean="sq" in name)


def _followed(t: Tensor, dim: int, size: int, *, mean: bool) -> Tensor:
    """t with `size` entries along dim: cut, or filled up with zeros or with the mean of what is there."""
    if size <= t.shape[dim]:
        return t.narrow(dim, 0, size).clone()
    fill = t.mean(dim, keepdim=True) if mean else torch.zeros_like(t.narrow(dim, 0, 1))
    return torch.cat([t, fill.expand(*(size - t.shape[dim] if d == dim else n for d, n in enumerate(t.shape)))], dim)
