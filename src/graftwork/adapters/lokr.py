"""LoKr: a change that is a Kronecker product (LyCORIS, arXiv 2309.14859).

    y = W x + b + s (W1 (x) W2) x,   W (out, in) frozen, out = l k, in = m n, W1 (l, m), W2 (k, n), s = alpha / r
    W2 = W2a W2b with W2a (k, r), W2b (r, n) where r < max(k, n) / 2, else whole; with decompose_both W1 = W1a W1b likewise
    start: W1 (or W1a) = 0, so y is unchanged; everything else Kaiming uniform (a = sqrt 5)

l and m are divisors of out and in, near their square roots, or near decompose_factor. The change is never built: with x as a matrix
X (m, n) it is W1 X W2^T, m n k + l m k products a token. As a LoRA it is exact, of rank (rank of W1) (rank of W2).
Parameters l m + r (k + n), or l m + k n.

Differs from LyCORIS: the scale is alpha / r also where both matrices are whole (so does peft; LyCORIS then takes one). No rank or
module dropout, no Tucker form (convolutions only).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, nn

from ..errors import UsageError
from ..modeling.arithmetic import linear, product_dtype
from ..registry import register
from .base import Adapter, AdapterConfig, as_rows, pattern_value


class LoKr(AdapterConfig):
    """Options of `lokr`; names as in PEFT."""

    r: int = Field(8, ge=1)
    alpha: float | None = Field(None, description="scale numerator; default r, so s = 1")
    decompose_both: bool = Field(False, description="rank r for W1 as well")
    decompose_factor: int = Field(-1, ge=-1, description="wanted size of W1; -1: near the square root")
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}


def divided(size: int, factor: int) -> tuple[int, int]:
    """size = small * large: small is `factor` where that divides, else the largest divisor up to sqrt(size) (and to factor)."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    bound = min(math.isqrt(size), factor if factor > 0 else size)
    small = next(d for d in range(bound, 0, -1) if size % d == 0)
    return small, size // small


def shapes(site, config) -> dict[str, tuple[int, int]]:
    """{name of a parameter: shape} at a site."""
    r = pattern_value(config.rank_pattern, site.name, config.r)
    (l, k), (m, n) = divided(site.out_features, config.decompose_factor), divided(site.in_features, config.decompose_factor)
    first = {"W1a": (l, r), "W1b": (r, m)} if config.decompose_both and r < max(l, m) / 2 else {"W1": (l, m)}
    second = {"W2a": (k, r), "W2b": (r, n)} if r < max(k, n) / 2 else {"W2": (k, n)}
    return {**first, **second}


@dataclass
class KroneckerBank:
    """K adapters of one site: W1 (K, l, m) with the scale folded in and W2 (K, k, n); or, where the adapters divide the map
    differently, their dense changes (K, out, in) in W2 alone."""

    W1: Tensor | None
    W2: Tensor

    @property
    def nbytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in (self.W1, self.W2) if t is not None)


@register("adapter", "lokr", config=LoKr, paper="2309.14859",
          title="Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation",
          summary="Kronecker product of a small matrix and a low-rank one; high rank from few parameters",
          bibtex="@inproceedings{yeh2024lycoris, title={Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model "
                 "Evaluation}, author={Yeh, Shih-Ying and Hsieh, Yu-Guan and Gao, Zhidong and Yang, Bernard B W and Oh, Giyeong and "
                 "Gong, Yanmin}, booktitle={ICLR}, year={2024}}")
