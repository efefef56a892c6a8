"""VeRA: one random pair for the whole model, two learned vectors a site (arXiv 2310.11454).

    y = W x + bias + b * (B (d * (A dropout(x)))),   W (out, in) frozen,   d (r,), b (out,) trained,   * element-wise
    A (r, in) and B (out, r) are the first columns and rows of a pair that all sites share, drawn from the graft's seed with the
    largest in and out among the sites: entries U(-1, 1) times sqrt(6 / in_max) in A and sqrt(6 / r) in B
    start: d = d_initial, b = 0, so y is unchanged

It is the LoRA with factors diag(b) B and diag(d) A, so it merges and converts exactly. Parameters r + out a site. The file
holds d and b only; the pair, r (in_max + out_max) fp32 values, is drawn once per graft and device and kept. A forward pass keeps
2 r values a token and no input, since A is frozen. Rows of adapters that were drawn from one seed share the two products.

Differs from the paper: nothing in the equations. The draw is PEFT's (Kaiming uniform, private CPU generator), so a graft of
seed k has the pair of PEFT's `projection_prng_key=k`. PEFT saves the pair by default; here its first ten values are saved instead, so
that another generator is noticed when an artifact is loaded. With `save_projection` the pair itself is kept and saved, and need not be
what a seed gives: so is a graft that was read from PEFT. The pair depends on the largest site: it is redrawn for another choice of
target modules.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, nn

from ..errors import ArtifactError, UsageError
from ..modeling.arithmetic import linear, product_dtype
from ..registry import register
from .base import Adapter, AdapterConfig, as_rows


class VeRA(AdapterConfig):
    """Options of `vera`; names as in PEFT."""

    r: int = Field(256, ge=1)
    d_initial: float = Field(0.1, description="start of d; zero would leave both vectors without a gradient", gt=0.0)
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    save_projection: bool = Field(False, description="save the random pair too, instead of drawing it again from the seed")


class SharedPair(nn.Module):
    """The pair A (r, widest in), B (widest out, r). From the seed: drawn on first use, once per device, no parameter, nothing is saved.
    Stored: frozen parameters, which start at the same values and may be replaced by a file's."""

    def __init__(self, seed: int, r: int, in_features: int, out_features: int, first_site: str, *, stored: bool = False):
        super().__init__()
        self.key, self.first_site, self.stored = (seed, r, in_features, out_features), first_site, stored
        self.kept: dict[torch.device, tuple[Tensor, Tensor]] = {}
        for name, drawn in zip("AB", self.draw() if stored else (None, None)):
            self.register_parameter(name, None if drawn is None else nn.Parameter(drawn, requires_grad=False))

    @property
    def identity(self) -> object:
        """Equal for pairs of equal values."""
        return id(self) if self.stored else self.key

    def draw(self) -> tuple[Tensor, Tensor]:
        seed, r, in_features, out_features = self.key
        generator = torch.Generator().manual_seed(seed)
        bound_A, bound_B = math.sqrt(6.0 / in_features), math.sqrt(6.0 / r)
        A = torch.empty(r, in_features).uniform_(-bound_A, bound_A, generator=generator)
        return A, torch.empty(out_features, r).uniform_(-bound_B, bound_B, generator=generator)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if self.stored:
            return self.A, self.B
        if device not in self.kept:
            with torch.inference_mode(False):  # an inference tensor could not be used by a later training step
                self.kept[device] = tuple(t.to(device) for t in self.draw())
        return self.kept[device]


@dataclass
class VectorBank:
    """K adapters on one pair: A (r, in), B (out, r) of the site, d (K, r), b (K, out)."""

    A: Tensor
    B: Tensor
    d: Tensor
    b: Tensor
    dropout: Tensor | None
    key: str

    @property
    def nbytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in (self.d, self.b))  # the pair is kept once for all sites


@register("adapter", "vera", config=VeRA, title="VeRA: Vector-based Random Matrix Adaptation", paper="2310.11454",
          summary="one seeded random pair for all sites, scaled by two learned vectors; r + out numbers a site",
          bibtex="@inproceedings{kopiczko2024vera, title={VeRA: Vector-based Random Matrix Adaptation}, author={Kopiczko, Dawid J. "
                 "and Blankevoort, Tijmen and Asano, Yuki M.}, booktitle={ICLR}, year={2024}}")
