"""HALO: backpropagation whose matrix products have 8-bit operands, made accurate by Hadamard rotations (arXiv 2501.02625).

X (B, n) tokens, W (m, n), E = dL/dY (B, m); Q(.) one scale a tensor, max|.| / 127 (INT8) or / 448 (FP8 e4m3), nearest; H orthonormal

    level 0   Y = Q(X) Q(W)^T            dX = Q(E) Q(W)                             dW = Q(E)^T Q(X)
    level 1   Y = Q(X H_n) Q(W H_n)^T    dX = [Q(E) Q(W H_n)] H_n^T                 dW = [Q(E)^T Q(X H_n)] H_n^T
    level 2   as 1, but                  dX = H_B^T [Q(H_B E) Q(W H_n)] H_n^T       B padded with zero rows to a size that has an H_B

H cancels; what it does is spread outliers (channels of X by H_n, tokens of E by H_B) so that one scale serves the tensor. Acts on the
linear maps of the model (`target_modules`, by default all but embeddings, head and routers; fused experts stay as they are), whatever is
trained: with full tuning all three products, on the frozen base under an adapter the first two, while the adapter's own products get the
unquantized X and E. Biases are added, and their gradients summed, in high precision. Masters, optimizer and everything else are
unchanged, and so is the model after a step: forwards outside of the steps (evaluation, generation) are in plain precision, as the model
will be used.

For the backward pass X and W are kept as codes, one byte an entry; reuse_weights: false makes W's codes again there (less memory, more
work; the same numbers). No state. This emulates the arithmetic: on a CPU it is slower than plain products and shows what the format does
to training.

Departures and gaps: the paper's kernels want 16-bit weights without bias and B a supported size; here any. Rotations are computed in
fp32. Widths without a known Hadamard matrix are rotated in blocks (see _hadamard.py), those not divisible by 4 refused at levels 1 and 2.
FP6 and the quantized all-gather of HQ-FSDP are not part of this. One scale spans all rows of a batch, so the adapters of a fleet would
see each other: refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..errors import IncompatibleError, UsageError
from ..modeling.protocols import Product, product_of
from ..modeling.sites import find_sites
from ..registry import MethodConfig, register
from ._hadamard import block_of
from ._rotated import FORMATS, Mode, Rotated, wide
from .backprop import BackpropEstimator


class HALO(MethodConfig):
    """Options of `halo`."""

    format: Literal["int8", "fp8"] = Field("int8", description="of the operands: int8, or fp8 (e4m3)")
    level: Literal[0, 1, 2] = Field(2, description="rotations: none, of the features, of the tokens too")
    reuse_weights: bool = Field(True, description="keep the codes of W from forward to backward, or make them again")
    target_modules: str | list[str] = Field("all-linear", description="the maps, as for adapters")
    exclude_modules: list[str] = Field([], description="names (suffixes) of maps that stay in high precision")


@register("estimator", "halo", config=HALO, paper="2501.02625",
          title="HALO: Hadamard-Assisted Lower-Precision Optimization for LLMs",
          summary="backpropagation with INT8 or FP8 operands in every linear map, Hadamard-rotated (emulated)", couples_rows=True,
          bibtex="@article{ashkboos2025halo, title={HALO: Hadamard-Assisted Lower-Precision Optimization for LLMs}, author={Ashkboos, "
                 "Saleh and Nikdan, Mahdi and Tabesh, Soroush and Castro, Roberto L. and Hoefler, Torsten and Alistarh, Dan}, "
                 "journal={arXiv:2501.02625}, year={2025}}")
class HALOEstimator(BackpropEstimator):
    def __init__(self, config: HALO | None = None):
        super().__init__(config or HALO())

    def step(self, ctx):
        if any(batch.get("rows") is not None for batch in ctx.batches):
            raise IncompatibleError("halo has one scale for all rows of a batch, and those of a fleet are of different adapters",
                                    remedy="estimator: backprop, or train the files one by one")
        model = ctx.model.module if isinstance(ctx.model, nn.parallel.DistributedDataParallel) else ctx.model
        with low_precision(self.modules(model), self.mode):
            return super().step(ctx)

    @property
    def mode(self) -> Mode:
        return Mode(FORMATS[self.config.format], self.config.level, self.config.reuse_weights)

    def modules(self, model: nn.Module) -> list[nn.Module]:
        """The linear maps that compute in low precision. Raises UsageError for a head, and for widths that no rotation fits."""
        sites = find_sites(model, self.config.target_modules, exclude_modules=self.config.exclude_modules)
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if any(site.module is head for site in sites):
            raise UsageError("halo: the output head belongs to the loss, which computes it in its own way",
                             remedy="leave the head out of estimator.target_modules")
        found = {id(site.module): site for site in sites if site.expert is None}
        if not found:
            raise UsageError("halo found fused experts alone, which stay in high precision", remedy="estimator: backprop")
        odd = next((s for s in found.values() if self.config.level and block_of(product_of(s.module).in_features) < 4), None)
        if odd is not None:
            raise UsageError(f"halo: no Hadamard rotation fits the {odd.in_features} inputs of '{odd.name}' (not divisible by 4)",
                             remedy=f"estimator.exclude_modules: [{odd.name.rpartition('.')[2]}], or estimator.level: 0")
        return [site.module for site in found.values()]


class RotatedProduct(Product):
    """The frozen map of a grafted site, multiplied in low precision; what else it is asked for is the map's own answer."""

    def __init__(self, inner: Product, mode: Mode):
        self.inner, self.mode = inner, mode
        self.in_features, self.out_features = inner.in_features, inner.out_features

    def product(self, x: Tensor, leaves: dict[str, Tensor] | None = None) -> Tensor:
        if leaves is not None:  # weights that an adapter has made for itself
            return self.inner.product(x, leaves)
        weight = self.inner.dense()
        return Rotated.apply(x, weight.detach() if self.inner.frozen else weight, None, self.inner, self.mode)

    def transposed(self, grad: Tensor) -> Tensor:
        codes = self.mode.turned(self.inner.dense().detach())
        dx = self.mode.input_gradient(wide(grad.reshape(-1, grad.shape[-1])), None, codes)
        return dx.to(grad.dtype).reshape(*grad.shape[:-1], -1)

    def dense(self, leaves: dict[str, Tensor] | None = None) -> Tensor:
        return self.inner.dense(leaves)

    @property
    def bias(self) -> Tensor | None:
        return self.inner.bias

    @property
    def frozen(self) -> bool:
        return self.inner.frozen

    @property
    def dtype(self) -> torch.dtype:
        return self.inner.dtype

    @property
    def device(self) -> torch.device:
        return self.inner.device

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def _forward(product: Product, mode: Mode, x: Tensor) -> Tensor:
    return Rotated.apply(x, product.dense(), product.bias, product, mode)


@contextmanager
def low_precision(modules: list[nn.Module], mode: Mode) -> Iterator[None]:
    """In this scope these linear maps multiply in low precision; afterwards they are what they were."""
    put_back = []
    try:
        for module in modules:
            graft = module._modules.get("graft")
            slot = None if graft is None else graft.slot("whole")
            if slot is not None:  # the site hands X to its adapters as it is
                put_back.append(partial(setattr, slot, "frozen", slot.frozen))
                slot.frozen = RotatedProduct(slot.frozen, mode)
                continue
            before = module.__dict__.get("forward")
            put_back.append(partial(module.__dict__.pop, "forward") if before is None else partial(setattr, module, "forward", before))
            module.forward = partial(_forward, product_of(module), mode)
        yield
    finally:
        for restore in reversed(put_back):
            restore()
