"""LQ-LoRA: start a LoRA from the principal part of W, quantize what it leaves over, and alternate (arXiv 2311.12023).

    Q_0 = 0;   for t = 1 ... T:   L_t = rank-r SVD of W - Q_(t-1),   Q_t = quant(W - L_t),   e_t = |W - Q_t - L_t|_F
    until e_t >= e_(t-1);  the (Q, L) of the least e is taken
    base used: Q        s B A = L,   B = U_r sqrt(S_r / s) (out, r),   A = sqrt(S_r / s) V_r^T (r, in),   s = alpha / r

so the start is Q + L for any alpha. LoftQ goes round in the other order: it quantizes first. quant is the storage's own format, of each
site its own (`mixed`), with its calibration where that reads no data. The graft owns the stored weight, as QPiSSA's does: no other graft
may be on its sites. The artifact keeps L, from which the same codes are quantized again on loading.

Storage `lowrank_plus` has a low-rank part of its own, which stays frozen; this initializer puts it into the adapter instead, where it
trains, so such a base is refused. Weighted errors (the paper's Fisher) are options of that storage, not of this.

Departures: the official loop returns the iterate after the best. A dense base loses nothing and is refused. As a LoRA for the
stored base: (B, A); for a dense one: rank 2r with L taken off. Oracles: tests/oracles/test_lq_lora.py.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from ..errors import IncompatibleError
from ..registry import MethodConfig, register
from .base import requantizable
from .loftq import storage_of
from .pissa import PiSSAInitializer


class LQLoRA(MethodConfig):
    """Options of `lq_lora`."""

    svd: Literal["exact", "fast"] = "exact"
    niter: int = Field(4, ge=0, description="power iterations of the fast SVD")
    iterations: int = Field(100, ge=1, description="T: most rounds; it ends where the error no longer falls")


@register("initializer", "lq_lora", config=LQLoRA, title="LQ-LoRA: Low-rank Plus Quantized Matrix Decomposition", paper="2311.12023",
          summary="start from the principal part of W and quantize the rest, in turns until the error grows",
          bibtex="@inproceedings{guo2024lqlora, title={{LQ-LoRA}: Low-rank Plus Quantized Matrix Decomposition for Efficient Language "
                 "Model Finetuning}, author={Guo, Han and Greengard, Philip and Xing, Eric P. and Kim, Yoon}, booktitle={ICLR}, "
                 "year={2024}}",
          edits_base=True, needs_quantized=True)
class LQLoRAInitializer(PiSSAInitializer):
    def check(self, adapter, config, sites):
        super().check(adapter, config, sites)
        for site in sites:
            stored = storage_of(site.product)
            if stored is None:
                raise IncompatibleError(f"initializer 'lq_lora' starts from what quantization loses, and '{site.name}' is dense",
                                        remedy="storage: nf, nf4, int4 or mixed, or initializer: pissa")
            if stored.method == "lowrank_plus":
                raise IncompatibleError(f"'{site.name}' is in storage lowrank_plus, which keeps the low-rank part itself",
                                        remedy=f"storage: {stored.options.base['method']} with this initializer, or initializer: default")
            if not requantizable(site):
                raise IncompatibleError(f"'{site.name}' is a part of a larger module and cannot be quantized again on its own",
                                        remedy="target whole projections")

    @torch.no_grad()
    def build(self, site, product, adapter, statistics, generator):
        W, best, rest = self.pristine(site), None, None
        for _ in range(self.config.iterations):
            B, A = self.principal(W if rest is None else W - rest, adapter.r, generator)
            # as the parameters hold them, so that what is quantized is what they leave
            root = adapter.scale**0.5
            up, down = (B / root).to(adapter.lora_B.dtype), (A / root).to(adapter.lora_A.dtype)
            pair = up.float() * adapter.scale, down.float()
            low = pair[0] @ pair[1]
            edited = self.quantize(site, W - low)
            rest = edited.dequantize().float()
            error = float((W - low - rest).norm())
            if best is not None and error >= best[0]:
                break
            best = error, up, down, pair, edited
        _, up, down, pair, edited = best
        adapter.lora_B.copy_(up)
        adapter.lora_A.copy_(down)
        adapter.set_pair(*(each.to(adapter.lora_A.device) for each in pair), in_storage=True)
        return edited
