"""LoftQ: start a LoRA from what quantization loses, and quantize what the LoRA leaves over (arXiv 2310.08659).

    L_0 = 0;   for t = 1 ... T:   Q_t = quant(W - L_(t-1)),   L_t = rank-r SVD of W - Q_t
    base used: Q_T        s B A = L_T,   B = U_r sqrt(S_r / s) (out, r), A = sqrt(S_r / s) V_r^T (r, in), s = alpha / r

so the start is Q_T + L_T, nearer to W than quant(W). Dividing by sqrt(s) is what keeps it that for any alpha (the official code
leaves it out, and the correction comes out s times too large or small).

quant is the storage's own format. With `iterations: 1` (the default, as in the official code) Q_1 is the base as it is stored, however it
was quantized: nothing is edited, and other grafts may share it. With more the graft owns the stored weight, as QPiSSA's does: no
other graft may be on its sites, and the artifact keeps L_(T-1), from which the same codes are quantized again on loading. A
calibration that reads data cannot be run again for that: iterations: 1 there.

A dense base loses nothing and is refused. As a LoRA for the stored base: (B, A); for a dense one: rank 2r with L_(T-1) taken off.
"""

from __future__ import annotations

import torch
from pydantic import Field

from ..errors import IncompatibleError
from ..modeling.protocols import Product
from ..registry import register
from .base import requantizable
from .pissa import PiSSA, PiSSAInitializer


class LoftQ(PiSSA):
    """Options of `loftq`."""

    iterations: int = Field(1, ge=1, description="T: how often to quantize and decompose; above 1 the base is edited")


def storage_of(product: Product):
    """The storage that a site is in, whole or a slice of it; None for a dense one."""
    return getattr(product, "whole", product).stored


@register("initializer", "loftq", config=LoftQ, title="LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models",
          paper="2310.08659", summary="start from the principal part of what quantization loses, and quantize the rest again",
          bibtex="@inproceedings{li2024loftq, title={LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models}, "
                 "author={Li, Yixiao and Yu, Yifan and Liang, Chen and He, Pengcheng and Karampatziakis, Nikos and Chen, Weizhu and "
                 "Zhao, Tuo}, booktitle={ICLR}, year={2024}}",
          edits_base=True, needs_quantized=True)
class LoftQInitializer(PiSSAInitializer):
    def check(self, adapter, config, sites):
        super().check(adapter, config, sites)
        for site in sites:
            if storage_of(site.product) is None:
                raise IncompatibleError(f"initializer 'loftq' starts from what quantization loses, and '{site.name}' is dense",
                                        remedy="storage: nf4 (or int4), or initializer: pissa")
            if self.config.iterations > 1 and not requantizable(site):
                raise IncompatibleError(f"'{site.name}' is a part of a larger module and cannot be quantized again on its own",
                                        remedy="initializer.iterations: 1, or target whole projections")

    @torch.no_grad()
    def build(self, site, product, adapter, statistics, generator):
        W = self.pristine(site)
        edited = replaced = None
        B, A = self.principal(W - product.dense().float(), adapter.r, generator)
        for _ in range(self.config.iterations - 1):
            replaced = B, A
            edited = self.quantize(site, W - B @ A)
            B, A = self.principal(W - edited.dequantize().float(), adapter.r, generator)
        adapter.lora_B.copy_(B / adapter.scale**0.5)
        adapter.lora_A.copy_(A / adapter.scale**0.5)
        if replaced is not None:
            adapter.set_pair(*(each.to(adapter.lora_A.device) for each in replaced), in_storage=True)
        return edited

    def plan_extra(self, graft):
        if self.config.iterations > 1:
            super().plan_extra(graft)
