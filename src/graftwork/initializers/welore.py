"""WeLore's ranks: one threshold on the normalized singular values of all weights (arXiv 2407.11239). For the adapter `welore`.

    s (a,) the singular values of a site's W (out, in), a = min(out, in);   s' = (s - min s) / (max s - min s)
    k = #{s' >= theta},   theta such that the share of all singular values that falls below it is `reduction`
    a site whose pair of rank k pays becomes one, any other keeps its dense, frozen W and gets no adapter (rank 0)

No data is read. The official code has theta in tables for two models; here it is found: the share below theta is a step function
that changes at the pooled s' only, so theta is one of them, the exact end of any bisection. The share differs from
`reduction` by less than one singular value, unless equal s' stand at that place (every W has one 0 and one 1).

What pays: rule `break_even`, k (out + in) < out in, which is k < a / 2 for square W and nearly k < a for very wide ones. Rule `half` is
the official code's, (a - k) / a > 0.4999 for every shape: it turns down profitable pairs of rectangular weights.
Dense sites count in the share as if cut, as in the paper, and a pair has out + in values for each k, so what is left is more than
the share says: on SmolLM2-135M reduction 0.5 makes pairs of 159 of 210 weights, and pairs and dense weights have 75 % of the values.

A caution that is the paper's own: min and max decide the scale, so one outlying singular value lowers all s' of its weight, and
that weight keeps less. A weight of equal singular values is kept whole.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ..errors import UsageError
from ..registry import MethodConfig, lookup, register
from .base import Initializer

#: the official code's least share of a weight's singular values below theta
LEAST_PRUNED = 0.4999


class WeLoreRanks(MethodConfig):
    """Options of `welore`."""

    reduction: float = Field(0.5, gt=0.0, lt=1.0, description="share of the singular values of all sites that falls away")
    rule: Literal["break_even", "half"] = Field("break_even", description="which sites become pairs")


def normalized(s: Tensor) -> Tensor:
    """s' (a,) in [0, 1] of singular values s (a,); all 1 where they are equal."""
    span = s.max() - s.min()
    return (s - s.min()) / span if bool(span > 0) else torch.ones_like(s)


def threshold(spectra: dict[str, Tensor], reduction: float) -> float:
    """theta: the number of pooled values below it is the possible one that is nearest to reduction * their number."""
    pooled = torch.cat(list(spectra.values())).sort().values
    wanted = reduction * len(pooled)
    at = min(round(wanted), len(pooled) - 1)
    low, high = (int(torch.searchsorted(pooled, pooled[at], right=right)) for right in (False, True))  # the run of equal values
    return float(pooled[high if high < len(pooled) and high - wanted < wanted - low else low])


@register("initializer", "welore", config=WeLoreRanks, paper="2407.11239",
          title="From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge from Low-Rank Gradients",
          summary="which weights become pairs and of what rank, by one threshold on all normalized singular values",
          bibtex="@article{jaiswal2024welore, title={From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge from Low-Rank "
                 "Gradients}, author={Jaiswal, Ajay and Yin, Lu and Zhang, Zhenyu and Liu, Shiwei and Zhao, Jiawei and Tian, Yuandong "
                 "and Wang, Zhangyang}, journal={arXiv:2407.11239}, year={2024}}")
class WeLoreInitializer(Initializer):
    needs = "weights"
    methods = ("welore",)

    def check(self, adapter, config, sites):
        super().check(adapter, config, sites)
        if config.r is not None or config.rank_pattern:
            raise UsageError("initializer welore chooses every rank, and so do r and rank_pattern of the adapter",
                             remedy="remove them, or initializer: default for the same rank everywhere")

    def plan(self, sites, config):
        """The largest pair that pays, everywhere."""
        if self.config.rule == "half":
            return {s.name: math.ceil((1 - LEAST_PRUNED) * min(s.out_features, s.in_features)) - 1 for s in sites}
        return {s.name: lookup("adapter", "welore").cls.most(s) for s in sites}

    @torch.no_grad()
    def statistics(self, model, sites, config, batches):
        """{site: s' (a,) in fp64, on the CPU}."""
        return {s.name: normalized(torch.linalg.svdvals(self._weight(s).double())).cpu() for s in sites}

    def _weight(self, site) -> Tensor:
        try:
            return self.pristine(site).to(site.product.device)
        except UsageError:  # a stored weight without a file: as it computes
            return site.product.dense().detach()

    def ranks(self, sites, config, statistics):
        theta = threshold(statistics, self.config.reduction)
        kept = {name: int((s >= theta).sum()) for name, s in statistics.items()}
        chosen = {name: kept[name] if kept[name] <= most else 0 for name, most in self.plan(sites, config).items()}
        if not any(chosen.values()):
            raise UsageError(f"welore: at reduction {self.config.reduction} no weight becomes a pair that pays",
                             remedy="a larger reduction")
        return chosen

    def build(self, site, product, adapter, statistics, generator):
        """Nothing: the adapter has taken its start, at the rank given here."""
