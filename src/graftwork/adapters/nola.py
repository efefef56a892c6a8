"""NOLA: low-rank factors as learned combinations of random matrices (arXiv 2310.02556).

    y = W x + b + s B A dropout(x),   W (out, in) frozen,   s = alpha / r
    A = A_off + sum_i a_i A_i,  A_i (r, in), i = 1..k        B = sum_j b_j B_j,  B_j (out, r), j = 1..l
    trained: a (k,), b (l,), both zero at start, so y is unchanged; A_off ~ U(-1/sqrt(in), 1/sqrt(in)) is frozen and gives
    b its first gradient. Entries of A_i are U(-1, 1) / sqrt(k), those of B_j U(-1, 1) / sqrt(l).

Stored: a, b and the graft's seed, 4 (k + l) bytes a site whatever the rank and the width. A_i, B_j and A_off are drawn
again whenever they are needed, eight matrices at a time, in the forward pass and in the backward pass
(dL/da_i = <dL/dA, A_i>), so the peak does not depend on k. Cost of drawing: (k r in + l r out) bytes of the generator and as
many multiply-adds, in each of the two passes, independent of the batch: about 1 ns a value on one CPU core. Without
gradients A and B are built once per value of the coefficients and kept, r (in + out) fp32 values a site, as a LoRA would.
`cache_basis` keeps the drawn bytes instead, k r in + l r out a site; with `share_basis` all factors of equal shape use one
basis, and the two together keep one basis per shape for the whole model and draw it once.

Differs from the paper and its code: an entry is one byte v, read as (v + 1/2) / 128, so 256 levels symmetric about zero with the
variance of U(-1, 1) up to 2e-5; the generators are private, on the CPU (same values on every device), one per
(seed, site, factor, eight matrices), and the global random state is untouched. The first ten values of the first site's
basis are saved, so that another generator is noticed when an artifact is loaded.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..errors import ArtifactError
from ..modeling import repeated
from ..registry import register
from .base import Adapter, AdapterConfig

#: values of a kept basis that are converted at once: on a busy processor many small operations cost more than the work
AT_ONCE = 2**19
#: matrices drawn at once; part of the definition of the basis, since each group has a generator of its own
GROUP = 8


class NOLA(AdapterConfig):
    """Options of `nola`."""

    r: int = Field(8, ge=1)
    alpha: float | None = Field(None, description="scale numerator; default r, so s = 1")
    n_basis: int = Field(64, ge=1, description="k, the random matrices of A (and of B)")
    n_basis_b: int | None = Field(None, ge=1, description="l, the random matrices of B; default n_basis")
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    share_basis: bool = Field(False, description="one basis for all factors of equal shape")
    cache_basis: bool = Field(False, description="keep the drawn bytes: no redrawing, memory grows with n_basis")


def _seed(*parts: object) -> int:
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & (2**63 - 1)


class BasisPool(nn.Module):
    """What all sites share: the seed, the first site's name, and the kept bytes where the config asks for it."""

    def __init__(self, seed: int, config: NOLA, first_site: str):
        super().__init__()
        self.seed, self.share, self.cache, self.first_site = seed, config.share_basis, config.cache_basis, first_site
        self.kept: dict[tuple, Tensor] = {}


