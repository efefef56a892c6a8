"""L4Q: LoRA inside the quantizer, whose step sizes and offsets train with it; the result is a plain low-bit model (arXiv 2402.04902).

    u  = (W + gamma B A - beta) / s            (out, in); W frozen, s and beta (out, groups) along the input, gamma = alpha / r
    Wq = s round(clamp(u, Qn, Qp)) + beta,     Qn = -2^(b-1), Qp = 2^(b-1) - 1;     y = Wq x + bias

Backward, with G = g^T x (out, in), formed and freed within the layer, and `inside` where Qn <= u <= Qp (G' = G there, 0 elsewhere):

    dA = gamma B^T G'     dB = gamma G' A^T     dx = g Wq
    ds = k sum_group G (inside ? round(u) - u : clamp(u))     dbeta = k sum_group G [not inside]     k = 1 / sqrt(group Qp), or 1

which is what autograd gives with a straight-through round (k = 1). Kept for it: x and the trained tensors; W is the base's own and u is
computed again. Start: s = max(|min W / Qn|, |max W / Qp|), beta = 0, A Kaiming uniform, B = 0: the base rounded to b bits.

Merging ends in storage int<b> with codes, s and zero = -Qn - beta / s in fp32, b + 64 / group bits a weight. The forward pass computes
Wq by that same formula, so the merged model computes with the very weights that were trained (`requantize`: metadata in
fp16, the rounding is reported). A slice of a fused projection merges into dense weights.

W stays in its own format while it trains (a dense W in 16 bits a weight: this is no small base), other grafts see it as it is, and rows of
a batch may use different grafts; but one row's output is Wq x alone, so the change is never summed with another.
Departures: the warm-up phase of the first version of the paper is left out; no code was published.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..modeling.arithmetic import dtype_for, product_dtype
from ..modeling.protocols import Product
from ..registry import lookup, make_config, register
from ._replaced import Replaced
from ._row_loop import one_by_one
from .base import AdapterConfig, pattern_value


class L4Q(AdapterConfig):
    """Options of `l4q`."""

    bits: int = Field(4, ge=2, le=8)
    group_size: int = Field(128, ge=-1, description="weights along the input that share a step and an offset; -1: a whole row")
    r: int = Field(8, ge=1)
    alpha: float | None = Field(None, description="scale numerator; default r, so gamma = 1")
    step_gradient: str = Field("lsq", pattern="^(lsq|plain)$", description="lsq: gradients of s and beta times 1 / sqrt(group Qp)")
    rank_pattern: dict[str, int] = {}


class Levels:
    """The quantizer: b bits, groups of g."""

    def __init__(self, bits: int, group: int, columns: int):
        self.bits, self.group, self.columns = bits, group, columns
        self.low, self.high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        self.groups = -(-columns // group)

    def split(self, W: Tensor) -> Tensor:
        """(out, in) -> (out, groups, group), the last filled with zeros."""
        return F.pad(W, (0, -self.columns % self.group)).view(W.shape[0], self.groups, self.group)

    def join(self, groups: Tensor) -> Tensor:
        return groups.flatten(1)[:, : self.columns]

    def units(self, W: Tensor, A: Tensor, B: Tensor, s: Tensor, beta: Tensor, gamma: float) -> Tensor:
        """u (out, groups, group), in fp32 or more."""
        full = torch.addmm(W.to(torch.promote_types(W.dtype, A.dtype)), B, A, alpha=gamma)
        return (self.split(full) - beta.unsqueeze(-1)) / s.unsqueeze(-1)

    def codes(self, u: Tensor) -> Tensor:
        """0 ... 2^b - 1, as floats."""
        return u.clamp(self.low, self.high).round() - self.low

    def zero(self, s: Tensor, beta: Tensor) -> Tensor:
        return -self.low - beta / s

    def values(self, u: Tensor, s: Tensor, beta: Tensor) -> Tensor:
        """Wq (out, in), as the storage decodes it."""
        return self.join((self.codes(u) - self.zero(s, beta).unsqueeze(-1)) * s.unsqueeze(-1))


def _product(x: Tensor, Wq: Tensor, dtype: torch.dtype) -> Tensor:
    """x Wq^T, with Wq rounded to the dtype of the base and multiplied as a storage would."""
    wide = dtype_for(x)
    return F.linear(x.to(wide), Wq.to(dtype).to(wide)).to(x.dtype)


class _Quantized(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, A, B, s, beta, gamma, k, levels, frozen):
        ctx.gamma, ctx.k, ctx.levels, ctx.frozen = gamma, k, levels, frozen
        ctx.save_for_backward(x, A, B, s, beta)
        ctx.save_for_forward(x, A, B, s, beta)
        W = frozen.dense().detach()
        return _product(x, levels.values(levels.units(W, A, B, s, beta, gamma), s, beta), W.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, A, B, s, beta = ctx.saved_tensors
        levels, W = ctx.levels, ctx.frozen.dense().detach()
        u = levels.units(W, A, B, s, beta, ctx.gamma)
        dtype = product_dtype(grad.dtype, grad.device)
        g, rows = grad.reshape(-1, grad.shape[-1]).to(dtype), x.reshape(-1, x.shape[-1]).to(dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (g @ levels.values(u, s, beta).to(W.dtype).to(dtype)).to(x.dtype).reshape(x.shape)
        G = levels.split((g.T @ rows).to(u.dtype))
        inside = (u >= levels.low) & (u <= levels.high)
        clipped = u.clamp(levels.low, levels.high)
        ds = ctx.k * (G * torch.where(inside, u.round() - u, clipped)).sum(-1)
        dbeta = ctx.k * G.masked_fill(inside, 0.0).sum(-1)
        G = levels.join(G.masked_fill(~inside, 0.0))
        return dx, ctx.gamma * (B.T @ G), ctx.gamma * (G @ A.T), ds, dbeta, None, None, None, None


    @staticmethod
    def jvp(ctx, tx, tA, tB, ts, tbeta, *_):
        """The same derivative, k = 1, forwards."""
        x, A, B, s, beta = ctx.saved_tensors
        levels, W = ctx.levels, ctx.frozen.dense().detach()
        u = levels.units(W, A, B, s, beta, ctx.gamma)
        inside = (u >= levels.low) & (u <= levels.high)
        slope = torch.where(inside, u.round() - u, u.clamp(levels.low, levels.high))
        moved = levels.split(ctx.gamma * (B @ tA + tB @ A)).masked_fill(~inside, 0.0)
        moved = moved + ts.unsqueeze(-1) * slope + tbeta.unsqueeze(-1).expand_as(slope).masked_fill(inside, 0.0)
        return _product(x, levels.join(moved), W.dtype) + _product(tx, levels.values(u, s, beta), W.dtype)


@register("adapter", "l4q", config=L4Q, paper="2402.04902",
          title="L4Q: Parameter Efficient Quantization-Aware Fine-Tuning on Large Language Models",
          summary="LoRA inside a learned quantizer: what is trained is a 2- to 8-bit model, and merging gives exactly it",
          bibtex="@inproceedings{jeon2025l4q, title={L4Q: Parameter Efficient Quantization-Aware Fine-Tuning on Large Language Models}, "
                 "author={Jeon, Hyesung and Kim, Yulhwa and Kim, Jae-Joon}, booktitle={ACL}, year={2025}}")
class L4QAdapter(Replaced):
    position = "inside"
    merge_exactness = "by_construction"
    starts_at_identity = False

    def __init__(self, site, config, *, shared, generator):
        super().__init__(site, config, shared=shared, generator=generator)
        self.r = pattern_value(config.rank_pattern, site.name, config.r)
        self.gamma = 1.0 if config.alpha is None else config.alpha / self.r
        self.levels = self._levels(site, config)
        self.k = 1.0 / math.sqrt(self.levels.group * self.levels.high) if config.step_gradient == "lsq" else 1.0
        bound = 1.0 / math.sqrt(site.in_features)
        self.lora_A = nn.Parameter(torch.empty(self.r, site.in_features).uniform_(-bound, bound, generator=generator))
        self.lora_B = nn.Parameter(torch.zeros(site.out_features, self.r))
        self.step = nn.Parameter(torch.ones(site.out_features, self.levels.groups))
        self.offset = nn.Parameter(torch.zeros(site.out_features, self.levels.groups))

    @staticmethod
    def _levels(site, config) -> Levels:
        group = site.in_features if config.group_size < 1 else min(config.group_size, site.in_features)
        return Levels(config.bits, group, site.in_features)

    @classmethod
    def parameter_count(cls, site, config):
        r = pattern_value(config.rank_pattern, site.name, config.r)
        return r * (site.in_features + site.out_features) + 2 * site.out_features * cls._levels(site, config).groups

    def start(self, product, pristine, generator):
        groups = self.levels.split(product.dense().detach().float())
        step = torch.maximum((groups.amin(-1) / self.levels.low).abs(), (groups.amax(-1) / self.levels.high).abs())
        self.step.copy_(torch.where(step == 0, torch.ones_like(step), step))

    # -- applied -----------------------------------------------------------------------------------------------------
    def product(self, x, base):
        trained = (self.lora_A, self.lora_B, self.step, self.offset)
        return _Quantized.apply(x, *trained, self.gamma, self.k, self.levels, base.frozen)

    def quantized_weight(self, W: Tensor) -> Tensor:
        """Wq (out, in), fp32, of W (out, in)."""
        u = self.levels.units(W.detach(), self.lora_A, self.lora_B, self.step, self.offset, self.gamma)
        return self.levels.values(u, self.step, self.offset)

    def delta_weight(self, base):
        W = base.weight()
        return self.quantized_weight(W) - W.float()

    def forward(self, x, base):
        y = self.product(x, base)
        return y if base.bias is None else y + base.bias.to(y.dtype)

    @classmethod
    def rows_combine(cls, bank, index, z, x, base):
        return one_by_one(bank.adapters, index, x, lambda adapter, rows: adapter.product(rows, base))

    # -- the result --------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def held_by(self, product: Product, weight, *, exact):
        W, bits = product.dense(), self.levels.bits
        name, more = (f"int{bits}", {}) if bits <= 4 else ("int_wide", {"bits": bits})
        config = make_config("storage", name, group_size=self.levels.group, zero_point="float",
                             scale_dtype="fp32" if exact else "fp16", **more)
        u = self.levels.units(W.detach(), self.lora_A, self.lora_B, self.step, self.offset, self.gamma)
        parameters = {"scale": self.step.detach(), "zero": self.levels.zero(self.step, self.offset).detach()}
        return lookup("storage", name).cls.from_codes(self.levels.join(self.levels.codes(u)).to(torch.uint8), parameters, config,
                                                      dtype=W.dtype)
