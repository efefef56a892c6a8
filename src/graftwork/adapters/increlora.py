"""IncreLoRA: low-rank adaptation that grows (arXiv 2308.12043); selection `increlora` gives ranks to the sites that use them.

    y = W x + b + s B (e * (A dropout(x))),   A (k + h, in), B (out, k + h),   s = alpha / r, fixed while k grows from r
    e = [g, 1e-5 ... 1e-5]: k trained gates g (k,), and the constant gate of `reserve` h rows that learn ahead of their turn
    start: A, B ~ N(0, 0.02^2), g = 0: y is unchanged up to the reserve, 1e-5 s B A
    loss += orth * mean over all A and B of the graft of |A A^T - I|_F and |B^T B - I|_F (reserve included)
    (k + h) (in + out) + k trained values at a site

Growing turns reserve rows into ranks: their gate stays 1e-5 and becomes a trained value, so the function is unchanged; new
reserve rows add 1e-5 s b a^T each. The official code scales by alpha / k instead, which shrinks all that was learned at each
growth; a fixed s is the departure here. Gates of trained ranks that are exactly zero are saved too (they are at the start).
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from ..errors import UsageError
from ..registry import register
from ._gated import GatedAdapter, GatedConfig

#: gate of a reserve row
AHEAD = 1e-5
SPREAD = 0.02


class IncreLoRA(GatedConfig):
    """Options of `increlora`."""

    r: int = Field(1, ge=1, description="rank at the start")
    reserve: int = Field(1, ge=1, description="rows a site trains ahead; it can grow by so many at a time")
    orth: float = Field(0.1, ge=0.0, description="factor of the orthogonality term in the loss")


@register("adapter", "increlora", config=IncreLoRA, title="IncreLoRA: Incremental Parameter Allocation", paper="2308.12043",
          summary="LoRA that starts at rank 1; selection increlora grows the ranks that matter",
          bibtex="@article{zhang2023increlora, title={IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient "
                 "Fine-tuning}, author={Zhang, Feiyu and Li, Liangzhi and Chen, Junhao and Jiang, Zhouqiang and Wang, Bowen and "
                 "Qian, Yiming}, journal={arXiv:2308.12043}, year={2023}}")
class IncreLoRAAdapter(GatedAdapter):
    def __init__(self, site, config, *, shared, generator):
        super().__init__(site, config, shared=shared, generator=generator)
        rows, most = self.r + config.reserve, min(site.in_features, site.out_features)
        if rows > most:
            raise UsageError(f"increlora: rank {self.r} and {config.reserve} reserve rows are more than '{site.name}' has ({most})",
                             remedy="smaller r and reserve, or exclude this module")
        self.lora_A = nn.Parameter(torch.empty(rows, site.in_features).normal_(0.0, SPREAD, generator=generator))
        self.gate = nn.Parameter(torch.zeros(self.r))
        self.lora_B = nn.Parameter(torch.empty(site.out_features, rows).normal_(0.0, SPREAD, generator=generator))
        self.reserve, self.orth = config.reserve, config.orth

    @classmethod
    def parameter_count(cls, site, config):
        return (config.r + config.reserve) * (site.in_features + site.out_features) + config.r

    @property
    def gates(self):
        ahead = self.lora_A.shape[0] - self.gate.shape[0]
        return torch.cat([self.gate, self.gate.new_full((ahead,), AHEAD)]) if ahead else self.gate

    def auxiliary_loss(self):
        return self.orth / (2 * self.shared.sites) * self.off_orthogonal() if self.orth else None

    @torch.no_grad()
    def grow(self, count: int, generator: torch.Generator) -> None:
        """Make `count` reserve rows ranks, and draw as many new reserve rows."""
        def more(old: Tensor, dim: int, shape: tuple[int, ...]) -> Tensor:
            return torch.cat([old, (torch.randn(shape, generator=generator) * SPREAD).to(old.device, old.dtype)], dim)

        self.gate.data = torch.cat([self.gate.data, self.gate.new_full((count,), AHEAD)])
        self.lora_A.data = more(self.lora_A.data, 0, (count, self.in_features))
        self.lora_B.data = more(self.lora_B.data, 1, (self.out_features, count))

    @torch.no_grad()
    def close(self) -> None:
        """Drop the reserve: the site grows no more."""
        rows = self.gate.shape[0]
        self.lora_A.data = self.lora_A.data[:rows].clone()
        self.lora_B.data = self.lora_B.data[:, :rows].clone()

    def artifact_state(self):
        return dict(self.named_parameters())
