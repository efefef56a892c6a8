"""NLoRA: start from blocks of W in the manner of the Nystrom method, without any decomposition (arXiv 2502.14482).

    landmarks I (r rows), J (r columns):   A = W[I, :]  (r, in)     B = W[:, J]  (out, r)
    core  block: N = W[I, J]  (r, r);      nystrom: N = pinv(W[I, J]),  B N A is then the Nystrom approximation of W
    `lora` gets B N and A:   y = W x + s B N A x  [- s B0 N0 A0 x].   Adapter `nlora` keeps the core as a factor of its own.

Costs r (in + out) copies (and one r x r pseudo-inverse). With subtract the start is taken out of W, by a frozen pair in the
adapter (`_subtracted`), so the output is unchanged at the start, on dense and on quantized storage (blocks of the dequantized
weight). core: nystrom needs that: its start is of the size of W. Its pseudo-inverse cuts singular values below 1e-3 of the
largest, or an ill-conditioned block would make B0 N0 so large that the subtraction loses its digits.

The official code takes core: block, landmarks: first (the first r rows and columns) and subtract: false, so that its output is
shifted by s B N A x at the start. The defaults here differ in subtract only.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from ..errors import UsageError
from ..registry import MethodConfig, register
from ._subtracted import SubtractedStart

#: singular values of the block below this share of the largest count as zero
CUT = 1e-3


class Nystrom(MethodConfig):
    """Options of `nystrom`."""

    core: Literal["block", "nystrom"] = "block"
    landmarks: Literal["first", "sampled"] = Field("first", description="sampled: r rows and columns by the graft's seed")
    subtract: bool = Field(True, description="take the start out of W, so that the output is unchanged")


@register("initializer", "nystrom", config=Nystrom, title="NLoRA: Nystrom-Initiated Low-Rank Adaptation", paper="2502.14482",
          summary="start from r rows, r columns and their crossing in W; costs copies only",
          bibtex="@article{guo2025nlora, title={NLoRA: Nystr{\\\"o}m-Initiated Low-Rank Adaptation for Large Language Models}, "
                 "author={Guo, Chenlu and Wu, Yuan and Chang, Yi}, journal={arXiv:2502.14482}, year={2025}}",
          edits_base=True)
class NystromInitializer(SubtractedStart):
    needs = "weights"
    def check(self, adapter, config, sites):
        super().check(adapter, config, sites)
        if self.config.core == "nystrom" and not self.config.subtract:
            raise UsageError("initializer 'nystrom': core: nystrom starts at an approximation of W itself, which would be added to W",
                             remedy="subtract: true, or core: block")

    @torch.no_grad()
    def build(self, site, product, adapter, statistics, generator):
        self.check_rank(site.name, adapter.r, product)
        W, r = product.dense().detach().float(), adapter.r
        rows = columns = torch.arange(r)
        if self.config.landmarks == "sampled":
            rows, columns = (torch.randperm(n, generator=generator)[:r].sort().values for n in W.shape)
        rows, columns = rows.to(W.device), columns.to(W.device)
        A, B = W[rows], W[:, columns]
        N = A[:, columns]
        if self.config.core == "nystrom":
            N = torch.linalg.pinv(N, rtol=CUT)
        adapter.lora_A.copy_(A)
        adapter.lora_B.copy_(B @ N)
        if self.config.subtract:
            start, A0 = adapter.factors()
            adapter.set_pair(start.detach().clone(), A0.detach().clone(), in_storage=False)

    def plan_extra(self, graft):
        if self.config.subtract:
            super().plan_extra(graft)