class LoKrAdapter(Adapter):
    def __init__(self, site, config, *, shared, generator):
        super().__init__(site, config, shared=shared, generator=generator)
        if config.decompose_factor == 0:
            raise UsageError("lokr: decompose_factor=0 divides nothing", remedy="-1 (near the square root), or 1 or more")
        self.r = pattern_value(config.rank_pattern, site.name, config.r)
        self.scale = pattern_value(config.alpha_pattern, site.name, self.r if config.alpha is None else config.alpha) / self.r
        for name, shape in shapes(site, config).items():
            start = torch.zeros(shape)
            if name not in ("W1", "W1a"):
                start.uniform_(-(shape[1] ** -0.5), shape[1] ** -0.5, generator=generator)
            self.register_parameter(name, nn.Parameter(start))

    @classmethod
    def parameter_count(cls, site, config):
        return sum(rows * columns for rows, columns in shapes(site, config).values())

    # -- built -------------------------------------------------------------------------------------------------------
    def matrix(self, name: str) -> Tensor:
        """W1 or W2, whole."""
        whole = self._parameters.get(name)
        return self._parameters[name + "a"] @ self._parameters[name + "b"] if whole is None else whole

    def _split(self, name: str) -> tuple[Tensor, Tensor]:
        """(left, right) with W1 or W2 = left right, of the smallest inner size at hand."""
        whole = self._parameters.get(name)
        if whole is None and self.r <= min(self._parameters[name + "a"].shape[0], self._parameters[name + "b"].shape[1]):
            return self._parameters[name + "a"], self._parameters[name + "b"]
        whole = self.matrix(name)
        identity = torch.eye(min(whole.shape), device=whole.device, dtype=whole.dtype)
        return (identity, whole) if whole.shape[0] <= whole.shape[1] else (whole, identity)

    def factors(self, base=None):
        (left1, right1), (left2, right2) = self._split("W1"), self._split("W2")
        return torch.kron(left1 * self.scale, left2), torch.kron(right1, right2)

    def delta_weight(self, base):
        return torch.kron(self.matrix("W1").float() * self.scale, self.matrix("W2").float())

    # -- applied -----------------------------------------------------------------------------------------------------
    def delta(self, x, base):
        W1 = self.matrix("W1")
        parts = ("W2",) if "W2" in self._parameters else ("W2b", "W2a")
        t = x.unflatten(-1, (W1.shape[1], -1))  # (..., m, n)
        for name in parts:
            t = linear(t, self._parameters[name].to(x.dtype))
        y = linear(t.transpose(-1, -2), (W1 * self.scale).to(x.dtype))  # (..., k, l)
        return y.transpose(-1, -2).flatten(-2)

    # -- many rows ---------------------------------------------------------------------------------------------------
    @classmethod
    def stack(cls, adapters, dtype):
        dtype = product_dtype(dtype, next(adapters[0].parameters()).device)
        pairs = [(a.matrix("W1") * a.scale, a.matrix("W2")) for a in adapters]
        if len({(W1.shape, W2.shape) for W1, W2 in pairs}) > 1:
            return KroneckerBank(None, torch.stack([torch.kron(*pair) for pair in pairs]).to(dtype))
        return KroneckerBank(torch.stack([W1 for W1, _ in pairs]).to(dtype), torch.stack([W2 for _, W2 in pairs]).to(dtype))

    @classmethod
    def forward_rows(cls, bank, index, x, base):
        flat = as_rows(x).to(bank.W2.dtype)
        W2 = bank.W2.index_select(0, index).transpose(1, 2)  # (N, n, k)
        if bank.W1 is None:
            change = torch.bmm(flat, W2)
        else:
            W1 = bank.W1.index_select(0, index).transpose(1, 2)  # (N, m, l)
            rows, tokens = flat.shape[:2]
            m, l, k = W1.shape[1], W1.shape[2], W2.shape[2]
            t = torch.bmm(flat.reshape(rows, tokens * m, -1), W2).view(rows, tokens, m, k).transpose(2, 3)
            y = torch.bmm(t.reshape(rows, tokens * k, m), W1).view(rows, tokens, k, l)
            change = y.transpose(2, 3).reshape(rows, tokens, l * k)
        return change.to(x.dtype).reshape(*x.shape[:-1], change.shape[-1])
