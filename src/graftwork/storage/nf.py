"""Normal-float codes of 2 to 8 bits in groups along the input: QLoRA's data type (arXiv 2305.14314) as a grid that takes any calibration.

    scale = max |w| of the group,   code = nearest of the 2^b quantiles of a normal distribution to w / scale,   D(W) = book[code] scale

Values are coded by the scale as it is kept. Bits a weight: b + s / g with s = 16 (32) bits of scale.

`scale_dtype: int8` nests the scales, as LQ-LoRA (arXiv 2311.12023) does: with R the greatest magnitude of a row,

    outer = bf16(R / 255),   scale = outer clamp(round(max |w| of the group / outer), 1, 255),   b + 8 / g + 16 / in bits a weight

There the least scale of the matrix is taken off first, and 256 scales, not those of a row, share the second one; it costs the same to
0.01 bits. Other calibrations than rtn move weights, so the second scale leaves them a factor of 2. Scales are whole numbers then, which no
adapter trains.

`nf4` is the format of bitsandbytes, whose blocks run on over the ends of rows; this one has every number of bits and no code table of its
own.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
from pydantic import Field
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ..registry import register
from ._groups import Grid, GroupConfig, GroupStorage
from ._scales import SCALES, positive
from .nf4 import normal_float


class NormalFloat(GroupConfig):
    bits: int = Field(4, ge=2, le=8)
    scale_dtype: Literal["fp16", "bf16", "fp32", "int8"] = "fp16"
    """How a group's scale is kept; int8: as 8 bits, times one bf16 scale of the row."""


@cache
def levels(bits: int) -> tuple[float, ...]:
    """The code book, sorted, exact in fp32; of Python numbers, so that nothing fake is remembered."""
    with unset_fake_temporarily(), torch.device("cpu"):
        return tuple(normal_float(bits).tolist())


class NormalGrid(Grid):
    def __init__(self, bits: int, dtype: torch.dtype):
        self.bits, self.parameters, self.table = bits, {"scale": dtype}, levels(bits)

    def fit(self, groups):
        if self.parameters["scale"] == torch.uint8:
            return {"scale": groups.abs().amax(-1).round().clamp(1, 255).to(torch.uint8)}
        return {"scale": positive(groups.abs().amax(-1), self.parameters["scale"])}

    def encode(self, values, parameters):
        book = torch.tensor(self.table, device=values.device)
        unit = (values / parameters["scale"].float().unsqueeze(-1)).clamp(-1, 1).contiguous()
        return torch.bucketize(unit, (book[:-1] + book[1:]) / 2, out_int32=True).to(torch.uint8)

    def scale_of(self, parameters):
        return parameters["scale"].float()


@register("storage", "nf", config=NormalFloat, title="NormalFloat groups", lossless=False, paper="2305.14314",
          summary="2 to 8-bit quantiles of a normal distribution in groups of 64 along the input: 4.25 bits a weight at 4")
class NormalFloatStorage(GroupStorage):
    trainable_leaves = ("scale",)
    recodes = True

    @classmethod
    def grid(cls, config):
        return NormalGrid(config.bits, SCALES.get(config.scale_dtype, torch.uint8))

    @classmethod
    def prescale(cls, weight, config):
        if config.scale_dtype != "int8":
            return None
        room = 1 if config.calibration["method"] == "rtn" else 2
        return positive(weight.abs().amax(1, keepdim=True).float() * room / 255, torch.bfloat16)
