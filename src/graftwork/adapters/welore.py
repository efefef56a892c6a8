"""WeLore: the matrices that compress well become trainable factor pairs, the others stay dense and frozen (arXiv 2407.11239).

    W = U diag(s) V^T (out, in) ~ B A,   B = U_k sqrt(S_k) (out, k),   A = sqrt(S_k) V_k^T (k, in)      B^T B = A A^T = S_k
    y = B A x + b,   B and A train, W x is never multiplied, b is the base's;   |W - B A|_F^2 = sum of the s_i^2 left out

Which matrices, and with which k, the initializer `welore` says; recipes use it unless they name another. Without it every site gets
a pair of rank r, by default the largest with fewer values than W, k (out + in) < out in: the uniform SVD that the method is
measured against. The output changes at the start, by what the truncation loses. The paper calls our B and A by the names A and B.

What is saved at such a site: gradients and optimizer state are those of k (out + in) values, nothing of them elsewhere; the two
products cost that share of one with W; and the artifact holds B and A alone, so it does not need the base's W. What is not:
the paper's smaller weights. The frozen W stays in the base while the pair trains, for other grafts, `disabled` and `detach`, so
weights in memory are out in + k (out + in) values instead of k (out + in); and a merged model that is saved is dense again, B A
written out at the size of W. Kept for the backward pass: x (T, in) and A x (T, k).

Differs from the official code: biases are kept, norms stay frozen, factors are fp32 and not bf16.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import nn

from ..modeling.arithmetic import linear
from ..registry import register
from ._replaced import Replaced
from ._weights import check_rank, principal, weight_of
from .base import AdapterConfig, SiteShape, pattern_value


class WeLore(AdapterConfig):
    """Options of `welore`."""

    r: int | None = Field(None, ge=1, description="one rank for all sites, without the initializer; default: the largest that pays")
    rank_pattern: dict[str, int] = {}


@register("adapter", "welore", config=WeLore, title="From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge from Low-Rank "
          "Gradients", paper="2407.11239", initializer="welore",
          bibtex="@article{jaiswal2024welore, title={From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge from Low-Rank "
                 "Gradients}, author={Jaiswal, Ajay and Yin, Lu and Zhang, Zhenyu and Liu, Shiwei and Zhao, Jiawei and Tian, Yuandong and "
                 "Wang, Zhangyang}, journal={arXiv:2407.11239}, year={2024}}",
          summary="trains the truncated SVD of the weights that compress well, the others stay dense and frozen")
class WeLoreAdapter(Replaced):
    starts_at_identity = False
    random_start = False

    def __init__(self, site, config, *, shared, generator):
        super().__init__(site, config, shared=shared, generator=generator)
        self.r = r = self._rank(site, config)
        check_rank("welore", site, r)
        self.B, self.A = nn.Parameter(torch.zeros(site.out_features, r)), nn.Parameter(torch.zeros(r, site.in_features))

    @staticmethod
    def most(site: SiteShape) -> int:
        """The largest k with k (out + in) < out in: a pair of more is no smaller than W."""
        return (site.out_features * site.in_features - 1) // (site.out_features + site.in_features)

    @classmethod
    def _rank(cls, site: SiteShape, config: WeLore) -> int:
        r = pattern_value(config.rank_pattern, site.name, config.r)
        return max(1, cls.most(site)) if r is None else r

    @classmethod
    def parameter_count(cls, site, config):
        return cls._rank(site, config) * (site.out_features + site.in_features)

    def start(self, product, pristine, generator):
        U, S, V = principal(weight_of(product, pristine), self.r, "exact", 0, None)
        root = S.sqrt()
        self.B.copy_(U * root)
        self.A.copy_(root[:, None] * V)

    def product(self, x):
        return linear(linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))

    def weight(self):
        return self.B.detach().float() @ self.A.detach().float()