class VeRAAdapter(Adapter):
    seeded = True

    def __init__(self, site, config, *, shared, generator):
        super().__init__(site, config, shared=shared, generator=generator)
        if config.r > shared.key[1]:
            raise UsageError(f"vera: rank {config.r} at '{site.name}', but the pair that all sites share has r={shared.key[1]}",
                             remedy=f"set r to at least {config.r}; single sites may use fewer")
        self.r, self.dropout = config.r, config.dropout
        self.__dict__["pair"] = shared  # registered at the model root, not here
        self.vera_d = nn.Parameter(torch.full((self.r,), float(config.d_initial)))
        self.vera_b = nn.Parameter(torch.zeros(site.out_features))

    @classmethod
    def make_shared(cls, sites, config, seed):
        return SharedPair(seed, config.r, max(s.in_features for s in sites), max(s.out_features for s in sites), sites[0].name,
                          stored=config.save_projection)

    @classmethod
    def parameter_count(cls, site, config):
        return config.r + site.out_features

    def frozen_pair(self) -> tuple[Tensor, Tensor]:
        """(B (out, r), A (r, in)) of this site: views of the shared pair."""
        A, B = self.pair.on(self.vera_d.device)
        return B[: self.out_features, : self.r], A[: self.r, : self.in_features]

    def factors(self, base=None):
        B, A = self.frozen_pair()
        return self.vera_b.unsqueeze(1) * B, self.vera_d.unsqueeze(1) * A

    def delta(self, x, base):
        # d scales the r products, not A: nothing as large as A is made or keeps its gradient
        B, A = self.frozen_pair()
        hidden = linear(self.drop(x, base), A.to(x.dtype)) * self.vera_d.to(x.dtype)
        # b scales the rows of B: its gradient then needs the r products again, not the out results of every token
        return linear(hidden, (self.vera_b.unsqueeze(1) * B).to(x.dtype))

    # -- many rows ---------------------------------------------------------------------------------------------------
    @classmethod
    def stack(cls, adapters, dtype):
        """A VectorBank where all adapters use one pair, else the plain Bank of their factors."""
        if len({(a.pair.identity, a.r) for a in adapters}) > 1:
            return super().stack(adapters, dtype)
        B, A = adapters[0].frozen_pair()
        dtype = product_dtype(dtype, A.device)
        return VectorBank(A.to(dtype), B.to(dtype), torch.stack([a.vera_d for a in adapters]).to(dtype),
                          torch.stack([a.vera_b for a in adapters]).to(dtype), cls.bank_dropout(adapters), adapters[0].site_name)

    @classmethod
    def forward_rows(cls, bank, index, x, base):
        if not isinstance(bank, VectorBank):
            return super().forward_rows(bank, index, x, base)
        rows = x
        if bank.dropout is not None:
            rows = base.noise.dropout(x, bank.dropout.to(x.device)[index].reshape(-1, *[1] * (x.dim() - 1)), bank.key)
        flat = as_rows(rows).to(bank.A.dtype)
        hidden = linear(flat, bank.A) * bank.d.index_select(0, index).unsqueeze(1)
        change = linear(hidden, bank.B) * bank.b.index_select(0, index).unsqueeze(1)
        return change.to(x.dtype).reshape(*x.shape[:-1], change.shape[-1])

    # -- artifact ----------------------------------------------------------------------------------------------------
    def stored_extra(self):
        """Checksum of the generator: the first ten values of the shared A. A stored pair needs none."""
        if self.pair.stored or self.site_name != self.pair.first_site:
            return None
        return {"first_pair_values": self._first_values()}

    def check_extra(self, extra):
        if extra["first_pair_values"] != self._first_values():
            raise ArtifactError("the random pair drawn here is not the one this graft was trained with",
                                remedy="this version of torch draws other numbers from the seed: load the graft with the version "
                                       "named in its graft.json and convert it to lora there")

    def _first_values(self) -> list[float]:
        return self.pair.on(self.vera_d.device)[0].flatten()[:10].tolist()
