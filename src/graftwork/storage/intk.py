"""INT4, INT3 and INT2 weights in groups along the input.

Asymmetric (default), L = 2^b - 1, per group of a row:

    scale = (max - min) / L,   zero = -min / scale,   code = clamp(round(w / scale + zero), 0, L),   D(W) = scale (code - zero)

`zero_point: float` keeps zero as it is (as HQQ and tinygemm do; a merge into it can be exact), `integer` (default) rounds it and
holds it within the codes, after stretching the range to contain 0, as GPTQ and AWQ checkpoints do. Symmetric: scale =
max|w| / (2^(b-1) - 1), codes -2^(b-1) ... 2^(b-1) - 1 kept with an offset, no zero. A constant group is exact.

A published checkpoint whose columns are not in the order of their groups has one more leaf, `group_index` (in,) int32; inputs that are
rounded are then multiplied by decoded weights, since a group's codes do not lie together.

Bits a weight: b + (s + z) / g, with s = 16 bits of scale and z = 8 of an integer zero, 16 of a float one; 32 / out more with
`group_index`.
Oracles: float64 closed form, hqq and torchao (tests/oracles/test_storage_intk.py).
"""

from __future__ import annotations

from typing import Literal

import torch

from ..errors import UsageError
from ..registry import register
from . import _compiled
from ._affine import group_product, row_product, serves
from ._groups import Grid, GroupConfig, GroupStorage
from ._packing import unpack
from ._scales import SCALES, positive
from .base import view_as


class IntConfig(GroupConfig):
    symmetric: bool = False
    """Codes around zero and no zero point."""
    zero_point: Literal["integer", "float"] = "integer"
    """integer: a whole number within the codes; float: any, in the scale's dtype."""
    scale_dtype: Literal["fp16", "bf16", "fp32"] = "fp16"


class IntGrid(Grid):
    def __init__(self, bits: int, symmetric: bool, whole: bool, dtype: torch.dtype):
        self.bits, self.symmetric, self.whole = bits, symmetric, whole
        offset = 2 ** (bits - 1) if symmetric else 0
        self.table = tuple(float(code - offset) for code in range(2**bits))
        self.parameters = {"scale": dtype} if symmetric else {"scale": dtype, "zero": torch.uint8 if whole else dtype}

    def fit(self, groups):
        top, kept = 2**self.bits - 1, self.parameters["scale"]
        if self.symmetric:
            return {"scale": positive(groups.abs().amax(-1) / (2 ** (self.bits - 1) - 1 or 1), kept)}
        low, high = groups.amin(-1), groups.amax(-1)
        if self.whole:
            low, high = low.clamp(max=0), high.clamp(min=0)
        constant = low == high
        scale = positive(torch.where(constant, low.abs(), (high - low) / top), kept)
        zero = torch.where(constant, (low < 0).float(), -low / scale.float())
        return {"scale": scale, "zero": zero.round().clamp(0, top).to(torch.uint8) if self.whole else zero.to(kept)}

    def _zero(self, parameters):
        return 2 ** (self.bits - 1) if self.symmetric else parameters["zero"].float().unsqueeze(-1)

    def encode(self, values, parameters):
        unit = values / parameters["scale"].float().unsqueeze(-1)
        zero = self._zero(parameters)
        unit = unit.round() + zero if self.symmetric or self.whole else (unit + zero).round()
        return unit.clamp(0, 2**self.bits - 1).to(torch.uint8)

    def place(self, values, parameters):
        scale, fresh = parameters["scale"].float().unsqueeze(-1), not torch.is_grad_enabled()
        if not self.symmetric:
            zero = self._zero(parameters)
            values = values.sub_(zero) if fresh else values - zero
        return values.mul_(scale) if fresh else values * scale

    def integers(self, codes, parameters):
        return (codes.float() - self._zero(parameters), parameters["scale"].float()) if self.symmetric or self.whole else None


