"""S2-LoRA: one pair of factors for all matrices of a shape, and a sparse vector of coefficients for each (arXiv 2309.11756).

    y_k = W_k x + b + B diag(c_k) A x,   A (r, in), B (out, r) shared by every site of the shape (out, in)
    c_k = lambda_k where |lambda_k| > threshold, else 0;   lambda_k (r,) private, with l1 * sum_k |lambda_k|_1 added to the loss

Start: A uniform as in LoRA, B ~ U(-1/sqrt(r), 1/sqrt(r)), lambda = 0, so y is unchanged. Parameters: r (in + out) for each
shape and r for each site. A site with zeros has a smaller rank: outside training, and in the LoRA it becomes, they are left out.

The pair collects the gradients of all its sites. A rule that divides by the gradient's size (Adam) does not notice; for others
`shared_lr_scale` sets the pair's rate relative to that of lambda. Clipping counts the pair once, since it is one tensor.

Differs from the paper: it has square matrices of one size; with grouped-query attention and feed-forward maps there is a pair
for each shape. A subgradient never leaves a coefficient at exactly zero, it only moves it around zero in steps of the learning
rate: hence the threshold. Its gradient passes through, so a coefficient can come back.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor, nn

from ..errors import UsageError
from ..modeling.arithmetic import linear
from ..modeling.protocols import has_values
from ..registry import register
from ._lowrank import frozen_plus_low_rank
from .base import Adapter, AdapterConfig


class S2LoRA(AdapterConfig):
    """Options of `s2_lora`."""

    r: int = Field(16, ge=1)
    l1: float = Field(1e-3, ge=0.0, description="weight of sum |lambda| in the loss")
    threshold: float = Field(1e-3, ge=0.0, description="coefficients up to this size count as zero")
    shared_lr_scale: float = Field(1.0, gt=0.0, description="learning rate of the shared pairs, relative to lambda's")


class SharedPairs(nn.Module):
    """A (r, in) and B (out, r) of every shape `out`x`in`, trained by all sites of the shape."""

    def __init__(self, shapes: list[tuple[int, int]], config: S2LoRA, seed: int):
        super().__init__()
        self.lr_scale = config.shared_lr_scale
        self.A, self.B = nn.ParameterDict(), nn.ParameterDict()
        for out, n in shapes:
            # a generator for each shape, so that the values do not depend on which other shapes there are
            generator = torch.Generator().manual_seed((seed * 1_000_003 + out * 65_537 + n) % 2**63)
            self.A[f"{out}x{n}"] = nn.Parameter(_uniform((config.r, n), n, generator))
            self.B[f"{out}x{n}"] = nn.Parameter(_uniform((out, config.r), config.r, generator))

    def parameter_groups(self):
        return [{"params": [p for p in self.parameters() if p.requires_grad], "lr_scale": self.lr_scale}]


def _uniform(shape: tuple[int, int], fan: int, generator: torch.Generator) -> Tensor:
    bound = 1.0 / math.sqrt(fan)
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


@register("adapter", "s2_lora", config=S2LoRA, title="Sparsely Shared LoRA on Whisper for Child Speech Recognition",
          paper="2309.11756", summary="all matrices of a shape share A and B; each has r sparse coefficients of its own",
          bibtex="@inproceedings{liu2024sparsely, title={Sparsely Shared LoRA on Whisper for Child Speech Recognition}, author={"
                 "Liu, Wei and Qin, Ying and Peng, Zhiyuan and Lee, Tan}, booktitle={ICASSP}, year={2024}}")
class S2LoRAAdapter(Adapter):
    def __init__(self, site, config, *, shared, generator):
        super().__init__(site, config, shared=shared, generator=generator)
        self.r, self.l1, self.threshold = config.r, config.l1, config.threshold
        self.__dict__["pool"] = shared  # registered at the model root, not here
        self.shape = f"{site.out_features}x{site.in_features}"
        if shared.A[self.shape].shape[0] != self.r:
            raise UsageError(f"s2_lora: rank {self.r} at '{site.name}', but the pair of its shape has {shared.A[self.shape].shape[0]}",
                             remedy="a shared pair has one rank; prune through l1 and threshold instead")
        self.lambda_ = nn.Parameter(torch.zeros(self.r))

    @classmethod
    def make_shared(cls, sites, config, seed):
        small = min(sites, key=lambda s: min(s.in_features, s.out_features))
        if config.r > (most := min(small.in_features, small.out_features)):
            raise UsageError(f"s2_lora: rank {config.r} at '{small.name}', a matrix of {small.out_features} x {small.in_features}",
                             remedy=f"choose r <= {most}, or leave this site out with exclude_modules")
        return SharedPairs(sorted({(s.out_features, s.in_features) for s in sites}), config, seed)

    @classmethod
    def parameter_count(cls, site, config):
        """Of the site alone; the pair of its shape has r (in + out) more, once."""
        return config.r

    def borrowed(self):
        return self.pool.A[self.shape], self.pool.B[self.shape]

    def coefficients(self) -> Tensor:
        """c (r,): lambda without the entries up to the threshold, and lambda's gradient."""
        if not self.threshold:
            return self.lambda_
        values = self.lambda_.detach()
        return self.lambda_ - torch.where(values.abs() > self.threshold, 0.0, values)

    def _pair(self) -> tuple[Tensor, Tensor]:
        A, B = self.borrowed()
        device = self.lambda_.device
        return B.to(device), self.coefficients().unsqueeze(1) * A.to(device)

    def factors(self, base=None):
        B, A = self._pair()
        if torch.is_grad_enabled() or not has_values(self.lambda_):
            return B, A
        kept = self.coefficients().nonzero().flatten()
        kept = kept if kept.numel() else kept.new_zeros(1)  # nothing learned: one row of zeros
        return B.index_select(1, kept), A.index_select(0, kept)

    def forward(self, x, base):
        if not base.frozen.frozen:
            return super().forward(x, base)
        B, A = self._pair()
        return frozen_plus_low_rank(x, A, B, None, base.frozen)

    def delta(self, x, base):
        B, A = self._pair()
        return linear(linear(x, A.to(x.dtype)), B.to(x.dtype))

    def auxiliary_loss(self):
        return self.l1 * self.lambda_.abs().sum() if self.l1 else None
