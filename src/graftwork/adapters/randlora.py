"""RandLoRA: a full-rank change from scaled random low-rank products (arXiv 2502.00987).

    y = W x + bias + s sum_j B_j L_j A G_j dropout(x),   j = 1..n,   s = alpha / (r sqrt(n))        where out >= in
    y = W x + bias + s sum_j G_j A^T L_j B_j^T dropout(x)                                           where in > out
    q = min(in, out), D = max(in, out), n = ceil(q / r) unless n_basis says otherwise
    B_j (D, r) and the one A (r, q) are random, of unit variance, seeded, and the same at every site of equal D, q;
    L_j = diag(l_j), G_j = diag(g_j), trained: l (n, r) zero at start, so y is unchanged, g (n, q) = 1 / max(n, q)

Parameters n (r + q), about q + q^2 / r: a smaller r has more of them. The change has rank min(q, n r) once the g_j differ.

Stored: l, g and the graft's seed. Column c = j r + k of [B_1 .. B_n] is used with row (l_jk A_k * g_j) of the other factor.
Columns are drawn 128 at a time, from bytes, in the forward and in the backward pass; the backward pass keeps x, l and g only and
computes dl, dg from the gradient of each block. So the peak does not grow with n, except for l and g. Work a token:
about n r (in + out) multiply-adds forward (a full-rank change costs what the frozen product costs, twice if it is
square), twice that backward, and D n r drawn bytes, about 1 ns each on a CPU core, in each pass, independent of the batch.
`cache_basis` keeps the drawn bytes instead, D n r for each shape of the model. Merge for inference.

Differs from the paper's code: it pairs the columns of B with the rows of A in another (fixed) order, which is the same in
distribution; here it is the formula. An entry is one byte v, read as (v + 1/2) / 128 sqrt(3): 256 levels of the uniform
distribution of unit variance, instead of a bf16 draw divided by its sample deviation. Sparse bases have v < m as -1 and
v >= 256 - m as +1, m the integer next to 256 p / 2, times 16 / sqrt(2 m): probabilities in steps of 1 / 256. One pair sliced to
all sites is replaced by one pair per shape. With `save_projection` it is not: the pair of the largest sizes is drawn, rounded to bf16,
kept and saved (in fp32), and each site cuts its own from it in PEFT's order; such a graft can be written for PEFT, and one that was
read from PEFT is of this form. alpha is 2 r by default, as in the paper's language models; PEFT's scale has no sqrt(n) and an
alpha of 20 r.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..errors import ArtifactError, UsageError
from ..modeling.arithmetic import linear, product_dtype
from ..registry import register
from ._row_loop import RowLoop
from ._weights import check_rank
from .base import AdapterConfig, SiteShape

#: columns of [B_1 .. B_n] drawn at once; part of the definition of the basis, since each block has a generator of its own
BLOCK = 128


class RandLoRA(AdapterConfig):
    """Options of `randlora`."""

    r: int = Field(32, ge=1, description="rank of one random product; more trained values when smaller")
    alpha: float | None = Field(None, description="scale numerator; default 2 r")
    n_basis: int | None = Field(None, ge=1, description="n, the random products; default ceil(min(in, out) / r), full rank")
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    distribution: Literal["uniform", "sparse", "very_sparse"] = Field(
        "uniform", description="entries: uniform; -1, 0, 1 with two thirds zeros; or with all but 1 / sqrt(min(in, out)) zeros")
    cache_basis: bool = Field(False, description="keep the drawn bytes: no redrawing, memory grows with n_basis")
    save_projection: bool = Field(False, description="one basis for all sites, kept and saved, as PEFT has it")

    @model_validator(mode="after")
    def _whole(self):
        if self.save_projection and (self.cache_basis or self.n_basis is not None):
            raise ValueError("save_projection keeps one basis of ceil(min(in, out) / r) products: leave n_basis and cache_basis out")
        return self


class BasisPool(nn.Module):
    """What all sites share: the seed, the first site's name, the kept bytes where the config asks for them; with save_projection the
    basis itself, as frozen parameters A (r, q) and B (n r, D), the columns of PEFT's flattened B as rows."""

    def __init__(self, seed: int, config: RandLoRA, sites: Sequence[SiteShape]):
        super().__init__()
        self.seed, self.cache, self.distribution, self.first_site = seed, config.cache_basis, config.distribution, sites[0].name
        self.kept: dict[tuple, Tensor] = {}
        self.r, self.stored = config.r, config.save_projection
        self.register_parameter("A", None), self.register_parameter("B", None)
        if self.stored:
            q, D = sorted((max(s.in_features for s in sites), max(s.out_features for s in sites)))
            for name, rows, size in (("A", self.r, q), ("B", -(-q // self.r) * self.r, D)):
                drawn = self.entries(self.draw(f"stored/{name}", rows, size), q, torch.float32)
                setattr(self, name, nn.Parameter(drawn.bfloat16().float(), requires_grad=False))  # PEFT keeps them in bf16

    def draw(self, key: str, rows: int, size: int) -> Tensor:
        """Seeded bytes, int8 (rows, size), on the CPU."""
        digest = hashlib.blake2b(f"{self.seed}/randlora/{key}/{rows}x{size}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") & (2**63 - 1))
        words = torch.empty(-(-rows * size // 8), dtype=torch.int64).random_(-2**63, None, generator=generator)
        return words.view(torch.int8)[: rows * size].view(rows, size)

    def values(self, key: str, rows: int, size: int, q: int, like: Tensor) -> Tensor:
        """Entries of unit variance, (rows, size), on the device and in the dtype of `like`."""
        place = (key, rows, size, like.device)
        codes = self.kept.get(place)
        if codes is None:
            with torch.inference_mode(False):
                codes = self.draw(key, rows, size).to(like.device)
            if self.cache:
                self.kept[place] = codes
        return self.entries(codes, q, like.dtype)

    def entries(self, codes: Tensor, q: int, dtype: torch.dtype) -> Tensor:
        """The entries of unit variance that bytes stand for."""
        if self.distribution == "uniform":
            return codes.to(dtype).add_(0.5).mul_(math.sqrt(3.0) / 128.0)
        zeros_in = 3.0 if self.distribution == "sparse" else math.sqrt(q)
        m = max(1, round(128.0 / zeros_in))
        signs = (codes >= 128 - m).to(dtype) - (codes < m - 128).to(dtype)
        return signs.mul_(16.0 / math.sqrt(2.0 * m))


@dataclass(frozen=True, eq=False)
class Basis:
    """The random matrices of one shape: A (r, q) and the n r columns of B, of length D."""

    pool: BasisPool
    r: int
    n: int
    q: int
    D: int

    def A(self, like: Tensor) -> Tensor:
        if self.pool.stored:
            return self.pool.A[:, : self.q].to(like.dtype)
        return self.pool.values(f"A/{self.r}", self.r, self.q, self.q, like)

    def blocks(self, like: Tensor):
        """(product j (c,), row of A k (c,), columns of B as rows (c, D)) of up to 128 columns at a time."""
        for number, start in enumerate(range(0, self.n * self.r, BLOCK)):
            column = torch.arange(start, min(start + BLOCK, self.n * self.r), device=like.device)
            j, k = column // self.r, column % self.r
            if self.pool.stored:
                columns = self.pool.B[k * self.n + j, : self.D].to(like.dtype)
            else:
                columns = self.pool.values(f"B/{self.q}/{number}", BLOCK, self.D, self.q, like)[: column.shape[0]]
            yield j, k, columns
            del columns  # the next block is drawn before the loop variable lets go of this one


class _Apply(torch.autograd.Function):
    """sum_j B_j L_j A G_j x (tall), or its transpose, for x (T, in) -> (T, out) in x's dtype; keeps x, l and g."""

    @staticmethod
    def forward(ctx, x: Tensor, l: Tensor, g: Tensor, basis: Basis, tall: bool) -> Tensor:  # noqa: E741
        ctx.save_for_backward(x, l, g)
        ctx.basis, ctx.tall = basis, tall
        A, y = basis.A(l), None
        for j, k, columns in basis.blocks(x):
            rows = (l.flatten()[j * basis.r + k].unsqueeze(1) * A[k] * g[j]).to(x.dtype)
            first, second = (rows, columns) if tall else (columns, rows)
            part = linear(x, first) @ second
            y = part.float() if y is None else y.add_(part)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (x, l, g), basis = ctx.saved_tensors, ctx.basis  # noqa: E741
        grad = grad.to(x.dtype)
        A, dl, dg = basis.A(l), torch.zeros_like(l).flatten(), torch.zeros_like(g)
        dx = torch.zeros(x.shape, dtype=torch.float32, device=x.device) if ctx.needs_input_grad[0] else None
        for j, k, columns in basis.blocks(x):
            scale, picked = l.flatten()[j * basis.r + k].unsqueeze(1), A[k]
            rows = (scale * picked * g[j]).to(x.dtype)
            first, second = (rows, columns) if ctx.tall else (columns, rows)
            if ctx.tall:
                inner = linear(grad, columns)  # gradient of (x rows^T)
                drows = inner.T @ x
            else:
                drows = linear(x, columns).T @ grad
                inner = linear(grad, rows) if dx is not None else None
            if dx is not None:
                dx.add_(inner @ first)
            drows = drows.to(l.dtype) * picked
            dl.index_add_(0, j * basis.r + k, (drows * g[j]).sum(1))
            dg.index_add_(0, j, drows * scale)
            del columns, first, second, rows, drows, inner
        return None if dx is None else dx.to(x.dtype), dl.view_as(l), dg, None, None


@register("adapter", "randlora", config=RandLoRA, title="RandLoRA: Full-rank parameter-efficient fine-tuning of large models",
          paper="2502.00987", summary="full-rank change: seeded random products, each scaled by two learned diagonals",
          bibtex="@inproceedings{albert2025randlora, title={RandLoRA: Full-rank parameter-efficient fine-tuning of large models}, "
                 "author={Albert, Paul and Zhang, Frederic Z. and Saratchandran, Hemanth and Rodriguez-Opazo, Cristian and "
                 "van den Hengel, Anton and Abbasnejad, Ehsan}, booktitle={ICLR}, year={2025}}")
class RandLoRAAdapter(RowLoop):
    seeded = True

    def __init__(self, site, config, *, shared, generator):
        super().__init__(site, config, shared=shared, generator=generator)
        q, D = sorted((site.in_features, site.out_features))
        check_rank("randlora", site, config.r, other="leave this site out with exclude_modules")
        if shared.stored and config.r != shared.r:
            raise UsageError(f"randlora: r={config.r} at '{site.name}', but the saved basis that all sites share has r={shared.r}",
                             remedy="give all sites one r, or leave save_projection out")
        self.r, self.dropout, self.tall = config.r, config.dropout, site.out_features >= site.in_features
        n = config.n_basis or math.ceil(q / config.r)
        self.scale = (2.0 * config.r if config.alpha is None else config.alpha) / (config.r * math.sqrt(n))
        self.basis = Basis(shared, self.r, n, q, D)  # its pool is registered at the model root, not here
        self.randlora_l = nn.Parameter(torch.zeros(n, self.r))
        self.randlora_g = nn.Parameter(torch.full((n, q), 1.0 / max(n, q)))

    @classmethod
    def make_shared(cls, sites, config, seed):
        return BasisPool(seed, config, sites)

    @classmethod
    def parameter_count(cls, site, config):
        q = min(site.in_features, site.out_features)
        return (config.n_basis or math.ceil(q / config.r)) * (config.r + q)

    def delta_weight(self, base):
        rows = torch.eye(self.in_features, device=self.randlora_l.device, dtype=self.randlora_l.dtype)
        return (_Apply.apply(rows, self.randlora_l * self.scale, self.randlora_g, self.basis, self.tall)).T

    def change(self, x, base):
        wide = x.reshape(-1, self.in_features).to(product_dtype(x.dtype, x.device))
        change = _Apply.apply(wide, self.randlora_l * self.scale, self.randlora_g, self.basis, self.tall)
        return change.to(x.dtype).view(*x.shape[:-1], self.out_features)

    # -- artifact ----------------------------------------------------------------------------------------------------
    def stored_extra(self):
        """Checksum of the generator: the first ten bytes of the first site's A. A saved basis needs none."""
        if self.basis.pool.stored or self.site_name != self.basis.pool.first_site:
            return None
        return {"first_basis_values": self._first_values()}

    def check_extra(self, extra):
        if extra["first_basis_values"] != self._first_values():
            raise ArtifactError("the random basis drawn here is not the one this graft was trained with",
                                remedy="this version of torch draws other numbers from the seed: merge the graft with the version "
                                       "named in its graft.json")

    def _first_values(self) -> list[int]:
        return self.basis.pool.draw(f"A/{self.r}", self.r, self.basis.q).flatten()[:10].tolist()
