"""PaCA: train a few input columns of the frozen weight (arXiv 2503.01905).

    y = W x + b + s S x[I],   W (out, in) frozen, I (r,) distinct random input columns, S (out, r) trained, zero at start
    s = alpha / r; the effective weight has W[:, I] + s S in columns I and W elsewhere

The backward pass needs x[I] only, T r values instead of the T in of a LoRA, because a frozen product does not keep its
input. This saving exists where nothing else keeps x: maps that share an input (q, k, v) should all carry PaCA or
nothing. It is a LoRA whose A is the frozen selection of I, so it merges and converts exactly. Parameters r out.

Differs from the paper: the change S is kept, not the columns P = W[:, I] / s themselves. Both give the same trajectory
(S starts at zero, so s S = s P - W[:, I]); S stays fp32 beside a low-bit base, is no part of the weight, and can be
chosen per row. The code's copy of the columns in W, which goes stale between refreshes, does not exist here. I is
stored (int32, r a site), since a selection may choose other columns than the seed's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from ..registry import register
from ._weights import check_rank
from .base import Adapter, AdapterConfig, pattern_value
from .batched import Bank


class PaCA(AdapterConfig):
    """Options of `paca`."""

    r: int = Field(16, ge=1, description="trained columns")
    alpha: float | None = Field(None, description="scale numerator; default r, so s = 1")
    rank_pattern: dict[str, int] = {}


@register("adapter", "paca", config=PaCA, title="PaCA: Partial Connection Adaptation for Efficient Fine-Tuning",
          paper="2503.01905", summary="trains r input columns of each weight; keeps r instead of all activations a token",
          bibtex="@inproceedings{woo2025paca, title={PaCA: Partial Connection Adaptation for Efficient Fine-Tuning}, author={"
                 "Woo, Sunghyeon and Namkung, Sol and Lee, Sunwoo and Jeong, Inho and Kim, Beomseok and Jeon, Dongsuk}, "
                 "booktitle={ICLR}, year={2025}}")
class PaCAAdapter(Adapter):
    def __init__(self, site, config, *, shared, generator):
        super().__init__(site, config, shared=shared, generator=generator)
        self.r = pattern_value(config.rank_pattern, site.name, config.r)
        check_rank("paca", site, self.r, site.in_features)  # columns
        self.scale = 1.0 if config.alpha is None else config.alpha / self.r
        chosen = torch.randperm(site.in_features, generator=generator)[: self.r].sort().values
        self.columns = nn.Parameter(chosen.to(torch.int32), requires_grad=False)
        self.S = nn.Parameter(torch.zeros(site.out_features, self.r))

    @classmethod
    def parameter_count(cls, site, config):
        return pattern_value(config.rank_pattern, site.name, config.r) * site.out_features

    def factors(self, base=None):
        selector = torch.zeros(self.r, self.in_features, device=self.S.device)
        return self.S * self.scale, selector.scatter(1, self.columns.long().unsqueeze(1), 1.0)

    def delta_weight(self, base):
        change = torch.zeros(self.out_features, self.in_features, device=self.S.device)
        return change.index_copy(1, self.columns.long(), self.S.float() * self.scale)

    def delta(self, x, base):
        picked = x.index_select(-1, self.columns)
        return F.linear(picked if self.scale == 1.0 else picked * self.scale, self.S.to(x.dtype))

    # -- many rows ---------------------------------------------------------------------------------------------------
    @classmethod
    def stack(cls, adapters, dtype):
        """A Bank whose first factors are the columns themselves."""
        first = adapters[0]
        return Bank.of([(a.S * a.scale, a.columns) for a in adapters], (first.out_features, first.in_features), dtype)
