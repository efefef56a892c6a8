"""Forward gradient (arXiv 2402.11592, after 2202.08587): the slope along a random direction by forward-mode differentiation.

    v_q ~ N(0, I), drawn as mezo's z       c_q = grad L(theta) . v_q, one forward that carries tangents (a JVP)
    theta <- theta - lr * (mean_q c_q v_q + wd * theta)                                    (no decay on 1-D tensors)

The estimate of mezo without its eps: no error of a finite difference, one pass instead of two (of about two passes' work), no weight
is perturbed. v is unbiased for the gradient like z, and as noisy. No backward pass and no graph: every activation has a tangent of its
own size while it lives, and a module has tangents for its weights while its forward runs. Memory: the forward with doubled activations,
one module's tangents, one piece. State: none.

Each module's trained tensors are replaced by dual ones when its forward begins, and put back when it ends; an adapter's, which no
module call brackets, for the whole pass. Attention runs as plain products and the output head through its module, chunk by chunk: fused
kernels know no tangents. A custom operation without a forward derivative is refused by name.

Differs from the official code: directions are drawn anew for the update instead of being kept for all tensors; several directions are
averaged; the tangents of one module exist at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.autograd.forward_ad as forward_ad
from pydantic import Field
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import IncompatibleError
from ..modeling import arithmetic
from ..registry import MethodConfig, register
from . import mezo
from .base import StepContext, micro_forward
from .mezo import MeZOEstimator, Named


class ForwardGradient(MethodConfig):
    """Options of `forward_gradient`."""

    lr: float = Field(1e-6, gt=0, description="rate of the update; about 1e-6 for full weights, 1e-4 for LoRA")
    n_samples: int = Field(1, ge=1, description="directions averaged per step, one pass each")
    weight_decay: float = Field(0.0, ge=0)


@register("estimator", "forward_gradient", config=ForwardGradient, paper="2402.11592", title="Forward gradient",
          summary="exact slopes along random directions by forward-mode differentiation: no backward, no graph, no state",
          bibtex="@article{baydin2022forward, title={Gradients without Backpropagation}, author={Baydin, Atilim Gunes and Pearlmutter, "
                 "Barak A. and Syme, Don and Wood, Frank and Torr, Philip}, journal={arXiv:2202.08587}, year={2022}}")
class ForwardGradientEstimator(MeZOEstimator):
    differentiates = True

    def __init__(self, config: ForwardGradient | None = None):
        super().__init__(config or ForwardGradient())

    def measure(self, ctx: StepContext, moving: Named) -> tuple[list[Tensor], Tensor, list]:
        coefficients = []
        for sample in range(self.config.n_samples):
            key = (ctx.seed, ctx.step, sample)
            with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level(), duals(ctx, moving, key):
                try:
                    value, slope, rows = self._pushed(ctx)
                except (NotImplementedError, RuntimeError) as error:
                    if "jvp" not in str(error) and "forward AD" not in str(error):
                        raise
                    raise IncompatibleError(f"forward_gradient: an operation of this model has no forward derivative ({error})",
                                            remedy="estimator: mezo, which needs values only") from error
            coefficients.append(slope)
        return coefficients, value, rows

    @staticmethod
    def _pushed(ctx: StepContext) -> tuple[Tensor, Tensor, list]:
        """(loss, its derivative along the tangents, rows)."""
        parts, rows = [], []
        for micro in range(len(ctx.batches)):
            with micro_forward(ctx, micro) as out:
                parts.append(_unpack(out.loss))
                rows.append(tuple(forward_ad.unpack_dual(t).primal for t in (out.row_loss, out.row_tokens)))
        extra = ctx.graft_losses()
        if extra is not None:
            parts.append(_unpack(extra))
        return torch.stack([p for p, _ in parts]).sum(), torch.stack([t for _, t in parts]).sum(), rows


def _unpack(x: Tensor) -> tuple[Tensor, Tensor]:
    primal, tangent = forward_ad.unpack_dual(x)
    return primal.double(), torch.zeros_like(primal, dtype=torch.float64) if tangent is None else tangent.double()


def direction(key: tuple, name: str, p: Tensor) -> Tensor:
    """v, of p's shape and dtype."""
    v = torch.zeros_like(p, memory_format=torch.preserve_format)
    mezo.add_noise(key, name, v, 1.0)
    return v


@contextmanager
def duals(ctx: StepContext, moving: Named, key: tuple) -> Iterator[None]:
    """Forwards in this scope see theta with the tangent v. A tied tensor has the same v in each of its modules."""
    names = {id(p): n for n, p in moving}
    grafted = {id(p) for graft in ctx.holder.grafts.values() for p in graft.parameters()}
    whole: dict[int, Tensor] = {}
    taken: list[tuple[nn.Module, str, nn.Parameter]] = []
    handles = []

    def put(module: nn.Module, own: list[tuple[str, nn.Parameter]]) -> None:
        for attribute, p in own:
            dual = whole.get(id(p))
            if dual is None:
                dual = forward_ad.make_dual(p.detach(), direction(key, names[id(p)], p))
                if id(p) in grafted:
                    whole[id(p)] = dual
            # a Parameter's slot takes no plain tensor: it leaves the table, and the attribute is set beside it
            del module._parameters[attribute]
            module.__dict__[attribute] = dual
            taken.append((module, attribute, p))

    def back(module: nn.Module | None) -> None:
        for entry in [e for e in taken if module is None or e[0] is module]:
            owner, attribute, p = entry
            owner.__dict__.pop(attribute, None)
            owner._parameters[attribute] = p
            taken.remove(entry)

    def owned(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
        return [(a, p) for a, p in module._parameters.items() if p is not None and id(p) in names]

    head = ctx.model.get_output_embeddings() if hasattr(ctx.model, "get_output_embeddings") else None
    kept = arithmetic.slow_on_cpu
    orders = {m: list(m._parameters) for m in ctx.model.modules() if owned(m)}
    try:
        arithmetic.slow_on_cpu = lambda dtype: False  # the piecewise wide product has no forward derivative
        for module in orders:
            own = owned(module)
            if any(id(p) in grafted for _, p in own):
                put(module, own)
            else:
                handles += [module.register_forward_pre_hook(lambda m, _, own=own: put(m, own)),
                            module.register_forward_hook(lambda m, *_: back(m), always_call=True)]
        if head is not None:  # a hooked head is called as a module
            handles.append(head.register_forward_pre_hook(lambda *_: None))
        yield
    finally:
        arithmetic.slow_on_cpu = kept
        for handle in handles:
            handle.remove()
        back(None)
        for module, order in orders.items():
            module._parameters = {a: module._parameters[a] for a in order}
