"""eDKM: weights clustered by a differentiable k-means while they train; the result is a code book model (arXiv 2309.00964).

    w  = bf16(W + gamma B A)    (out, in); W frozen, gamma = alpha / r. With r: 0 a full change (out, in) trains in place of B A
    C  = c0 (K,), K = 2^b, then `iterations` times:  a = softmax(-(w - C)^2 / (tau mean w^2))  (out in, K),   C <- a^T w / sum a
    W' = a C  while training;  in evaluation the nearest of C to each w (its gradient is that of a C);   y = W' x + bias

c0 is the k-means book of W at the start, kept as it is. Gradients flow to w through a and through C, and straight through bf16.

Memory. A plain graph keeps several tensors of K numbers a weight and an iteration. There are at most 65,536 bf16 numbers, so all of it is
computed on those, each with how often it occurs (m_j): with f = a C as a function of the number v_j and of C,

    dL/dw_i = g_i df/dv_j + (dL/dC dC/dv_j) / m_j      for w_i = v_j

exactly what the plain graph gives. Kept for the backward pass are x and the trained tensors; w is formed again from the base's own W, a
site at a time, with an index of 8 bytes a weight; a table has 65,536 K numbers (one row a weight where a matrix has fewer).
This is the paper's uniquification, by arithmetic in place of hooks on saved tensors (modeling/saved_tensors.py has those for
any operation); its sharding over data-parallel processes has nothing left to share.

Merging ends in storage codebook with codes and C in fp32, b + 32 K / (out in) bits a weight (`requantize`: fp16), which computes with
the very weights of evaluation. How far the soft weights are from the hard ones is saved with the graft (`soft_difference`, relative).

The trained full weight of the paper is r: 0; a LoRA inside the clustering is the default, as everything here is a graft beside a frozen W.
Departures: c0 stays, where the public code goes on from the last step's C, so that a forward is a function of what is saved (with
recomputation, resume and mixed batches the same); a fixed number of iterations, since stopping by a threshold would wait for values; tau is
relative (the public code's 1e-4 at a standard deviation of 0.03 is 0.1); attention is not cut from below, codes that nothing is near stay.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..modeling.arithmetic import dtype_for, product_dtype
from ..modeling.protocols import has_values
from ..registry import lookup, make_config, register
from ._replaced import Replaced
from .base import AdapterConfig, pattern_value

#: numbers of 16 bits
NUMBERS = 1 << 16


class EDKM(AdapterConfig):
    """Options of `edkm`."""

    bits: int = Field(3, ge=2, le=6)
    r: int = Field(8, ge=0, description="rank of the change inside the clustering; 0: the full weight trains")
    alpha: float | None = Field(None, description="scale numerator; default r, so gamma = 1")
    tau: float = Field(0.1, gt=0, description="temperature, of the mean square of the weights")
    iterations: int = Field(3, ge=1, description="steps of k-means in a forward pass")
    rank_pattern: dict[str, int] = {}


class Rows:
    """The distinct numbers of w: `values` (R,) in w's own dtype, how often each occurs, `mass` (R,), and `spread`, from (R,) to w's
    shape."""

    def __init__(self, w: Tensor):
        rounded, self.shape, self.index = w.detach().to(torch.bfloat16), w.shape, None
        if w.numel() < NUMBERS:
            self.values = rounded.to(w.dtype).flatten()
            self.mass = torch.ones_like(self.values)
            return
        self.index = rounded.flatten().view(torch.int16).long() + NUMBERS // 2
        self.mass = torch.zeros(NUMBERS, dtype=w.dtype, device=w.device).index_add_(0, self.index, w.new_ones(1).expand(w.numel()))
        every = torch.arange(-NUMBERS // 2, NUMBERS // 2, device=w.device).to(torch.int16).view(torch.bfloat16).to(w.dtype)
        self.values = torch.where(self.mass > 0, every, torch.zeros_like(every))  # NaN and inf only where w has them

    def spread(self, rows: Tensor) -> Tensor:
        return (rows if self.index is None else rows.index_select(0, self.index)).view(self.shape)

    def gathered(self, each: Tensor) -> Tensor:
        """Sums over equal numbers: w's shape to (R,)."""
        return each.flatten() if self.index is None else torch.zeros_like(self.mass).index_add_(0, self.index, each.flatten())


