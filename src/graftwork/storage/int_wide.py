"""INT5 to INT8 weights in groups along the input: the integer formats of intk.py with more bits.

    D(W) = scale (code - zero),   b + (16 + 8) / g bits a weight by default (see intk.py for the other zero points and scales)

For weights that 4 bits are too coarse for, and what adapters that train a quantizer of so many bits end in. (`int8` is another
format: its groups run over the ends of rows, its metadata is fp32, and its codes can train.)
"""

from __future__ import annotations

from pydantic import Field

from ..registry import register
from .intk import SCALES, IntConfig, IntGrid, IntStorage


class IntWide(IntConfig):
    """Options of int_wide."""

    bits: int = Field(6, ge=5, le=8)


@register("storage", "int_wide", config=IntWide, title="INT5 to INT8 groups", lossless=False,
          summary="5- to 8-bit integers in groups of 64 along the input: 6.375 bits a weight with 6")
class IntWideStorage(IntStorage):
    @property
    def bits(self):
        return self.options.bits

    @classmethod
    def grid(cls, config):
        return IntGrid(config.bits, config.symmetric, config.zero_point == "integer", SCALES[config.scale_dtype])
