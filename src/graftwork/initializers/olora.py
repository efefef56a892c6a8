"""OLoRA: orthonormal low-rank adaptation (arXiv 2406.01775). Start from the QR decomposition of W.

    W = Q R  (out, in),  Q (out, k) orthonormal columns,  R (k, in) upper triangular,  k = min(out, in)
    B0 = Q[:, :r]  (out, r)     A0 = R[:r]  (r, in)     y = W x + s B A x - s B0 A0 x     s = alpha / r

No pass over data and no SVD: one QR a site. r (in + out) trained values, as many frozen ones.

Differs from the official code (and PEFT's): the stored weight is not overwritten by W - s B0 A0, the adapter subtracts its
frozen start (`_subtracted`). On quantized storage Q and R are those of the dequantized weight, as in PEFT, but the residual is
not quantized again, so the start is exact there too.
"""

from __future__ import annotations

import torch

from ..registry import MethodConfig, register
from ._subtracted import SubtractedStart


class OLoRA(MethodConfig):
    """No options."""


@register("initializer", "olora", config=OLoRA, title="OLoRA: Orthonormal Low-Rank Adaptation", paper="2406.01775",
          summary="start from the first columns of the QR decomposition of W; the output is unchanged at the start",
          bibtex="@article{buyukakyuz2024olora, title={OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models}, "
                 "author={B{\\\"u}y{\\\"u}kaky{\\\"u}z, Kerim}, journal={arXiv:2406.01775}, year={2024}}",
          edits_base=True)
class OLoRAInitializer(SubtractedStart):
    needs = "weights"

    @torch.no_grad()
    def build(self, site, product, adapter, statistics, generator):
        self.check_rank(site.name, adapter.r, product)
        Q, R = torch.linalg.qr(product.dense().detach().float())
        self.place(adapter, Q[:, : adapter.r], R[: adapter.r])
