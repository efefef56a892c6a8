"""DoRA: the length of each row of the weight and its direction are learned apart (arXiv 2402.09353).

    y = g * (W x + s B A dropout(x)) + b,   g = m / ||W + s B A||   (per output row, * element-wise)
    W (out, in) frozen, A (r, in), B (out, r), m (out,) trained; s = alpha / r   (use_rslora: alpha / sqrt(r))
    start: A and B as in LoRA, m = ||W|| of the weight as it is stored, so g is exactly one and y unchanged

The norm is a constant of the backward pass (section 4.3 of the paper): dm = (dL/dy . z) / ||.||, and dA, dB are those of a
LoRA times g. It is computed again whenever gradients are wanted, in pieces of rows, and otherwise once per value of
A, B, m and W. g is applied as z + (g - 1) z with g - 1 in fp32: cast to bf16, a g just above one would be one.
Parameters r (in + out) + out.

Differs from the paper: its norm runs over the other axis in the text (one m per input); here, as in peft and in the official
code, there is one m per output. Differs from both codes: with dropout they feed the dropped input to (g - 1) W x as well,
which takes a second product of W; here only the low-rank path is dropped. The two agree in evaluation and without dropout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, nn

from ..modeling import repeated
from ..modeling.arithmetic import linear
from ..modeling.protocols import Base, Product, StorageProduct, has_values
from ..registry import register
from ._weights import check_rank
from .base import Adapter, AdapterConfig, Bank, pattern_value

#: elements of the weight that are widened at once for the norm
PIECE = 2**21


class DoRA(AdapterConfig):
    """Options of `dora`; names as in PEFT."""

    r: int = Field(8, ge=1)
    alpha: float | None = Field(None, description="scale numerator; default r, so s = 1")
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    use_rslora: bool = False
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}


@dataclass
class DirectionBank:
    """K adapters of one site: their pairs, and the adapters, whose g is computed where the weight is at hand."""

    pair: Bank
    adapters: list[DoRAAdapter]

    @property
    def nbytes(self) -> int:
        return self.pair.nbytes


def row_norms(weight: Tensor, B: Tensor, A: Tensor) -> Tensor:
    """||W + B A|| of each row, fp32 (out,), without gradient; no wide copy of W is made."""
    step = max(1, PIECE // weight.shape[1])
    norms = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    for rows in repeated.each([slice(i, i + step) for i in range(0, weight.shape[0], step)]):
        norms[rows] = torch.linalg.vector_norm(torch.addmm(weight[rows].float(), B[rows], A), dim=1)
    return norms


def _weight_state(product: Product) -> tuple:
    """Changes when the frozen weight is written or replaced. A stored weight is never written in place."""
    if isinstance(product, StorageProduct):
        return ()
    weight = product.dense()
    return weight.data_ptr(), weight._version, weight.dtype


@register("adapter", "dora", config=DoRA, title="DoRA: Weight-Decomposed Low-Rank Adaptation", paper="2402.09353",
          summary="LoRA for the direction of each weight row, and a learned length of the row",
          bibtex="@inproceedings{liu2024dora, title={DoRA: Weight-Decomposed Low-Rank Adaptation}, author={Liu, Shih-Yang and "
                 "Wang, Chien-Yi and Yin, Hongxu and Molchanov, Pavlo and Wang, Yu-Chiang Frank and Cheng, Kwang-Ting and "
                 "Chen, Min-Hung}, booktitle={ICML}, year={2024}}")
class DoRAAdapter(Adapter):
    multiplicative = True

    def __init__(self, site, config, *, shared, generator):
        super().__init__(site, config, shared=shared, generator=generator)
        self.r = pattern_value(config.rank_pattern, site.name, config.r)
        check_rank("dora", site, self.r)
        alpha = pattern_value(config.alpha_pattern, site.name, self.r if config.alpha is None else config.alpha)
        self.scale = alpha / (math.sqrt(self.r) if config.use_rslora else self.r)
        self.dropout = config.dropout
        bound = 1.0 / math.sqrt(site.in_features)
        self.lora_A = nn.Parameter(torch.empty(self.r, site.in_features).uniform_(-bound, bound, generator=generator))
        self.lora_B = nn.Parameter(torch.zeros(site.out_features, self.r))
        self.magnitude = nn.Parameter(torch.ones(site.out_features))
        self._kept: tuple | None = None

    @classmethod
    def parameter_count(cls, site, config):
        r = pattern_value(config.rank_pattern, site.name, config.r)
        return r * (site.in_features + site.out_features) + site.out_features

    def start(self, product, pristine, generator):
        self.magnitude.copy_(row_norms(product.dense(), self.lora_B * self.scale, self.lora_A))

    # -- built -------------------------------------------------------------------------------------------------------
    def growth(self, base: Base) -> Tensor:
        """g - 1 (out,), fp32; only m gets a gradient."""
        own = (self.lora_A, self.lora_B, self.magnitude)
        if (torch.is_grad_enabled() and any(p.requires_grad for p in own)) or not has_values(self.magnitude):
            self._kept = None
            return self._growth(base)
        state = (torch.is_inference_mode_enabled(), _weight_state(base.frozen), *((id(p), p._version, p.device) for p in own))
        if self._kept is None or self._kept[0] is not base.frozen or self._kept[1] != state:
            self._kept = (base.frozen, state, self._growth(base))
        return self._kept[2]

    def _growth(self, base: Base) -> Tensor:
        with torch.no_grad():
            norms = row_norms(base.weight(), self.lora_B * self.scale, self.lora_A)
        return self.magnitude / norms - 1.0

    def delta_weight(self, base):
        change, growth = self.scale * (self.lora_B @ self.lora_A), self.growth(base).unsqueeze(1)
        return (base.weight().float() + change) * growth + change

    # -- applied -----------------------------------------------------------------------------------------------------
    def forward(self, x, base):
        hidden = linear(self.drop(x, base), self.lora_A.to(x.dtype))
        z = base.product(x) + linear(hidden, (self.lora_B * self.scale).to(x.dtype))
        y = torch.addcmul(z, z, self.growth(base).to(z.dtype))
        return y if base.bias is None else y + base.bias.to(y.dtype)

    def delta(self, x, base):
        return self.forward(x, base) - base(x)

    # -- many rows ---------------------------------------------------------------------------------------------------
    @classmethod
    def stack(cls, adapters, dtype):
        first = adapters[0]
        pair = Bank.of([(a.lora_B * a.scale, a.lora_A) for a in adapters], (first.out_features, first.in_features), dtype,
                       dropout=cls.bank_dropout(adapters), key=first.site_name)
        return DirectionBank(pair, list(adapters))

    @classmethod
    def rows_inputs(cls, bank, index, x):
        return x

    @classmethod
    def rows_combine(cls, bank, index, z, x, base):
        z = z + Adapter.forward_rows.__func__(cls, bank.pair, index, x, base)
        growth = torch.stack([a.growth(base) for a in bank.adapters]).to(z.dtype).index_select(0, index)
        return torch.addcmul(z, z, growth.view(-1, *[1] * (z.dim() - 2), growth.shape[-1]))

    @classmethod
    def forward_rows(cls, bank, index, x, base):
        y = cls.rows_combine(bank, index, base.product(x), x, base)
        return (y if base.bias is None else y + base.bias.to(y.dtype)) - base(x)