@dataclass(frozen=True, eq=False)
class Basis:
    """The random matrices of one factor: `count` matrices of `size` values, named by `key`."""

    pool: BasisPool
    key: str
    size: int
    count: int

    def draw(self, group: int) -> Tensor:
        """Matrices 8 group .. 8 group + 7, int8 (8, size), on the CPU."""
        generator = torch.Generator().manual_seed(_seed(self.pool.seed, "nola", self.key, group))
        words = torch.empty(GROUP * self.size // 8, dtype=torch.int64).random_(-2**63, None, generator=generator)
        return words.view(torch.int8).view(GROUP, self.size)

    def groups(self, device: torch.device) -> Iterator[tuple[int, Tensor]]:
        """(first index, int8 (n, size)) over all matrices: eight at a time, kept ones in fewer, larger pieces."""
        if self.pool.cache:
            place = (self.key, self.count, device)
            if place not in self.pool.kept:
                self.pool.kept[place] = kept = torch.empty(self.count, self.size, dtype=torch.int8, device=device)
                for start in range(0, self.count, GROUP):
                    kept[start: start + GROUP] = self.draw(start // GROUP)[: self.count - start]
            whole, step = self.pool.kept[place], max(GROUP, AT_ONCE // self.size)
            for start in range(0, self.count, step):
                yield start, whole[start: start + step]
        else:
            for group in repeated.each(range(math.ceil(self.count / GROUP))):
                yield group * GROUP, self.draw(group)[: self.count - group * GROUP].to(device)

    def combine(self, coefficients: Tensor) -> Tensor:
        """sum_i c_i V_i / sqrt(count): (count,) -> (size,)."""
        total = coefficients.new_zeros(1, self.size)
        for start, codes in self.groups(coefficients.device):
            # a row times a matrix: as a transposed matrix times a vector this is up to 1000 times slower
            total.addmm_(coefficients[None, start: start + codes.shape[0]], codes.to(coefficients.dtype))
            del codes  # the next group is drawn before the loop variable lets go of this one
        return total[0].add_(0.5 * coefficients.sum()).mul_(1.0 / (128.0 * math.sqrt(self.count)))

    def project(self, gradient: Tensor) -> Tensor:
        """<G, V_i> / sqrt(count) for every i: (size,) -> (count,)."""
        products = gradient.new_empty(self.count)
        for start, codes in self.groups(gradient.device):
            torch.mv(codes.to(gradient.dtype), gradient, out=products[start: start + codes.shape[0]])
            del codes
        return products.add_(0.5 * gradient.sum()).mul_(1.0 / (128.0 * math.sqrt(self.count)))


class _Combine(torch.autograd.Function):
    """Basis.combine with Basis.project as its adjoint; saves nothing, the operator is linear."""

    @staticmethod
    def forward(ctx, coefficients: Tensor, basis: Basis) -> Tensor:
        ctx.basis = basis
        return basis.combine(coefficients)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        return ctx.basis.project(gradient.contiguous()), None


@register("adapter", "nola", config=NOLA, title="NOLA: Compressing LoRA using Linear Combination of Random Basis",
          paper="2310.02556", summary="LoRA whose factors are combinations of seeded random matrices; k + l numbers a site",
          bibtex="@inproceedings{koohpayegani2024nola, title={NOLA: Compressing LoRA using Linear Combination of Random Basis}, "
                 "author={Koohpayegani, Soroush Abbasi and Navaneet, KL and Nooralinejad, Parsa and Kolouri, Soheil and "
                 "Pirsiavash, Hamed}, booktitle={ICLR}, year={2024}}")
class NOLAAdapter(Adapter):
    seeded = True

    def __init__(self, site, config, *, shared, generator):
        super().__init__(site, config, shared=shared, generator=generator)
        self.r, self.dropout = config.r, config.dropout
        self.scale = 1.0 if config.alpha is None else config.alpha / config.r
        k, l = config.n_basis, config.n_basis_b or config.n_basis
        self.__dict__["pool"] = shared  # registered at the model root, not here
        where = "shared" if shared.share else site.name
        self.basis_A = Basis(shared, f"{where}/A/{self.r}x{site.in_features}", self.r * site.in_features, k)
        self.basis_B = Basis(shared, f"{where}/B/{site.out_features}x{self.r}", site.out_features * self.r, l)
        self.coef_A, self.coef_B = nn.Parameter(torch.zeros(k)), nn.Parameter(torch.zeros(l))
        self._built: tuple | None = None

    @classmethod
    def make_shared(cls, sites, config, seed):
        return BasisPool(seed, config, sites[0].name)

    @classmethod
    def parameter_count(cls, site, config):
        return config.n_basis + (config.n_basis_b or config.n_basis)

    def offset(self) -> Tensor:
        """A_off (r, in), drawn from the seed."""
        generator = torch.Generator().manual_seed(_seed(self.pool.seed, "nola", self.site_name, "offset"))
        bound = 1.0 / math.sqrt(self.in_features)
        drawn = torch.empty(self.r, self.in_features).uniform_(-bound, bound, generator=generator)
        return drawn.to(self.coef_A.device, self.coef_A.dtype)

    def factors(self, base=None):
        """Built anew while gradients are wanted; otherwise once per value of the coefficients."""
        coefficients = (self.coef_A, self.coef_B)
        if torch.is_grad_enabled() and any(c.requires_grad for c in coefficients):
            self._built = None
            return self._build()
        version = (torch.is_inference_mode_enabled(), *((id(c), c._version, c.device, c.dtype) for c in coefficients))
        if self._built is None or self._built[0] != version:
            self._built = (version, self._build())
        return self._built[1]

    def _build(self) -> tuple[Tensor, Tensor]:
        A = _Combine.apply(self.coef_A, self.basis_A).view(self.r, self.in_features) + self.offset()
        B = _Combine.apply(self.coef_B, self.basis_B).view(self.out_features, self.r)
        return B if self.scale == 1.0 else B * self.scale, A

    # -- artifact ---------------------------------------------------------------------------------------------------
    def stored_extra(self):
        """Checksum of the generator: the first ten bytes of the first site's basis."""
        return {"first_basis_values": self._first_values()} if self.site_name == self.pool.first_site else None

    def check_extra(self, extra):
        if extra["first_basis_values"] != self._first_values():
            raise ArtifactError("the random basis drawn here is not the one this graft was trained with",
                                remedy="this version of torch draws other numbers from the seed: load the graft with the version "
                                       "named in its graft.json and convert it to lora there")

    def _first_values(self) -> list[int]:
        return self.basis_A.draw(0).flatten()[:10].tolist()
