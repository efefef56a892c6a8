"""PiSSA: start from the principal singular values and vectors of W (arXiv 2404.02948); QPiSSA on quantised storage.

    W = U S V^T (out, in)     B = U_r sqrt(S_r / s)  (out, r)     A = sqrt(S_r / s) V_r^T  (r, in)     s = alpha / r
    base used: W - s B0 A0, with (B0, A0) the start; so y is unchanged at step 0 and training moves the principal part.

Dense storage: nothing is rewritten. The adapter subtracts its frozen start, s B A x - s B0 A0 x, so every other graft and
`disabled()` still see the pristine base. That costs one more rank-r product and a frozen copy of the start.
Quantised storage (QPiSSA): the residual is quantised instead, with `iterations` alternations
    R = W;  repeat { L = rank-r SVD of R;  Q = quant(W - L);  R = W - dequant(Q) }
(1: quantise the residual once). The graft then owns the stored weight: no other graft may share its sites. The codes that it replaces
wait in host memory for `detach`, so on a CPU they count twice. A site that is a part of a larger stored weight (q of a fused qkv) starts
as on dense storage.

Differs from the official code: the base is not overwritten (above); the fast SVD (`niter`) draws from a private generator.
Export as LoRA: rank 2r on the pristine base, [s B | -s B0], [A ; A0].
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ..modeling.source import pristine_weight
from ..registry import MethodConfig, register
from .base import Initializer, quantized_like, requantizable


class PiSSA(MethodConfig):
    """Options of `pissa`."""

    svd: Literal["exact", "fast"] = "exact"
    niter: int = Field(4, ge=0, description="power iterations of the fast SVD")
    iterations: int = Field(1, ge=1, description="alternations on quantised storage")


@register("initializer", "pissa", config=PiSSA, title="PiSSA: Principal Singular Values and Singular Vectors Adaptation",
          paper="2404.02948", summary="start from the principal part of W; on quantised storage only the residual is quantised",
          bibtex="@inproceedings{meng2024pissa, title={PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large "
                 "Language Models}, author={Meng, Fanxu and Wang, Zhaohui and Zhang, Muhan}, booktitle={NeurIPS}, year={2024}}",
          edits_base=True)
class PiSSAInitializer(Initializer):
    needs = "weights"

    @torch.no_grad()
    def build(self, site, product, adapter, statistics, generator):
        stored = requantizable(site)
        W = self.pristine(site) if stored else product.dense().detach().float()
        residual, edited = W, None
        for _ in range(self.config.iterations if stored else 1):
            B, A = self.principal(residual, adapter.r, generator)
            if stored:
                edited = self.quantize(site, W - B @ A)
                residual = W - edited.dequantize().float()
        adapter.lora_B.copy_(B / adapter.scale**0.5)
        adapter.lora_A.copy_(A / adapter.scale**0.5)
        # the pair is taken from the parameters as they are, so that s B A - B0 A0 vanishes to rounding at the start
        adapter.set_pair(adapter.lora_B.detach() * adapter.scale, adapter.lora_A.detach().clone(), in_storage=stored)
        return edited

    def principal(self, W: Tensor, r: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(U_r sqrt(S_r), sqrt(S_r) V_r^T) of W (out, in)."""
        if self.config.svd == "exact":
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        else:
            U, S, Vh = randomized_svd(W, r, self.config.niter, generator)
        root = S[:r].sqrt()
        return U[:, :r] * root, root[:, None] * Vh[:r]

    def plan_extra(self, graft):
        for name, adapter in graft.adapters.items():
            site = graft.sites[name]
            stored = requantizable(site)
            adapter.set_pair(torch.empty_like(adapter.lora_B), torch.empty_like(adapter.lora_A), in_storage=stored)
            if stored:
                graft.edit_storage(name, quantized_like(graft.model, site, torch.empty(site.out_features, site.in_features)))

    @classmethod
    def restore(cls, graft) -> None:
        """Quantise the residuals of a loaded graft again, from its saved pair and the pristine weights."""
        for name, adapter in graft.adapters.items():
            site = graft.sites[name]
            if not requantizable(site):
                adapter.pair_in_storage = False
                continue
            W = pristine_weight(graft.model, site)
            adapter.pair_in_storage = True
            graft.edit_storage(name, quantized_like(graft.model, site, W - adapter.lora_B0 @ adapter.lora_A0))


def randomized_svd(W: Tensor, r: int, niter: int, generator: torch.Generator, oversample: int = 8):
    """Randomised SVD of W (m, n) (Halko et al. 2011): U (m, k), S (k,), Vh (k, n), k = min(r + oversample, m, n)."""
    k = min(r + oversample, *W.shape)
    Q = torch.linalg.qr(W @ torch.randn(W.shape[1], k, generator=generator, dtype=W.dtype).to(W.device)).Q
    for _ in range(niter):
        Q = torch.linalg.qr(W @ torch.linalg.qr(W.T @ Q).Q).Q
    U, S, Vh = torch.linalg.svd(Q.T @ W, full_matrices=False)
    return Q @ U, S, Vh