def clusters(own: Tensor, values: Tensor, mass: Tensor, C: Tensor, tau: float, iterations: int) -> tuple[Tensor, Tensor]:
    """(soft numbers (R,), C). own: the values again, as what the soft numbers are of; `values` are what the means are of."""
    scale = tau * ((mass * values.detach() ** 2).sum() / mass.sum()).clamp(min=1e-30)

    def attention(of: Tensor) -> Tensor:
        return (-(of[:, None] - C) ** 2 / scale).softmax(-1)

    for _ in range(iterations):
        a = attention(values)
        last, total = attention(own), mass @ a
        C = torch.where(total > 1e-6, (mass * values) @ a / total.clamp(min=1e-6), C)
    return last @ C, C


def nearest(values: Tensor, C: Tensor) -> Tensor:
    """Index of the nearest of C (R,) int64, the lower number where two are as near."""
    ordered, order = C.sort()
    return order[torch.bucketize(values, (ordered[1:] + ordered[:-1]) / 2)]


class _Clustered(torch.autograd.Function):
    """w (out, in) -> W', soft or hard; the derivative is that of the soft one."""

    @staticmethod
    def forward(ctx, w, C, tau, iterations, hard):
        ctx.options = tau, iterations
        ctx.save_for_backward(w, C)
        ctx.save_for_forward(w, C)
        rows = Rows(w)
        soft, C = clusters(rows.values, rows.values, rows.mass, C, tau, iterations)
        return rows.spread(C[nearest(rows.values, C)] if hard else soft)

    @staticmethod
    def _graph(ctx):
        """Rows, df/dv (R,), and the soft numbers as a graph of the values that the means are of."""
        w, C = ctx.saved_tensors
        rows = Rows(w)
        with torch.enable_grad():
            own, values = (rows.values.clone().requires_grad_() for _ in range(2))
            soft, _ = clusters(own, values, rows.mass, C, *ctx.options)
            slope, = torch.autograd.grad(soft.sum(), own, retain_graph=True)
        return rows, slope, soft, values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        rows, slope, soft, values = _Clustered._graph(ctx)
        means, = torch.autograd.grad(soft, values, rows.gathered(grad))
        return grad * rows.spread(slope) + rows.spread(means / rows.mass.clamp(min=1)), None, None, None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        rows, slope, soft, values = _Clustered._graph(ctx)
        with torch.enable_grad():
            probe = torch.zeros_like(soft, requires_grad=True)
            back, = torch.autograd.grad(soft, values, probe, create_graph=True)
            means, = torch.autograd.grad(back, probe, rows.gathered(tangent) / rows.mass.clamp(min=1))
        return tangent * rows.spread(slope) + rows.spread(means)


class _Product(torch.autograd.Function):
    """W' x, W' rounded to the dtype of the base; W' is formed again in the backward pass."""

    @staticmethod
    def forward(ctx, x, adapter, hard, *trained):
        ctx.adapter, ctx.hard = adapter, hard
        ctx.save_for_backward(x, *trained)
        W = adapter.weight(hard=hard, trained=trained).to(adapter.map.dtype)
        wide = dtype_for(x)
        return F.linear(x.to(wide), W.to(wide)).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, *trained = ctx.saved_tensors
        dtype = product_dtype(grad.dtype, grad.device)
        g, rows = grad.reshape(-1, grad.shape[-1]).to(dtype), x.reshape(-1, x.shape[-1]).to(dtype)
        with torch.enable_grad():
            own = [t.detach().requires_grad_() for t in trained]
            W = ctx.adapter.weight(hard=ctx.hard, trained=own)
        found = torch.autograd.grad(W, own, (g.T @ rows).to(W.dtype))
        dx = (g @ W.detach().to(ctx.adapter.map.dtype).to(dtype)).to(x.dtype).reshape(x.shape) if ctx.needs_input_grad[0] else None
        return dx, None, None, *found


