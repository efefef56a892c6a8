"""MoS: low-rank factors assembled from shards that all sites of one kind share (arXiv 2410.00938).

    y = W x + bias + s B_i (A_i dropout(x)) at site i,   s = alpha / r,   W (out, in) frozen
    vector t of A_i (r, in) is the concatenation of l shards, rows of the pool PA (e L l, in / l); B_i^T (r, out) likewise from
    PB (e L l, out / l), where L is the number of sites of the kind (equal role, in and out), e the equivalent rank
    of the r l shards of a site, the last p l are its own (private); the others are drawn without repeats from the public ones,
    separately for A and for B, once, at the start
    start: A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0, so y is unchanged

Parameters e (in + out) a site, as a LoRA of rank e, while the change has rank up to r: r <= p + (e - p) L. The choice of shards depends
on nothing that is learned or read; a shard gets the sum of the gradients of its uses. p = e = r, l = 1 is LoRA, bit for bit.
In training the public rows of a kind are put together once a micro-batch for all its sites, so they are in memory twice.

The pools are kept in equal pieces, one at each site of the kind: (e - p) l public rows and p l private ones, so a site's file entry
and its count are its own; the public pool is the pieces in the order of the sites. The draws are saved (int32, 2 (r - p) l a site),
since without them the pools are worthless. Without gradients the factors are gathered once per value of the pools and kept,
r (in + out) fp32 values a site, as a LoRA would.

Differs from the paper's code: the rows of the pools are in another order, which is a renaming; the pool is drawn once instead of
again for each site. Equal in and out are asked of sites that share a pool, not the name only, so unequal layers may be mixed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from ..errors import UsageError
from ..registry import register
from .base import Adapter, AdapterConfig, Bank


class MoS(AdapterConfig):
    """Options of `mos`."""

    r: int = Field(8, ge=1, description="rank of the change")
    equivalent_rank: int = Field(2, ge=1, description="e: as many trained values as a LoRA of this rank")
    private_rank: int = Field(1, ge=0, description="p: vectors of each site that no other site uses")
    shards: int = Field(4, ge=1, description="l: pieces that a vector is assembled from; divides in and out")
    alpha: float | None = Field(None, description="scale numerator; default r, so s = 1")
    dropout: float = Field(0.0, ge=0.0, lt=1.0)


def kind_of(site) -> tuple:
    return getattr(site, "role", None), site.in_features, site.out_features


class Pools(nn.Module):
    """Which sites share, and where their pieces are. Has no parameters: each piece is registered at its site."""

    def __init__(self, sites: Sequence):
        super().__init__()
        self.sites: dict[tuple, list[str]] = {}
        for site in sites:
            self.sites.setdefault(kind_of(site), []).append(site.name)
        self.__dict__["members"] = {}  # site -> adapter; not as submodules, which would list each parameter twice

    def pool(self, kind: tuple, attribute: str, device: torch.device, kept: dict | None) -> Tensor:
        """The public rows of all sites of a kind, one tensor on a device. Put together once where there is a place to keep it: each use
        of a pool of its own would send a gradient to the piece of every site, uses times sites of them."""
        pieces, key = self.pieces(kind, attribute), (self, kind, attribute, device)
        values = None if kept is None else [(id(t), t._version) for t in pieces]
        if values is not None and key in kept and kept[key][0] == values:
            return kept[key][1]
        made = torch.cat([t if t.device == device else t.to(device) for t in pieces])
        if kept is not None:
            kept[key] = values, made
        return made

    def pieces(self, kind: tuple, attribute: str) -> list[Tensor]:
        """The public rows of all sites of a kind, in order."""
        absent = [name for name in self.sites[kind] if name not in self.members]
        if absent:
            raise UsageError(f"mos: '{absent[0]}' has no adapter, but other sites use its shards",
                             remedy="give no site rank 0; leave sites out with exclude_modules")
        return [self.members[name]._parameters[attribute] for name in self.sites[kind]]  # read at every step: no getattr


class GatheredBank:
    """The Bank of some adapters, gathered again when any shard of their pools has changed."""

    def __init__(self, adapters: Sequence[MoSAdapter], dtype: torch.dtype):
        self.adapters, self.dtype = tuple(adapters), dtype
        self._kept: tuple | None = None

    def bank(self) -> Bank:
        versions = [a.version() for a in self.adapters]
        if None in versions:
            return MoSAdapter.stack_factors(self.adapters, self.dtype)
        if self._kept is None or self._kept[0] != versions:
            self._kept = (versions, MoSAdapter.stack_factors(self.adapters, self.dtype))
        return self._kept[1]

    @property
    def nbytes(self) -> int:
        return self.bank().nbytes


@register("adapter", "mos", config=MoS, title="MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with Mixture of Shards",
          paper="2410.00938", summary="rank-r factors from pools of shards that sites of one kind share; parameters of rank e < r",
          bibtex="@inproceedings{wang2025mos, title={MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with Mixture of "
                 "Shards}, author={Wang, Sheng and Chen, Liheng and Chen, Pengan and Dong, Jingwei and Xue, Boyang and Jiang, Jiyue "
                 "and Kong, Lingpeng and Wu, Chuan}, booktitle={ICLR}, year={2025}}")
class MoSAdapter(Adapter):
    def __init__(self, site, config, *, shared, generator):
        super().__init__(site, config, shared=shared, generator=generator)
        self.r, self.dropout, self.kind = config.r, config.dropout, kind_of(site)
        self.scale = 1.0 if config.alpha is None else config.alpha / config.r
        e, p, l = config.equivalent_rank, config.private_rank, config.shards  # noqa: E741
        self._check(config, len(shared.sites[self.kind]))
        bound = 1.0 / math.sqrt(site.in_features)
        own_A = torch.empty(e * l, site.in_features // l).uniform_(-bound, bound, generator=generator)
        public = (e - p) * l
        for name, own in (("A", own_A), ("B", torch.zeros(e * l, site.out_features // l))):
            drawn = torch.randperm(public * len(shared.sites[self.kind]), generator=generator)[: (self.r - p) * l]
            self.register_parameter(f"public_{name}", nn.Parameter(own[:public].clone()) if public else None)
            self.register_parameter(f"private_{name}", nn.Parameter(own[public:].clone()) if p else None)
            self.register_parameter(f"index_{name}", nn.Parameter(drawn.to(torch.int32), requires_grad=False)
                                    if self.r > p else None)
        self.__dict__["pools"] = shared  # registered at the model root, not here
        shared.members[site.name] = self
        self._built: tuple | None = None

    def _check(self, config: MoS, sites: int) -> None:
        r, e, p, l = config.r, config.equivalent_rank, config.private_rank, config.shards  # noqa: E741
        if p > min(r, e):
            raise UsageError(f"mos: private_rank={p} is more than r={r} or equivalent_rank={e}",
                             remedy=f"choose private_rank <= {min(r, e)}")
        if self.in_features % l or self.out_features % l:
            raise UsageError(f"mos: shards={l} does not divide '{self.site_name}' ({self.out_features} x {self.in_features})",
                             remedy="choose a divisor of all sizes")
        most = p + (e - p) * sites
        if r > most:
            raise UsageError(f"mos: r={r} at '{self.site_name}', but {sites} sites of this kind share shards for rank {most}",
                             remedy=f"choose r <= {most}, a larger equivalent_rank, or a smaller private_rank")
        if r > min(self.in_features, self.out_features):
            raise UsageError(f"mos: r={r}, but '{self.site_name}' is {self.out_features} x {self.in_features}",
                             remedy=f"choose r <= {min(self.in_features, self.out_features)}")

    @classmethod
    def make_shared(cls, sites, config, seed):
        return Pools(sites)

    @classmethod
    def parameter_count(cls, site, config):
        return config.equivalent_rank * (site.in_features + site.out_features)

    def _inputs(self) -> list[Tensor]:
        """Every tensor that the factors depend on."""
        own = [t for t in map(self._parameters.get, ("index_A", "index_B", "private_A", "private_B")) if t is not None]
        if self._parameters["index_A"] is None:
            return own
        return own + self.pools.pieces(self.kind, "public_A") + self.pools.pieces(self.kind, "public_B")

    def version(self) -> tuple | None:
        """Changes whenever a value of the factors may have; None while gradients are wanted."""
        inputs = self._inputs()
        if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
            return None
        first = inputs[-1]  # a learned one
        return torch.is_inference_mode_enabled(), first.device, first.dtype, *((id(t), t._version) for t in inputs)

    def assembled(self, name: str, width: int, kept: dict | None = None) -> Tensor:
        """The r vectors of a factor, (r, width): drawn shards of the public pool, then the private ones. kept: of the micro-batch."""
        index, private = getattr(self, f"index_{name}"), getattr(self, f"private_{name}")
        parts = []
        if index is not None:
            parts.append(self.pools.pool(self.kind, f"public_{name}", index.device, kept).index_select(0, index))
        if private is not None:
            parts.append(private)
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(self.r, width)

    def factors(self, base=None):
        version = self.version()
        if version is None:
            self._built = None
            return self._build(None if base is None or base.noise is None else base.noise.current.kept)
        if self._built is None or self._built[0] != version:
            self._built = (version, self._build())
        return self._built[1]

    def _build(self, kept: dict | None = None) -> tuple[Tensor, Tensor]:
        B = self.assembled("B", self.out_features, kept).T
        return B if self.scale == 1.0 else B * self.scale, self.assembled("A", self.in_features, kept)

    # -- many rows ---------------------------------------------------------------------------------------------------
    @classmethod
    def stack(cls, adapters, dtype):
        """Kept between forward passes by the site, which sees this site's tensors only: the pools are watched here."""
        return GatheredBank(adapters, dtype)

    @classmethod
    def stack_factors(cls, adapters, dtype) -> Bank:
        return super().stack(adapters, dtype)

    @classmethod
    def forward_rows(cls, bank, index, x, base):
        return super().forward_rows(bank.bank(), index, x, base)
