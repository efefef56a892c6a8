"""INT8 weights that can train: groups of 256 with a scale and a zero point, no master copy (Q-GaLore, arXiv 2407.08296).

W (out, in), read row by row, in groups of g (graftwork.modeling.affine):

    scale = (max - min) / 255,   zero = -round(min / scale),   code = clamp(round(w / scale) + zero, 0, 255),   D(W) = (code - zero) scale

8 + 64 / g bits a weight. Below an adapter the codes are frozen, as in any storage. In full tuning (`adapter: null`) they train: the
weight is a stand-in without memory (graftwork.modeling.trained_codes), y = x D(W)^T, dx = g D(W), dW = g^T x in the compute
dtype, and an optimizer's step is D(W) -> update -> codes with new scales, one matrix at a time. `rounding: stochastic` of the
optimizer lets updates below half a code add up in the mean; to the nearest they are lost.

Departures from the reference code: the zero point is not cut to 0..255, which destroys a group whose values have one sign; scales
are not held above 4e-8; a group may be short; codes, scales and zeros are saved, and a finished model is saved dense.
Extremes of a group have no room: a value beyond the last code by the rounding of the zero point is cut.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..errors import UsageError
from ..modeling.affine import dequantize_affine, per_number, quantize_affine
from ..modeling.arithmetic import kind_of, product_dtype
from ..modeling.trained_codes import blank, codes_of, stand_in
from ..registry import register
from . import _compiled, _tiles
from ._affine import group_product, row_product, serves
from ._coded import tiled_product, tiled_transposed
from ._tiles import row_tiles
from .base import Storage, StorageConfig, bytes_parameter, check_weight, differentiated, view_as

_LEAVES = ("codes", "scale", "zero")


class Int8(StorageConfig):
    group_size: int = Field(256, ge=16, description="weights that share a scale and a zero point")


@register("storage", "int8", config=Int8, title="INT8 weights, trainable", lossless=False, trainable=True,
          summary="8-bit codes in groups of 256: frozen below an adapter, or trained in place without a float copy: 8.25 bits a weight",
          paper="2407.08296",
          bibtex="@article{zhang2024qgalore, title={Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank "
                 "Gradients}, author={Zhang, Zhenyu and Jaiswal, Ajay and Yin, Lu and Liu, Shiwei and Zhao, Jiawei and Tian, "
                 "Yuandong and Wang, Zhangyang}, journal={arXiv:2407.08296}, year={2024}}")
class Int8Storage(Storage):
    """Leaves: `codes` (out*in,) uint8, `scale` and `zero` (groups,) fp32; kept as frozen uint8 Parameters."""

    def __init__(self, out_features: int, in_features: int, config: Int8, leaves: dict[str, Tensor], bias: Tensor | None,
                 compute_dtype: torch.dtype):
        super().__init__(out_features, in_features, bias, compute_dtype)
        self.options = config
        for name, value in leaves.items():
            self.register_parameter(name, bytes_parameter(value))

    @classmethod
    @torch.no_grad()
    def from_weight(cls, weight, config, *, bias=None, dtype=None, statistics=None, generator=None):
        check_weight(weight, "int8 storage")
        leaves = dict(zip(_LEAVES, quantize_affine(weight, 8, config.group_size)))
        return cls(*weight.shape, config, leaves, bias, dtype or weight.dtype)

    @classmethod
    @torch.no_grad()
    def joined(cls, parts):
        first = cls.alike(parts, parts[0].options.group_size)
        leaves = {name: torch.cat([part.leaves()[name] for part in parts]) for name in _LEAVES}
        return cls(sum(part.out_features for part in parts), first.in_features, first.options, leaves, None, first.compute_dtype)

    def leaves(self):
        kept = self._parameters
        return {n: view_as(kept[n].detach(), torch.uint8 if n == "codes" else torch.float32) for n in _LEAVES}

    def dequantize(self, leaves=None):
        if leaves is None:
            return self.dense_as(self.compute_dtype)
        if unknown := set(leaves) - set(_LEAVES):
            raise UsageError(f"storage 'int8' has no leaf '{sorted(unknown)[0]}'", remedy=f"leaves: {', '.join(_LEAVES)}")
        codes, scale, zero = ({**self.leaves(), **leaves}[n] for n in _LEAVES)
        values, group = codes.float(), self.options.group_size
        values = (values - per_number(zero, values, group)) * per_number(scale, values, group)
        return values.to(self.compute_dtype).view(self.out_features, self.in_features)

    @torch.no_grad()
    def dense_as(self, dtype: torch.dtype) -> Tensor:
        # Rounded to the compute dtype on the way, so that every product is by the same numbers.
        return self._values(self.compute_dtype).to(dtype)

    def _values(self, dtype: torch.dtype, rows: slice | None = None) -> Tensor:
        """All rows, or some that start with a group of their own."""
        rows, group = rows or slice(0, self.out_features), self.options.group_size
        first, last = rows.start * self.in_features, rows.stop * self.in_features
        codes, groups = self._parameters["codes"], self._groups(first, last)
        if last - first < codes.shape[0]:
            codes = codes[first:last]
        if _compiled.decodes(codes):
            out = torch.empty((last - first) // self.in_features, self.in_features, device=codes.device)
            return _compiled.decode_whole(codes, *groups, group, out).to(dtype)
        return dequantize_affine(codes, *groups, last - first, 8, group, dtype).view(-1, self.in_features)

    def _groups(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """scale and zero of the groups that hold the codes first ... last."""
        kept, group = self._parameters, self.options.group_size
        scale, zero = view_as(kept["scale"], torch.float32), view_as(kept["zero"], torch.float32)
        if last - first == kept["codes"].shape[0]:
            return scale, zero
        groups = slice(first // group, -(-last // group))
        return scale[groups], zero[groups]

    # -- products ---------------------------------------------------------------------------------------------------
    def forward_product(self, x):
        kept, columns, group = self._parameters, self.in_features, self.options.group_size
        codes, scale, zero = kept["codes"], view_as(kept["scale"], torch.float32), view_as(kept["zero"], torch.float32)
        # A group may run over the end of a row: what never does is a run as long as group and row have in common.
        run = math.gcd(columns, group)
        if _compiled.suits(x, 8, run):
            return _compiled.few_product(x, codes, 8, scale, zero, group, run).to(x.dtype)
        if not (group == columns and x.dtype == torch.float32 and kind_of(x.device) == "cpu" or serves(x, 8, run, columns)):
            return tiled_product(x, self._tiles(), self._rounded)
        if _compiled.decodes(x, codes):
            if codes.shape[0] > _tiles.TILE:
                return tiled_product(x.float(), self._tiles(), lambda rows, dtype: self._values(dtype, rows)).to(x.dtype)
            dense = torch.empty(self.out_features, columns, device=x.device)  # the same in fewer calls, which a small matrix feels
            return F.linear(x.float(), _compiled.decode_whole(codes, scale, zero, group, dense)).to(x.dtype)
        if group == columns:
            return row_product(x, codes.view(-1, columns), 8, scale, zero).to(x.dtype)

        def numbers(rows):
            first, last = rows.start * columns, rows.stop * columns
            own = self._groups(first, last)
            if run < group:
                skipped, many = first % group // run, (last - first) // run
                own = (value.repeat_interleave(group // run)[skipped: skipped + many] for value in own)
            return tuple(value.view(-1, columns // run) for value in own)

        return group_product(x, codes.view(-1, columns), 8, run, numbers).to(x.dtype)

    def transposed(self, grad):
        return tiled_transposed(grad, self._tiles(), self._rounded)

    def _tiles(self) -> list[slice]:
        group = self.options.group_size
        return row_tiles(self.out_features, self.in_features, group // math.gcd(self.in_features, group))

    def _rounded(self, rows: slice, dtype: torch.dtype) -> Tensor:
        return self._values(self.compute_dtype, rows).to(dtype)

    # -- training ---------------------------------------------------------------------------------------------------
    def train_weight(self) -> nn.Parameter:
        weight = self._parameters.get("weight")
        if codes_of(weight) is not self:
            weight = stand_in(self, (self.out_features, self.in_features), self.compute_dtype, self.codes.device)
            self._parameters["weight"] = weight  # `weight` is a property, which register_parameter refuses
        return weight

    @property
    def weight(self) -> Tensor:
        weight = self._parameters.get("weight")
        return Storage.weight.fget(self) if weight is None else weight

    @torch.no_grad()
    def read(self) -> Tensor:
        return self._values(torch.float32)

    @torch.no_grad()
    def write(self, values: Tensor, generator: torch.Generator | None = None) -> None:
        for name, value in zip(_LEAVES, quantize_affine(values, 8, self.options.group_size, generator)):
            self._parameters[name].copy_(value.view(torch.uint8))

    def parts(self) -> dict[str, Tensor]:
        return {name: self._parameters[name].detach() for name in _LEAVES}

    def product(self, x, leaves=None):
        weight = self._parameters.get("weight")
        if weight is None and leaves is None and not differentiated(x):  # the commonest, in the fewest calls
            return self.forward_product(x)
        if weight is None or leaves is not None or not weight.requires_grad:
            return super().product(x, leaves)
        if codes_of(weight) is not self:
            raise UsageError("a copied module would train the codes of its original", remedy="call train_weight() on the copy")
        return _TrainedProduct.apply(x, weight, self)

    # The stand-in is memory of no file, and a cast would give it some.
    def _apply(self, fn, recurse=True):
        weight = self._parameters.pop("weight", None)
        super()._apply(fn, recurse)
        if weight is not None:
            grad, weight.grad = weight.grad, None
            weight.data = blank(weight.shape, self.compute_dtype, self.codes.device)
            weight.grad = None if grad is None else fn(grad)
            self._parameters["weight"] = weight
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(f"{prefix}weight", None)

    def _load_from_state_dict(self, *args):
        weight = self._parameters.pop("weight", None)
        super()._load_from_state_dict(*args)
        if weight is not None:
            self._parameters["weight"] = weight


class _TrainedProduct(torch.autograd.Function):
    """y = x D(W)^T; D(W) is rebuilt in the backward pass, x is saved for the weight's gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, storage: Int8Storage) -> Tensor:
        ctx.storage, ctx.dtype = storage, weight.dtype
        ctx.save_for_backward(x)
        return storage.forward_product(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x,) = ctx.saved_tensors
        dx = ctx.storage.transposed(grad) if ctx.needs_input_grad[0] else None
        dw = None
        if ctx.needs_input_grad[1]:
            wide = product_dtype(grad.dtype, grad.device)
            g, rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
            dw = (g.to(wide).T @ rows.to(wide)).to(ctx.dtype)
        return dx, dw, None