class IntStorage(GroupStorage):
    trainable_leaves = ("scale", "zero")
    recodes = True
    bits: int

    def _grid_values(self, leaves, rows):
        if "group_index" not in leaves:
            return super()._grid_values(leaves, rows)
        quantizer, parameters = self._read(leaves, rows)
        codes = unpack(leaves["codes"][rows], self.in_features, quantizer.grid.bits)
        each = {name: value.index_select(1, leaves["group_index"]) for name, value in parameters.items()}
        return quantizer.grid.decode(codes.unsqueeze(-1), each).squeeze(-1)

    def forward_product(self, x):
        size, columns = self.options.group_size, self.in_features
        bits, group = self.bits, columns if size < 1 else min(size, columns)
        if "group_index" in self._kinds:
            return super().forward_product(x)
        if columns % group == 0 and _compiled.suits(x, bits, group):
            return self._few_rows(x, group)
        if not serves(x, bits, group, columns):
            return super().forward_product(x)
        leaves = self.leaves()

        def numbers(rows):
            return leaves["scale"][rows].float(), leaves["zero"][rows].float() if "zero" in leaves else 2 ** (bits - 1)

        placed = self._placed(x.float(), leaves)
        if group < columns:
            return group_product(placed, leaves["codes"], bits, group, numbers).to(x.dtype)
        scale, zero = (value if isinstance(value, int) else value.flatten() for value in numbers(slice(None)))
        return row_product(placed, leaves["codes"], bits, scale, zero).to(x.dtype)

    def _few_rows(self, x, group):
        kept, kinds = self._parameters, self._kinds
        scale, zero = (view_as(kept[name], kinds[name][1]) if name in kinds else 2 ** (self.bits - 1) for name in ("scale", "zero"))
        placed = self._placed(x.float(), self.leaves()) if "input_scale" in kinds or "channels" in kinds else x
        return _compiled.few_product(placed, kept["codes"], self.bits, scale, zero, group, group).to(x.dtype)

    def integers(self, leaves, rows):
        return None if "group_index" in leaves else super().integers(leaves, rows)

    def nearest_codes(self, weight, leaves):
        if "group_index" not in leaves:
            return super().nearest_codes(weight, leaves)
        grid = self.grid(self.options)
        each = {name: leaves[name].index_select(1, leaves["group_index"]) for name in grid.parameters}
        return grid.encode(weight.unsqueeze(-1), each).squeeze(-1), grid.bits

    @classmethod
    def joined(cls, parts):
        if len({"group_index" in part.leaves() for part in parts}) == 2:
            raise UsageError("maps that the model keeps as one have their columns in different orders (act-order)",
                             remedy="give the dense model")
        return super().joined(parts)

    @classmethod
    def grid(cls, config):
        return IntGrid(cls.bits, config.symmetric, config.zero_point == "integer", SCALES[config.scale_dtype])

    def shifted(self, change, *, exact=True):
        """zero <- zero - change / scale: a float zero holds a change that is the same for a whole group."""
        own, groups = self.leaves(), self.quantizer(self.options, self.in_features).split(change.float())
        if "zero" not in own or not own["zero"].is_floating_point() or {"input_scale", "group_index"} & set(own):
            return None
        if (groups != groups[..., :1]).any():
            return None
        return self.with_leaves({"zero": own["zero"].float() - groups[..., 0] / own["scale"].float()}, exact=exact)


class Int4(IntConfig):
    """Options of int4."""


class Int3(IntConfig):
    """Options of int3."""


class Int2(IntConfig):
    """Options of int2."""


@register("storage", "int4", config=Int4, title="INT4 groups", lossless=False, summary="4-bit integers in groups of 64 along the input: "
          "4.375 bits a weight")
class Int4Storage(IntStorage):
    bits = 4


@register("storage", "int3", config=Int3, title="INT3 groups", lossless=False, summary="3-bit integers in groups of 64 along the input: "
          "3.375 bits a weight")
class Int3Storage(IntStorage):
    bits = 3


@register("storage", "int2", config=Int2, title="INT2 groups", lossless=False, summary="2-bit integers in groups of 64 along the input: "
          "2.375 bits a weight")
class Int2Storage(IntStorage):
    bits = 2
