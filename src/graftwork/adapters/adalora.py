"""AdaLoRA: low-rank change in the form of a singular value decomposition (arXiv 2303.10512); selection `adalora` moves the ranks.

    y = W x + b + s B (g * (A dropout(x))),   A (r, in), g (r,), B (out, r),   s = alpha / r
    start: A, B ~ N(0, 0.02^2), g = 0, so y is unchanged
    loss += orth * mean over all A and B of the graft of |A A^T - I|_F and |B^T B - I|_F
    r (in + out + 1) trained values; r is the rank before pruning, 1.5 target_r in the paper

A rank whose g is zero is not saved, and s keeps the r of the config. PEFT: r is init_r, and its scale is alpha / (r + 1e-5).
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import nn

from ..registry import register
from ._gated import GatedAdapter, GatedConfig


class AdaLoRA(GatedConfig):
    """Options of `adalora`."""

    r: int = Field(12, ge=1, description="rank at the start, more than the target")
    orth: float = Field(0.5, ge=0.0, description="factor of the orthogonality term in the loss")


@register("adapter", "adalora", config=AdaLoRA, title="AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
          paper="2303.10512", summary="SVD-form change B diag(g) A, whose ranks selection adalora prunes to a budget",
          bibtex="@inproceedings{zhang2023adalora, title={AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning}, "
                 "author={Zhang, Qingru and Chen, Minshuo and Bukharin, Alexander and Karampatziakis, Nikos and He, Pengcheng and "
                 "Cheng, Yu and Chen, Weizhu and Zhao, Tuo}, booktitle={ICLR}, year={2023}}")
class AdaLoRAAdapter(GatedAdapter):
    zero_start = True

    def __init__(self, site, config, *, shared, generator):
        super().__init__(site, config, shared=shared, generator=generator)
        self.lora_A = nn.Parameter(torch.empty(self.r, site.in_features).normal_(0.0, 0.02, generator=generator))
        self.gate = nn.Parameter(torch.zeros(self.r))
        self.lora_B = nn.Parameter(torch.empty(site.out_features, self.r).normal_(0.0, 0.02, generator=generator))
        self.orth = config.orth

    @classmethod
    def parameter_count(cls, site, config):
        return config.r * (site.in_features + site.out_features + 1)

    def auxiliary_loss(self):
        return self.orth / (2 * self.shared.sites) * self.off_orthogonal() if self.orth else None
