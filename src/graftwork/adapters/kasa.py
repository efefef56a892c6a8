"""KaSA: drop the smallest singular components of W and learn an SVD-shaped change (arXiv 2412.06071).

    y = (W - W_tail) x + b + s B (sigma * A x),   W (out, in) frozen, q = min(out, in)
    W_tail: the r smallest singular components of W, so q - r stay
    A (r, in) Kaiming uniform, sigma (r,) ~ N(0, 1), B (out, r) zero; all trained; s = alpha / r; r (in + out + 1) parameters
    loss = task + sum over sites of  beta |sigma|^2 + gamma (|B^T B - I|_F + |A A^T - I|_F)

The weight is not rewritten: with Q the r left (right, where out > in) singular vectors of the tail, W_tail = Q (Q^T W), and the
adapter subtracts this product of rank r. So other grafts and `disabled()` see the whole W, the tail is dropped once however
often the adapter is attached, and it converts exactly to a LoRA of rank 2r. Q comes from the Gram matrix of W in fp64 and is
taken again at every load: the file holds A, sigma and B.

The output changes at the start by design: W loses its tail, the last r of its squared singular values. That is small only where the
spectrum has a small end. In SmolLM2-135M it has none in v_proj (576 -> 192, smallest to largest singular value 0.1 to 0.2): there r = 1
already moves the loss from 3.1 to 6.8 (r = 8 on all linear maps: 11.7), while q_proj and o_proj do not notice r = 8. Look at the loss
at step 0; truncate=false keeps W whole and starts at the base.
Follows the paper (and peft) where the official code differs: the code keeps the first in - r components, which drops nothing where
in >= out + r; its orthogonality term uses Gram matrices of size in and out, whose squares are larger by in - r and out - r, and
divides by the number of layers, so its beta and gamma mean something else. At B = 0 the term has no gradient for B.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from ..modeling.arithmetic import linear
from ..registry import register
from ._three_factor import frozen, kaiming
from ._weights import FromWeight, check_rank, weight_of
from .base import AdapterConfig, pattern_value


class KaSA(AdapterConfig):
    """Options of `kasa`."""

    r: int = Field(8, ge=1)
    alpha: float | None = Field(None, description="scale numerator; default r, so s = 1")
    beta: float = Field(1e-4, ge=0.0, description="weight of |sigma|^2 in the loss")
    gamma: float = Field(1e-3, ge=0.0, description="weight of the orthogonality of A and B in the loss")
    truncate: bool = Field(True, description="drop the r smallest components of W; false: W stays whole")
    rank_pattern: dict[str, int] = {}


def tail(W: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """(B0 (out, r), A0 (r, in)) with B0 A0 the r smallest singular components of W (out, in)."""
    if W.shape[0] <= W.shape[1]:
        Q = torch.linalg.eigh(W @ W.T).eigenvectors[:, :r]
        return Q, Q.T @ W
    Q = torch.linalg.eigh(W.T @ W).eigenvectors[:, :r]
    return W @ Q, Q.T


@register("adapter", "kasa", config=KaSA, title="KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models",
          paper="2412.06071", summary="drops the smallest singular components of W; learned singular values, near-orthogonal factors",
          bibtex="@inproceedings{wang2025kasa, title={KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models}, "
                 "author={Wang, Fan and Jiang, Juyong and Park, Chansung and Kim, Sunghun and Tang, Jing}, booktitle={ICLR}, "
                 "year={2025}}")
class KaSAAdapter(FromWeight):
    starts_at_identity = False

    def __init__(self, site, config, *, shared, generator):
        super().__init__(site, config, shared=shared, generator=generator)
        self.r = pattern_value(config.rank_pattern, site.name, config.r)
        check_rank("kasa", site, self.r, min(site.in_features, site.out_features) - 1)
        self.scale = 1.0 if config.alpha is None else config.alpha / self.r
        self.beta, self.gamma = config.beta, config.gamma
        self.A = nn.Parameter(kaiming(self.r, site.in_features, generator))
        self.sigma = nn.Parameter(torch.randn(self.r, generator=generator))
        self.B = nn.Parameter(torch.zeros(site.out_features, self.r))
        self.taken = ("B0", "A0") if config.truncate else ()
        self.register_parameter("A0", frozen(self.r, site.in_features) if config.truncate else None)
        self.register_parameter("B0", frozen(site.out_features, self.r) if config.truncate else None)

    @classmethod
    def parameter_count(cls, site, config):
        return pattern_value(config.rank_pattern, site.name, config.r) * (site.in_features + site.out_features + 1)

    def start(self, product, pristine, generator):
        if self.B0 is None:
            return
        B0, A0 = tail(weight_of(product, pristine), self.r)
        self.B0.copy_(B0)
        self.A0.copy_(A0)

    def factors(self, base=None):
        B = self.B * (self.sigma * self.scale)
        return (B, self.A) if self.B0 is None else (torch.cat([B, self.B0], 1), torch.cat([self.A, -self.A0]))

    def delta(self, x, base):
        learned = linear(x, self.A.to(x.dtype)) * (self.sigma * self.scale).to(x.dtype)
        change = linear(learned, self.B.to(x.dtype))
        return change if self.B0 is None else change - linear(linear(x, self.A0.to(x.dtype)), self.B0.to(x.dtype))

    def base_edit(self):
        return None if self.B0 is None else (self.B0, self.A0)

    def auxiliary_loss(self):
        if not self.beta and not self.gamma:
            return None
        unit = torch.eye(self.r, device=self.A.device)
        apart = torch.linalg.norm(self.B.T @ self.B - unit) + torch.linalg.norm(self.A @ self.A.T - unit)
        return self.beta * self.sigma.square().sum() + self.gamma * apart

    # -- saved: the basis of a tail is free (its signs, its rotation), so the tail itself is what must be the same ----------
    def stored_extra(self):
        return None if self.B0 is None else {"tail": _projection(self.B0, self.A0)[0]}

    def check_extra(self, extra):
        now, size = _projection(self.B0, self.A0)
        self.refuse_if_apart("the tail of W", now, extra["tail"], size)


def _projection(B0: Tensor, A0: Tensor) -> tuple[float, float]:
    """(u^T B0 A0 v on fixed patterns u, v; a bound of its size)."""
    B, A = B0.detach().double().cpu(), A0.detach().double().cpu()
    u, v = torch.arange(B.shape[0]).double().mul(1.7).cos(), torch.arange(A.shape[1]).double().mul(2.3).cos()
    return float(f"{float((u @ B) @ (A @ v)):.9g}"), float(B.norm() * A.norm())
