"""PV-Tuning: train a quantized model as it is, both the numbers that its codes stand for and the codes (arXiv 2405.14852).

    W' = D(codes, values)   (out, in);   y = x W'^T + b
    values   the float leaves of the storage (scale, zero, book), fp32, trained by any optimizer: the P step.  d values is autograd's
             through D, formed with G = g^T x (out, in) a tile at a time
    codes    uint8, as the storage keeps them, moved by selection `pv_tuning` after the optimizer's step: the V step, see its file

Both belong to the graft and are saved with it, b bits a weight and the values in fp32; what else the storage keeps (whole zero points,
input scales, groups of rows) is read from the base and a checksum says which. The base is not written: other grafts and
`disabled` see it as it was. Parameters: the number of values. Merging ends in the base's own storage with values in fp32
(exact), or in the dtype that the base keeps (`requantize`; the rounding is reported). A slice of a fused projection merges into dense
weights. Without the selection only values would train, which is `peqa`, so recipes refuse the one without the other.

For the V step the site multiplies g^T x once more, in the backward pass of the steps that watch; one dense G is alive at a time.
Weight decay is off: it would pull the values, hence W', to zero. Storages: those whose codes move one by one (int2 to int_wide, nf,
codebook). The vector codes of AQLM, which the paper's models use, are no storage here. No KL to a teacher: that is an objective.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import ArtifactError, IncompatibleError
from ..modeling.arithmetic import product_dtype
from ..modeling.protocols import Product, RowsProduct, has_values
from ..registry import register
from ._replaced import Replaced
from .base import AdapterConfig


class PVTuning(AdapterConfig):
    """Options of `pv_tuning`: only which sites."""


def stored_of(product: Product):
    return getattr(product, "whole", product).stored


def values_of(product: Product, name: str) -> dict[str, Tensor]:
    """The float leaves of a site that train. Raises IncompatibleError where there are none, or codes that do not move."""
    stored, found = stored_of(product), {}
    if stored is not None and stored.lets_train("codes"):
        leaves = stored.leaves()
        found = {n: product.leaf(n) for n in stored.trainable_leaves if n in leaves and leaves[n].is_floating_point()}
    if not found:
        raise IncompatibleError(f"'pv_tuning' trains the codes of quantized weights and their numbers, and the weight of '{name}' has "
                                "none that can be trained", remedy="storage: int4 (load the model with it), or leave this module out")
    if isinstance(product, RowsProduct) and any(len(stored.leaves()[n]) != stored.out_features for n in found):
        raise IncompatibleError(f"'{name}' shares its code book with the other rows of a fused projection",
                                remedy="target the whole projection")
    return found


class _Watched(torch.autograd.Function):
    """y as it is; in the backward pass the adapter's watcher sees G."""

    @staticmethod
    def forward(ctx, y, x, adapter):
        ctx.adapter = adapter
        ctx.save_for_backward(x)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad):
        (x,), watch = ctx.saved_tensors, ctx.adapter.watch
        if watch is not None:
            dtype = product_dtype(grad.dtype, grad.device)
            g, rows = grad.reshape(-1, grad.shape[-1]).to(dtype), x.reshape(-1, x.shape[-1]).to(dtype)
            watch((g.T @ rows).float())
        return grad, None, None


@register("adapter", "pv_tuning", config=PVTuning, paper="2405.14852",
          title="PV-Tuning: Beyond Straight-Through Estimation for Extreme LLM Compression", selection="pv_tuning",
          summary="trains quantized weights themselves: the scales or code books, and with its selection the codes",
          bibtex="@inproceedings{malinovskii2024pv, title={{PV-Tuning}: Beyond Straight-Through Estimation for Extreme {LLM} "
                 "Compression}, author={Malinovskii, Vladimir and Mazur, Denis and Ilin, Ivan and Kuznedelev, Denis and Burlachenko, "
                 "Konstantin and Yi, Kai and Alistarh, Dan and Richtarik, Peter}, booktitle={NeurIPS}, year={2024}}")
class PVTuningAdapter(Replaced):
    position = "metadata"
    random_start = False
    owns_leaf = "codes"
    moves = ("codes",)

    def __init__(self, site, config, *, shared, generator):
        super().__init__(site, config, shared=shared, generator=generator)
        self.map = site.product
        values = values_of(self.map, site.name)
        self.values = nn.ParameterDict({name: nn.Parameter(value.detach().float().clone()) for name, value in values.items()})
        self.codes = nn.Parameter(self.map.leaf("codes").detach().clone(), requires_grad=False)
        self.watch: Callable[[Tensor], None] | None = None  # sees G (out, in) fp32 of each backward pass

    @classmethod
    def parameter_count(cls, site, config):
        return sum(value.numel() for value in values_of(site.product, site.name).values())

    def parameter_groups(self):
        return [{"params": list(self.values.parameters()), "lr_scale": 1.0, "weight_decay": 0.0}]

    # -- applied -----------------------------------------------------------------------------------------------------
    def leaves(self) -> dict[str, Tensor]:
        return {"codes": self.codes, **self.values}

    def product(self, x):
        y = self.map.product(x, self.leaves())
        return _Watched.apply(y, x, self) if self.watch is not None and y.requires_grad else y

    def weight(self, codes: Tensor | None = None) -> Tensor:
        """W' (out, in), fp32, as it computes; under other codes than its own, where they are given."""
        leaves = self.leaves() if codes is None else {**self.leaves(), "codes": codes}
        return self.map.dense(leaves).float()

    @torch.no_grad()
    def recoded(self, weight: Tensor, moved: Tensor) -> Tensor:
        """The codes with those nearest to weight (out, in) where moved (out, in) bool says so."""
        stored, leaves = stored_of(self.map), self.leaves()
        if not isinstance(self.map, RowsProduct):
            return stored.recoded(weight, leaves, moved)
        rows, own = self.map.rows, stored.leaves()
        whole, chosen = (torch.zeros(stored.out_features, self.in_features, dtype=t.dtype, device=t.device) for t in (weight, moved))
        whole[rows], chosen[rows] = weight, moved
        for name, value in leaves.items():
            leaves[name] = torch.cat([own[name][: rows.start].to(value.dtype), value, own[name][rows.stop:].to(value.dtype)])
        return stored.recoded(whole, leaves, chosen)[rows]

    def held_by(self, product, weight, *, exact):
        return product.stored.with_leaves({name: value.detach() for name, value in self.leaves().items()}, exact=exact)

    # -- stored: what the base keeps of W' ---------------------------------------------------------------------------------
    def stored_extra(self):
        return {"base": self._checksum()} if has_values(self.codes) else None

    def check_extra(self, extra):
        if extra["base"] != self._checksum():
            raise ArtifactError(f"the codes of '{self.site_name}' were trained beside other zero points or scales than this model has",
                                remedy="load the base in the storage it was trained on, with the same calibration")

    def _checksum(self) -> str:
        """Of all leaves of the base but those that the graft owns."""
        digest = hashlib.blake2b(digest_size=16)
        for name, leaf in sorted(stored_of(self.map).leaves().items()):
            if name not in self.leaves():
                digest.update(name.encode() + leaf.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()
