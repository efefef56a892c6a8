"""LoRA-GA: low-rank adaptation with gradient approximation (arXiv 2407.05000). Start along the gradient of the full weight.

    G = mean over `batches` batches of dL/dW  (out, in), fp32, at the pretrained weights (`_gradients`)
    U S V^T = rank-4r SVD of G;   A0 = c V[:, I_A]^T  (r, in)     B0 = c U[:, I_B]  (out, r)     y = W x + s B A x - s B0 A0 x
    direction  ArB2r: I_A = first r, I_B = next r;  A2rBr: the other way;  ArBr: A odd, B even ones of the first 2r;
               random: a random half of the first 2r each
    scale      stable: c = out^(1/4) / sqrt(gamma);  unit: 1;  gd: 1/s;  weight: mean sqrt(top r singular values of W / s)

A first gradient step changes B A by -lr s (B0 B0^T G + G A0^T A0); with disjoint halves of the leading 2r directions that is
(for c = 1) the best rank-2r approximation of the full step. r must be at most min(in, out) / 2. The paper uses it with
use_rslora.

Differs from the official code: the stored weight is not overwritten, the adapter subtracts its frozen start (`_subtracted`);
the randomized SVD draws from a private generator. PEFT's version also multiplies B0 by the singular values of G and scales B
alone, which loses the property above; that is not done here.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ..registry import MethodConfig, register
from ._gradients import GradientPass
from ._subtracted import SubtractedStart
from .pissa import randomized_svd


class LoRAGA(MethodConfig):
    """Options of `lora_ga`."""

    batches: int = Field(64, ge=1, description="batches of the gradient estimate; fewer if the data has fewer")
    direction: Literal["ArB2r", "A2rBr", "ArBr", "random"] = "ArB2r"
    scale: Literal["stable", "unit", "gd", "weight"] = "stable"
    gamma: float = Field(16.0, gt=0.0, description="of scale: stable")
    niter: int = Field(4, ge=0, description="power iterations of the randomized SVD")


@register("initializer", "lora_ga", config=LoRAGA, title="LoRA-GA: Low-Rank Adaptation with Gradient Approximation",
          paper="2407.05000", summary="A and B from the SVD of the full weight's gradient on your data: the first step follows it",
          bibtex="@inproceedings{wang2024loraga, title={LoRA-GA: Low-Rank Adaptation with Gradient Approximation}, "
                 "author={Wang, Shaowen and Yu, Linxi and Li, Jian}, booktitle={NeurIPS}, year={2024}}",
          edits_base=True)
class LoRAGAInitializer(GradientPass, SubtractedStart):
    ranks_taken = 2

    @torch.no_grad()
    def build(self, site, product, adapter, statistics, generator):
        self.check_rank(site.name, adapter.r, product)
        G, r = statistics[site.module_name], adapter.r
        G = (G if site.rows is None else G[site.rows]).to(product.device)
        U, _, Vh = randomized_svd(G, 2 * r, self.config.niter, generator, oversample=2 * r)
        of_A, of_B = self.halves(r, generator)
        c = self.factor(product, adapter, generator)
        self.place(adapter, c * U[:, of_B], c * Vh[of_A])

    def halves(self, r: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Indices (r,) of the singular directions that A and B take, disjoint halves of the first 2r."""
        every = torch.arange(2 * r)
        if self.config.direction == "ArBr":
            return every[1::2], every[0::2]
        if self.config.direction == "random":
            every = torch.randperm(2 * r, generator=generator)
        return (every[r:], every[:r]) if self.config.direction == "A2rBr" else (every[:r], every[r:])

    def factor(self, product, adapter, generator: torch.Generator) -> float | Tensor:
        """c, the size of both factors."""
        if self.config.scale == "stable":
            return product.out_features**0.25 / self.config.gamma**0.5
        if self.config.scale == "gd":
            return 1.0 / adapter.scale
        if self.config.scale == "weight":
            W = product.dense().detach().float()
            S = randomized_svd(W, adapter.r, self.config.niter, generator, oversample=3 * adapter.r)[1]
            return (S[: adapter.r] / adapter.scale).sqrt().mean()
        return 1.0
