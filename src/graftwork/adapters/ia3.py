"""(IA)^3: one learned factor for each output of a map, or for each input of the second feed-forward map (arXiv 2205.05638).

    y = l * (W x + b),  l (out,)        maps named in feedforward_modules:  y = W (l * x) + b,  l (in,)
    W (out, in) frozen, l trained, one at the start; * element-wise

The paper scales keys, values and the inner activation of the feed-forward block, which is the input of its second map:
target_modules: "k,v,down" (any map may be named here). The output form scales the bias as well, as peft does. Parameters: out a map,
or in of a feed-forward one. One product of W whatever the rows of a batch choose. The change of W scales its rows or columns
and is not low-rank.

Kept and applied as difference from one, x + (l - 1) * x: cast to bf16, a factor just above one is one; here only the sum is rounded.
Weight decay therefore pulls towards the base, not towards zero. The paper's own extra losses (length normalization, unlikelihood)
belong to its training recipe, not to the adapter.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..registry import register
from .base import Adapter, AdapterConfig


class IA3(AdapterConfig):
    """Options of `ia3`; names as in PEFT."""

    feedforward_modules: str | list[str] = ["down", "fc2", "down_proj"]
    """Maps whose input is scaled: roles or ends of names, or a regular expression on the whole name."""


@dataclass
class ScaleBank:
    """K adapters of one site: factors minus one of the inputs (K, in) and of the outputs (K, out); None where no adapter has them
    (grafts may differ in which side of a map they scale)."""

    inputs: Tensor | None
    outputs: Tensor | None

    @property
    def nbytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in (self.inputs, self.outputs) if t is not None)


def scales_input(site, modules: str | list[str]) -> bool:
    """True for a map named in feedforward_modules; the number of an expert is no part of its name."""
    if isinstance(modules, str):
        return re.fullmatch(modules, site.name) is not None
    name = re.sub(r"\.\d+$", "", site.name)
    return any(site.role == m or name == m or name.endswith("." + m) for m in modules)


@register("adapter", "ia3", config=IA3, paper="2205.05638",
          title="Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
          summary="one factor per output (or per input of the second feed-forward map)",
          bibtex="@inproceedings{liu2022ia3, title={Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context "
                 "Learning}, author={Liu, Haokun and Tam, Derek and Muqeeth, Mohammed and Mohta, Jay and Huang, Tenghao and "
                 "Bansal, Mohit and Raffel, Colin}, booktitle={NeurIPS}, year={2022}}")
class IA3Adapter(Adapter):
    multiplicative = True
    random_start = False
    restarts_on_load = True  # what it takes from the map is the map itself

    def __init__(self, site, config, *, shared, generator):
        super().__init__(site, config, shared=shared, generator=generator)
        self.feedforward = scales_input(site, config.feedforward_modules)
        self.growth = nn.Parameter(torch.zeros(site.in_features if self.feedforward else site.out_features))
        self.scaled = None

    @classmethod
    def parameter_count(cls, site, config):
        return site.in_features if scales_input(site, config.feedforward_modules) else site.out_features

    def start(self, product, pristine, generator):
        self.scaled = product  # whose bias is scaled along

    # -- built -------------------------------------------------------------------------------------------------------
    def delta_weight(self, base):
        return base.weight().float() * (self.growth[None, :] if self.feedforward else self.growth[:, None])

    def delta_bias(self):
        bias = None if self.feedforward else self.scaled.bias
        return None if bias is None else bias.float() * self.growth

    # -- applied -----------------------------------------------------------------------------------------------------
    def forward(self, x, base):
        if not self.feedforward:
            y = base(x)
            return torch.addcmul(y, y, self.growth.to(y.dtype))
        y = base.product(torch.addcmul(x, x, self.growth.to(x.dtype)))
        return y if base.bias is None else y + base.bias.to(y.dtype)

    def delta(self, x, base):
        return self.forward(x, base) - base(x)

    # -- many rows ---------------------------------------------------------------------------------------------------
    @classmethod
    def stack(cls, adapters, dtype):
        def side(feedforward: bool, width: int) -> Tensor | None:
            if not any(a.feedforward == feedforward for a in adapters):
                return None
            rest = adapters[0].growth.new_zeros(width)
            return torch.stack([a.growth if a.feedforward == feedforward else rest for a in adapters]).to(dtype)

        return ScaleBank(side(True, adapters[0].in_features), side(False, adapters[0].out_features))

    @staticmethod
    def _by_row(bank: Tensor, index: Tensor, x: Tensor) -> Tensor:
        """(K, n) -> (N, 1.., n), broadcasting to x with N rows."""
        return bank.index_select(0, index).view(-1, *[1] * (x.dim() - 2), bank.shape[-1])

    @classmethod
    def rows_inputs(cls, bank, index, x):
        return x if bank.inputs is None else torch.addcmul(x, x, cls._by_row(bank.inputs, index, x))

    @classmethod
    def rows_combine(cls, bank, index, z, x, base):
        if bank.outputs is None:
            return z
        growth = cls._by_row(bank.outputs, index, z)
        z = torch.addcmul(z, z, growth)
        return z if base.bias is None else z + growth * base.bias.to(z.dtype)

    @classmethod
    def forward_rows(cls, bank, index, x, base):
        y = cls.rows_combine(bank, index, base.product(cls.rows_inputs(bank, index, x)), x, base)
        return (y if base.bias is None else y + base.bias.to(y.dtype)) - base(x)
