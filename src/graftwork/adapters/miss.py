"""MiSS: one learned shard, shared by all shards of the weight (arXiv 2409.15371; earlier names DiSHA and, additive, Bone).

    y = W x + bias + D^T sum_j x_j,   D (r, out) trained, zero at start, so y is unchanged
    x is cut along `in` into pieces x_j of r values (the last one padded with zeros) and the pieces are summed

so the change of W is [D^T D^T ... D^T], cut at `in`: the LoRA with B = D^T and the fixed A = [I I ... I]. It merges and converts
exactly; its rank is at most r. Parameters r out. The forward pass keeps r values a token; there is no product with `in`.

mini_r: D is (r, mini_r) and repeated along `out`, r mini_r parameters. The affine form of the first version of the paper, which
depends on W, is the method `bat`.

Differs from PEFT: nothing in the values; the kind of an adapter is its own, so grafts of different kinds may share a site, and
a graft has a scale. Rows of adapters of equal r are summed once and multiplied with stacked D only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..errors import UsageError
from ..modeling.arithmetic import linear
from ..registry import register
from ._weights import check_rank
from .base import Adapter, AdapterConfig, as_rows, pattern_value
from .batched import Bank, change_of_rows


class MiSS(AdapterConfig):
    """Options of `miss`; names as in PEFT."""

    r: int = Field(64, ge=1, description="width of a shard along the input")
    mini_r: int | None = Field(None, ge=1, description="learned columns of D, repeated along the output; default all")
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    rank_pattern: dict[str, int] = {}


def shard_sum(x: Tensor, r: int) -> Tensor:
    """Sum of the pieces of r values: (..., in) -> (..., r)."""
    missing = -x.shape[-1] % r
    padded = F.pad(x, (0, missing)) if missing else x
    return padded.unflatten(-1, (-1, r)).sum(-2)


@dataclass
class ShardBank:
    """K adapters of one site and one r: their D's are the second factors of a bank that reads the r sums as they are."""

    shards: Bank
    dropout: Tensor | None
    key: str

    @property
    def nbytes(self) -> int:
        return self.shards.B.untyped_storage().nbytes()


@register("adapter", "miss", config=MiSS, title="MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure",
          paper="2409.15371", summary="one zero-started shard added to every shard of W; a sum and one product",
          aliases=("bone", "disha"),
          bibtex="@misc{kang2024miss, title={MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure}, "
                 "author={Kang, Jiale and Yin, Qingyu}, eprint={2409.15371}, archivePrefix={arXiv}, year={2024}}")
class MiSSAdapter(Adapter):
    random_start = False

    def __init__(self, site, config, *, shared, generator):
        super().__init__(site, config, shared=shared, generator=generator)
        self.r, self.dropout = pattern_value(config.rank_pattern, site.name, config.r), config.dropout
        columns = config.mini_r or site.out_features
        check_rank("miss", site, self.r, site.in_features)  # shards of r inputs
        if site.out_features % columns:
            raise UsageError(f"miss: mini_r={columns} does not divide the {site.out_features} outputs of '{site.name}'",
                             remedy="choose a divisor of all output sizes, or leave mini_r out")
        self.copies = site.out_features // columns
        self.miss_D = nn.Parameter(torch.zeros(self.r, columns))

    @classmethod
    def parameter_count(cls, site, config):
        return pattern_value(config.rank_pattern, site.name, config.r) * (config.mini_r or site.out_features)

    def shard(self) -> Tensor:
        """D (r, out)."""
        return self.miss_D if self.copies == 1 else self.miss_D.repeat(1, self.copies)

    def factors(self, base=None):
        eye = torch.eye(self.r, device=self.miss_D.device)
        return self.shard().T, eye.repeat(1, -(-self.in_features // self.r))[:, : self.in_features]

    def delta(self, x, base):
        change = linear(shard_sum(self.drop(x, base), self.r), self.miss_D.T.to(x.dtype))
        return change if self.copies == 1 else change.repeat(*[1] * (x.dim() - 1), self.copies)

    # -- many rows ---------------------------------------------------------------------------------------------------
    @classmethod
    def stack(cls, adapters, dtype):
        """A ShardBank where all have one r, else the plain Bank of their factors."""
        if len({a.r for a in adapters}) > 1:
            return super().stack(adapters, dtype)
        first = adapters[0]
        every = torch.arange(first.r, device=first.miss_D.device)
        shards = Bank.of([(a.shard().T, every) for a in adapters], (first.out_features, first.r), dtype)
        return ShardBank(shards, cls.bank_dropout(adapters), first.site_name)

    @classmethod
    def forward_rows(cls, bank, index, x, base):
        if not isinstance(bank, ShardBank):
            return super().forward_rows(bank, index, x, base)
        rows = x
        if bank.dropout is not None:
            rows = base.noise.dropout(x, bank.dropout.to(x.device)[index].reshape(-1, *[1] * (x.dim() - 1)), bank.key)
        sums = shard_sum(as_rows(rows), bank.shards.in_features).to(bank.shards.dtype)
        change = change_of_rows(sums, index, bank.shards).to(x.dtype)
        return change.reshape(*x.shape[:-1], change.shape[-1])
