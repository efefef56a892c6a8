"""LoRA-GGPO: gradients at randomly perturbed weights (arXiv 2502.14538), in search of flatter minima with one backward pass.

    y += x E^T,   E (out, in) = c[:, None] * eps,   eps ~ N(0, I), drawn from (seed, step, micro-batch, site)
    c_i = (sigma sqrt(w^2 + |D_i|^2) + beta |G_i|^2) / sqrt(out)             per row i of the weight, from the step before
    w: mean row norm of the frozen weight    D = s B A (out, in)    G = s (B dA + dB A), dA and dB the step's gradients

The gradient is that of the loss at W + E, exactly: it flows through E to the inputs, c is a constant. E acts in training
forwards only (not on a reference model, not in evaluation) and is no part of what is saved. The first step has no gradients to
go by and is not perturbed. Trains `lora`, alone or a fleet (each row is perturbed by its own adapter's c); in full tuning c
takes a map's own row norms, sigma |W_i|, and its own gradient. The output head is not perturbed.

Weights are never written: E is added to the product, block by block of its rows, and drawn again in the backward pass. So the
base stays as it is to the last bit, may be quantized, and no E is ever held whole; activation checkpointing repeats it too.
State: c, out numbers a site.

Differs from the known code (a third party's; the authors' is not published): D is scaled by s (there the product is discarded),
the gradient goes through E to the layers below (there it stops, which is no gradient of any loss), w is over all rows and not
over a sample. The size of G does not depend on accumulation: gradients here are those of the step's mean loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ..errors import IncompatibleError, UsageError
from ..modeling.arithmetic import linear
from ..modeling.protocols import is_conv1d
from ..modeling.sites import find_sites
from ..modeling.state import StateHolder
from ..registry import MethodConfig, register
from .backprop import BackpropEstimator
from .base import StepContext

#: values of eps that exist at a time
BLOCK = 1 << 22


class LoRAGGPO(MethodConfig):
    """Options of `lora_ggpo`."""

    sigma: float = Field(0.03, ge=0, description="size of the perturbation relative to the norm of a weight's row")
    beta: float = Field(0.01, ge=0, description="size of the perturbation per squared norm of a row's gradient")


@dataclass
class Target:
    """A perturbed linear map: key of its state, the trained graft (None: full tuning), its site and its adapter."""

    key: str
    graft: str | None
    site: Any
    adapter: Any


@register("estimator", "lora_ggpo", config=LoRAGGPO, paper="2502.14538",
          title="LoRA-GGPO: Mitigating Double Descent in LoRA Fine-Tuning via Gradient-Guided Perturbation Optimization",
          summary="exact gradients at randomly perturbed weights; the noise follows the norms of weights and gradients",
          adapters=["lora"], reads_gradients=True,
          bibtex="@article{chang2025loraggpo, title={LoRA-GGPO: Mitigating Double Descent in LoRA Fine-Tuning via Gradient-Guided "
                 "Perturbation Optimization}, author={Chang, Yupeng and Guo, Chenlu and Chang, Yi and Wu, Yuan}, "
                 "journal={arXiv:2502.14538}, year={2025}}")
class LoRAGGPOEstimator(BackpropEstimator):
    def __init__(self, config: LoRAGGPO | None = None):
        super().__init__(config or LoRAGGPO())
        self.scale: dict[str, Tensor] = {}  # c of each target, fp32 (out,)
        self.width: dict[str, Tensor] = {}  # mean row norm of each frozen weight

    def step(self, ctx):
        if getattr(getattr(ctx.optimizer, "config", None), "fused", False):
            raise UsageError("lora_ggpo reads the gradients, and a fused optimizer drops them inside backward",
                             remedy="optimizer.fused: false")
        found, before = targets(ctx), self.scale  # anew each step: a selection may take sites away
        self.scale = {}
        for target in found:
            c, device = before.get(target.key), target.site.product.device
            self.scale[target.key] = torch.zeros(target.site.out_features, device=device) if c is None else c.to(device)
        with perturbed(found, self.scale, ctx.holder):
            result = super().step(ctx)
        used = torch.cat(list(self.scale.values())).mean()
        with torch.no_grad():
            self.scale = {target.key: self._next(target) for target in found}
        result.metrics = {**result.metrics, "perturbation": used}
        return result

    def _next(self, target: Target) -> Tensor:
        product, adapter = target.site.product, target.adapter
        if adapter is None:
            norm = row_norms(product.dense().detach())
            grad = product.module.weight.grad
            slope = torch.zeros_like(norm) if grad is None else row_norms(grad.T if is_conv1d(product.module) else grad).square()
        else:
            if target.key not in self.width:
                self.width[target.key] = row_norms(product.dense().detach()).mean()
            B, A = adapter.factors()
            norm = (self.width[target.key].square() + row_squares(B.float(), A.float())).sqrt()
            B, A = adapter.lora_B, adapter.lora_A
            dB = torch.zeros_like(B) if B.grad is None else B.grad
            dA = torch.zeros_like(A) if A.grad is None else A.grad
            slope = adapter.scale**2 * row_squares(torch.cat([B, dB], 1).float(), torch.cat([dA, A]).float())
        return (self.config.sigma * norm + self.config.beta * slope) / math.sqrt(product.out_features)

    def state_dict(self):
        return dict(self.scale)

    def load_state_dict(self, state):
        self.scale = dict(state)


def row_norms(W: Tensor) -> Tensor:
    """Norms of the rows of W (out, in), fp32 (out,)."""
    return torch.linalg.vector_norm(W, dim=1, dtype=torch.promote_types(W.dtype, torch.float32)).float()


def row_squares(left: Tensor, right: Tensor) -> Tensor:
    """Squared row norms of left (out, k) @ right (k, in), without that product: (out,)."""
    return ((left @ (right @ right.T)) * left).sum(1).clamp_min(0.0)


def targets(ctx: StepContext) -> list[Target]:
    """The linear maps that this run trains. Raises IncompatibleError for an adapter that is no plain LoRA, and for experts."""
    trained = {id(p) for _, p in ctx.parameters}
    found = []
    for name, graft in ctx.holder.grafts.items():
        if not any(id(p) in trained for p in graft.parameters()):
            continue
        if graft.method != "lora":
            raise IncompatibleError(f"lora_ggpo measures the factors of lora, not of '{graft.method}'", remedy="estimator: backprop")
        found += [Target(f"{name}/{site}", name, graft.sites[site], adapter) for site, adapter in graft.adapters.items()]
    if not found:
        model = ctx.model.module if isinstance(ctx.model, nn.parallel.DistributedDataParallel) else ctx.model
        found = [Target(site.name, None, site, None) for site in find_sites(model)
                 if site.expert is not None or id(getattr(site.module, "weight", None)) in trained]
    if any(t.site.expert is not None for t in found):
        raise IncompatibleError("lora_ggpo perturbs the outputs of modules; fused experts have none of their own",
                                remedy="exclude the experts: adapter.target_modules: attention")
    return found


@contextmanager
def perturbed(found: list[Target], scale: dict[str, Tensor], holder: StateHolder) -> Iterator[None]:
    """Training forwards in this scope see W + E at every target."""
    modules: dict[int, tuple[nn.Module, dict[str, list[Target]]]] = {}
    for target in found:
        modules.setdefault(id(target.site.module), (target.site.module, {}))[1].setdefault(target.site.name, []).append(target)

    def hook(by_site: dict[str, list[Target]]) -> Callable:
        def add(module: nn.Module, args: tuple, y: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return y
            for name, own in by_site.items():
                c = row_scales(own, scale, holder, args[0])
                if c is None:
                    continue
                noise = Noise.apply(args[0], c, holder.generator(f"{name}/ggpo", args[0].device).initial_seed())
                rows = own[0].site.rows
                y = y + noise if rows is None else torch.cat([y[..., : rows.start], y[..., rows] + noise, y[..., rows.stop:]], -1)
            return y
        return add

    handles = [module.register_forward_hook(hook(by_site)) for module, by_site in modules.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def row_scales(own: list[Target], scale: dict[str, Tensor], holder: StateHolder, x: Tensor) -> Tensor | None:
    """c for the input x (N, ..., in) of one site: (out,), or (N, 1, ..., out) where rows have adapters of their own; None where
    the site's adapters are off."""
    state = holder.current
    live = [t for t in own if t.graft not in state.disabled]
    if not live:
        return None
    if state.rows is None or live[0].graft is None:
        return torch.stack([scale[t.key] for t in live]).sum(0)
    by_name = {t.graft: scale[t.key] for t in live}
    none = torch.zeros_like(scale[live[0].key])
    c, index = torch.stack([by_name.get(row, none) for row in state.rows]), holder.row_index(x)
    c = c if index is None else c.index_select(0, index)
    return c.reshape(c.shape[0], *[1] * (x.dim() - 2), c.shape[1])