@register("adapter", "edkm", config=EDKM, paper="2309.00964",
          title="eDKM: An Efficient and Accurate Train-time Weight Clustering for Large Language Models",
          summary="LoRA inside a differentiable k-means of the weights: what is trained is a code book model, and merging gives exactly it",
          bibtex="@article{cho2024edkm, title={{eDKM}: An Efficient and Accurate Train-Time Weight Clustering for Large Language Models}, "
                 "author={Cho, Minsik and Vahid, Keivan A. and Fu, Qichen and Adya, Saurabh and Del Mundo, Carlo C. and Rastegari, "
                 "Mohammad and Naik, Devang and Zatloukal, Peter}, journal={IEEE Computer Architecture Letters}, year={2024}}")
class EDKMAdapter(Replaced):
    position = "inside"
    merge_exactness = "by_construction"
    starts_at_identity = False

    def __init__(self, site, config, *, shared, generator):
        super().__init__(site, config, shared=shared, generator=generator)
        self.map, self.bits, self.tau, self.iterations = site.product, config.bits, config.tau, config.iterations
        self.r = pattern_value(config.rank_pattern, site.name, config.r)
        self.gamma = 1.0 if config.alpha is None or not self.r else config.alpha / self.r
        if self.r:
            bound = 1.0 / math.sqrt(site.in_features)
            self.lora_A = nn.Parameter(torch.empty(self.r, site.in_features).uniform_(-bound, bound, generator=generator))
            self.lora_B = nn.Parameter(torch.zeros(site.out_features, self.r))
        else:
            self.weight_change = nn.Parameter(torch.zeros(site.out_features, site.in_features))
        self.book = nn.Parameter(torch.zeros(2**config.bits), requires_grad=False)

    @classmethod
    def parameter_count(cls, site, config):
        r = pattern_value(config.rank_pattern, site.name, config.r)
        return r * (site.in_features + site.out_features) if r else site.in_features * site.out_features

    def start(self, product, pristine, generator):
        if not has_values(self.book):
            return  # a plan: the size of the book does not depend on the weight
        config = make_config("storage", "codebook", bits=self.bits, book_dtype="fp32")
        self.book.copy_(lookup("storage", "codebook").cls.from_weight(product.dense().detach(), config).leaves()["book"][0])

    # -- applied -----------------------------------------------------------------------------------------------------
    def trained(self) -> tuple[Tensor, ...]:
        return (self.lora_A, self.lora_B) if self.r else (self.weight_change,)

    def full(self, trained: tuple[Tensor, ...] | None = None) -> Tensor:
        """w (out, in) before it is rounded, in fp32 or more."""
        trained, W = trained or self.trained(), self.map.dense().detach()
        W = W.to(torch.promote_types(W.dtype, trained[0].dtype))
        return torch.addmm(W, trained[1], trained[0], alpha=self.gamma) if self.r else W + trained[0]

    def weight(self, *, hard: bool = True, trained: tuple[Tensor, ...] | None = None) -> Tensor:
        w = self.full(trained)
        return _Clustered.apply(w, self.book.to(w.dtype), self.tau, self.iterations, hard)

    def product(self, x):
        if torch.is_grad_enabled():
            return _Product.apply(x, self, not self.training, *self.trained())
        wide = dtype_for(x)  # plain operations: forward-mode tangents pass
        return F.linear(x.to(wide), self.weight(hard=not self.training).to(self.map.dtype).to(wide)).to(x.dtype)

    # -- the result --------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def held_by(self, product, weight, *, exact):
        rows = Rows(self.full())
        C = clusters(rows.values, rows.values, rows.mass, self.book.to(rows.values.dtype), self.tau, self.iterations)[1]
        config = make_config("storage", "codebook", bits=self.bits, book_dtype="fp32" if exact else "fp16")
        codes = rows.spread(nearest(rows.values, C)).to(torch.uint8)
        return lookup("storage", "codebook").cls.from_codes(codes, C, config, dtype=product.dtype)

    @torch.no_grad()
    def soft_difference(self) -> float:
        """|| soft - hard || / || hard || of W'."""
        hard = self.weight()
        return float((self.weight(hard=False) - hard).norm() / hard.norm().clamp(min=1e-30))

    def stored_extra(self):
        return {"soft_difference": self.soft_difference()} if has_values(self.book) else None
