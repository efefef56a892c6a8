"""PEQA: train the scales of a quantized model, and nothing else (arXiv 2305.14152).

    W = s * C   (out, in),   C the frozen integers less their zero point, s (out, groups) the scale of each group along the input
    y = x ((s + ds) * C)^T + b,   ds (out, groups) trained in fp32, zero at the start

    ds_i = sum_t g_ti (x_t C_i)  over the inputs of a group (one group a row: sum_t g_ti y_ti / s_i)

Parameters: one a group; out where a group is a whole row (group_size: -1). The storage decodes W tile by tile, forward and back, and
keeps x alone for the backward pass; the out x in gradient exists a tile at a time.

The base is not written while it trains: many grafts share its integers, and rows of a batch may have different ds. The change
ds * C is a change of weights like any other, so it can be summed, scaled, served per row, and merged: then s + ds becomes the scale of
a storage of the same integers, in fp32 (exact), or in the dtype that the base keeps scales in (`requantize`; the rounding is
reported). It has full rank, so as a LoRA it is an approximation.

Rates: ds moves in units of the scale (about 0.01 of a weight matrix with entries around 0.05), so a rate is some 100 times smaller than
LoRA's. A scale may change its sign, which mirrors a group. Any storage whose leaf `scale` W is proportional to will do; a dense base is
refused. No training code was published; s0 is what the storage's calibration gives.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from ..errors import ArtifactError, IncompatibleError
from ..modeling.protocols import Product, has_values
from ..registry import register
from ._row_loop import RowLoop
from .base import AdapterConfig


class PEQA(AdapterConfig):
    """Options of `peqa`: only which sites."""


def scale_of(product: Product, name: str) -> Tensor:
    """The scales (out, groups) of a site. Raises IncompatibleError where it has none."""
    stored = getattr(product, "whole", product).stored
    found = product.leaf("scale") if stored is not None and "scale" in stored.trainable_leaves else None
    if found is None or not found.is_floating_point():  # nested scales are whole numbers
        raise IncompatibleError(f"'peqa' trains the scales of quantized weights, and the weight of '{name}' has none that can be trained",
                                remedy="storage: int4 (load the model with it), or leave this module out")
    return found


@register("adapter", "peqa", config=PEQA, paper="2305.14152",
          title="PEQA: Memory-Efficient Fine-Tuning of Compressed Large Language Models via sub-4-bit Integer Quantization",
          summary="trains the scales of integer weights; merging writes them, and the integers never change",
          bibtex="@inproceedings{kim2023peqa, title={Memory-Efficient Fine-Tuning of Compressed Large Language Models via sub-4-bit "
                 "Integer Quantization}, author={Kim, Jeonghoon and Lee, Jung Hyun and Kim, Sungdong and Park, Joonsuk and Yoo, Kang "
                 "Min and Kwon, Se Jung and Lee, Dongsoo}, booktitle={NeurIPS}, year={2023}}")
class PEQAAdapter(RowLoop):
    position = "metadata"
    random_start = False
    owns_leaf = "scale"

    def __init__(self, site, config, *, shared, generator):
        super().__init__(site, config, shared=shared, generator=generator)
        self.scale_change = nn.Parameter(torch.zeros(tuple(scale_of(site.product, site.name).shape)))
        self.product = site.product

    @classmethod
    def parameter_count(cls, site, config):
        product = getattr(site, "product", None)
        return site.out_features if product is None else scale_of(product, site.name).numel()

    # -- applied -----------------------------------------------------------------------------------------------------
    def forward(self, x, base):
        if base.frozen.stored is not self.product.stored:  # another graft is merged: its weight may be dense, or have other codes
            return base(x) + self.change(x, base)
        return base(x, {"scale": self.product.leaf("scale").float() + self.scale_change})

    def change(self, x, base):
        return self.product.product(x, {"scale": self.scale_change})

    def delta_weight(self, base):
        return self.product.dense({"scale": self.scale_change}).float()

    def held_by(self, product, weight, *, exact):
        scale = scale_of(product, self.site_name).float() + weight * self.scale_change.detach()
        return product.stored.with_leaves({"scale": scale}, exact=exact)

    # -- stored: the scales belong to certain integers -------------------------------------------------------------------
    def stored_extra(self):
        return {"codes": self._codes()} if has_values(self.scale_change) else None

    def check_extra(self, extra):
        if extra["codes"] != self._codes():
            raise ArtifactError(f"the scales of '{self.site_name}' were trained on other integers than this model has",
                                remedy="load the base in the storage it was trained on, with the same calibration")

    def _codes(self) -> str:
        """A checksum of the integers and scales that the change was trained beside."""
        digest = hashlib.blake2b(digest_size=16)
        for name in ("codes", "scale"):
            leaf = self.product.leaf(name)
            digest.update(b"" if leaf is None else leaf.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()