class Noise(torch.autograd.Function):
    """c * (x eps^T): x (..., in) -> (..., out), c (..., out) broadcasts to it; eps is drawn from the seed in either pass."""

    @staticmethod
    def forward(ctx, x, c, seed):
        ctx.save_for_backward(x, c)
        ctx.seed = seed
        noise = x.new_empty(*x.shape[:-1], c.shape[-1])
        for rows, eps in blocks(seed, c.shape[-1], x):
            noise[..., rows] = linear(x, eps) * c[..., rows].to(x.dtype)
        return noise

    @staticmethod
    def backward(ctx, grad):
        x, c = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, None, None
        dx = torch.zeros_like(x)
        for rows, eps in blocks(ctx.seed, c.shape[-1], x):
            dx += linear(grad[..., rows] * c[..., rows].to(grad.dtype), eps.T)
        return dx, None, None


def blocks(seed: int, width: int, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(rows, eps (rows, in) in x's dtype), together eps (width, in)."""
    source = torch.Generator(device=x.device).manual_seed(seed)
    size, kind = max(1, BLOCK // x.shape[-1]), torch.float64 if x.dtype == torch.float64 else torch.float32
    for start in range(0, width, size):
        rows = slice(start, min(start + size, width))
        yield rows, torch.randn(rows.stop - start, x.shape[-1], generator=source, device=x.device, dtype=kind).to(x.dtype)
