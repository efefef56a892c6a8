"""FP8 weights: E4M3 or E5M2 bytes with one float scale per output row, per group along the input, or per block of rows and inputs.

    scale = max|w| / top,   code = float8(clamp(w / scale, -top, top)),   D(W) = code scale,   top = 448 (E4M3) or 57344 (E5M2)

with w the weights that share a scale: `group_size` inputs (-1, the default: a whole row) of `block_rows` rows (1, the default). The
published "FP8 block" checkpoints have 128 of 128. At the edges of a matrix blocks are short. Codes are the bytes of torch's float8
types, rounded to the nearest, ties to even; the clamp is explicit, since E5M2 casts overflow to infinity, and E4M3 casts saturate
or give NaN depending on the version of torch.

Bits a weight: 8 + s / (group_size block_rows), s = 32 bits of an fp32 scale (the default), 16 otherwise.

Departures from the official code of ZeroQuant-FP (arXiv 2307.09782, the FP8 of DeepSpeed): OCP's 448 and 57344 in place of 480 and
114688, subnormal numbers are used, ties go to even.
"""

from __future__ import annotations

import math
import struct
from typing import Literal

import torch
from pydantic import Field, model_validator

from ..registry import register
from ._groups import Grid, GroupConfig, GroupStorage
from ._scales import SCALES, positive
from .base import check_weight

TYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def _value(kind: str, code: int) -> float:
    """In plain Python: a module may be imported where new tensors are fake."""
    if kind == "e5m2":  # the upper byte of an fp16
        return struct.unpack("<e", bytes((0, code)))[0]
    sign, exponent, mantissa = -1.0 if code > 127 else 1.0, code >> 3 & 15, code & 7
    if code & 127 == 127:
        return math.nan
    return sign * ((1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent else mantissa * 2.0**-9)


VALUES = {kind: tuple(_value(kind, code) for code in range(256)) for kind in TYPES}


class FP8(GroupConfig):
    group_size: int = Field(-1, ge=-1, description="weights along the input that share a scale; -1: a whole row")
    format: Literal["e4m3", "e5m2"] = "e4m3"
    """e4m3: three bits of mantissa, to 448; e5m2: two, to 57344."""
    block_rows: int = Field(1, ge=1, description="rows that share a scale; 128 with group_size 128 for block checkpoints")
    scale_dtype: Literal["fp16", "bf16", "fp32"] = "fp32"

    @model_validator(mode="after")
    def _one_row_at_a_time(self):
        if self.block_rows > 1 and self.calibration["method"] != "rtn":
            raise ValueError("with block_rows above 1 rows share scales, which a calibration fits row by row; choose calibration: rtn")
        return self


class FP8Grid(Grid):
    bits = 8

    def __init__(self, kind: str, scale_dtype: str):
        self.type, self.top = TYPES[kind], torch.finfo(TYPES[kind]).max
        self.parameters, self.table = {"scale": SCALES[scale_dtype]}, VALUES[kind]

    def fit(self, groups):
        return {"scale": positive(groups.abs().amax(-1) / self.top, self.parameters["scale"])}

    def encode(self, values, parameters):
        unit = values / parameters["scale"].float().unsqueeze(-1)
        return unit.clamp(-self.top, self.top).to(self.type).view(torch.uint8)

    def scale_of(self, parameters):
        return parameters["scale"].float()


@register("storage", "fp8", config=FP8, title="FP8 weights (E4M3, E5M2)", lossless=False, paper="2307.09782",
          summary="8-bit floats with a scale per row, group or 128 x 128 block: 8 bits a weight and 32 a row",
          bibtex="@article{wu2023zeroquantfp, title={ZeroQuant-FP: A Leap Forward in LLMs Post-Training W4A8 Quantization Using "
                 "Floating-Point Formats}, author={Wu, Xiaoxia and Yao, Zhewei and He, Yuxiong}, journal={arXiv:2307.09782}, "
                 "year={2023}}")
class FP8Storage(GroupStorage):
    """Leaves: `codes` (out, in), `scale` (ceil(out / block_rows), groups)."""

    @classmethod
    def grid(cls, config):
        return FP8Grid(config.format, config.scale_dtype)

    @classmethod
    @torch.no_grad()
    def from_weight(cls, weight, config, *, bias=None, dtype=None, statistics=None, generator=None):
        if config.block_rows == 1:
            return super().from_weight(weight, config, bias=bias, dtype=dtype, statistics=statistics, generator=generator)
        check_weight(weight, "fp8 storage")
        quantizer, codes, scales = cls.quantizer(config, weight.shape[1]), [], []
        for rows in weight.split(config.block_rows):
            rows = rows.float()
            # the extremes of the block's rows, as one row of it
            scales.append(quantizer.fit(rows.abs().amax(0, keepdim=True))["scale"])
            codes.append(quantizer.encode(rows, {"scale": scales[-1].expand(len(rows), -1)}))
        return cls(*weight.shape, config, {"codes": torch.cat(codes), "scale": torch.cat(scales)}, bias, dtype or weight.dtype)

    @classmethod
    def joined(cls, parts):
        """Where a block would reach over the seam of two parts, all blocks are cut into lower ones that do not."""
        step = math.gcd(*(part.options.block_rows for part in parts), *(part.out_features for part in parts[:-1]))
        return super().joined([part._in_blocks_of(step) for part in parts])

    @torch.no_grad()
    def _in_blocks_of(self, step: int) -> FP8Storage:
        """The same in blocks of fewer rows, a divisor of those of now."""
        leaves, now = self.leaves(), self.options.block_rows
        scale = leaves["scale"].repeat_interleave(now // step, 0)[: -(-self.out_features // step)]
        options = self.options.model_copy(update={"block_rows": step})
        return type(self)(self.out_features, self.in_features, options, {**leaves, "scale": scale}, None, self.compute_dtype)

    def _parameter(self, name, value, rows):
        step = self.options.block_rows
        if step == 1:
            return value[rows]
        return value[rows.start // step: -(-rows.stop // step)].repeat_interleave(step, 0)[rows.start % step:][: rows.stop - rows.start]
