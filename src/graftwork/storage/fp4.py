"""FP4 weights in groups along the input: sign, and one of eight magnitudes times the group's scale.

    e2m1 (OCP):          {0, 1/2, 1, 3/2, 2, 3, 4, 6};            bnb (bitsandbytes "fp4"): {0, 1/16, 2, 3, 4, 6, 8, 12}
    scale = keep(max|w| / top),   code = nearest of +-book to w / scale,   D(W) = +-book[code] scale,   top = 6 or 12

with w of one group of g weights. A code is the sign in bit 3 and the magnitude below it, in the order of bit patterns that E2M1 and
bitsandbytes have. Ties go to the even E2M1 code, as in OCP casts, and to the smaller magnitude of the bnb book.

`scale`: fp16, bf16, fp32; **e8m0**, a power of two (MXFP4 with group_size 32), which cuts what is above 6 of them; **e4m3** (NVFP4
with group_size 16), E4M3 scales times one fp32 scale of the matrix, max|W| / (448 top). Other calibrations than rtn move weights, so
the matrix scale leaves them a factor of 2.

Bits a weight: 4 + s / g, s = 16, 32 or 8; e4m3 32 bits a matrix more.
Format: OCP Microscaling specification 1.0; grids and scales of ZeroQuant-FP (arXiv 2307.09782), without its constraints.
"""

from __future__ import annotations

from typing import Literal

import torch

from ..registry import register
from ._groups import Grid, GroupConfig, GroupStorage
from ._scales import E4M3_MAX, SCALES, keep_scale, positive, read_scale, scale_dtype

#: magnitudes by the low three bits of a code
BOOKS = {"e2m1": (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0), "bnb": (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)}


class FP4(GroupConfig):
    book: Literal["e2m1", "bnb"] = "e2m1"
    """e2m1: the OCP type; bnb: the "fp4" of bitsandbytes."""
    scale: Literal["fp16", "bf16", "fp32", "e4m3", "e8m0"] = "fp16"
    """How a group's scale is kept. NVFP4: e4m3, group_size 16; MXFP4: e8m0, group_size 32."""


class FP4Grid(Grid):
    bits = 4

    def __init__(self, book: str, scale: str):
        self.book, self.scale, self.top = BOOKS[book], scale, max(BOOKS[book])
        self.table = (*self.book, *(-value for value in self.book))
        self.parameters = {"scale": scale_dtype(scale)}

    def fit(self, groups):
        return {"scale": keep_scale(groups.abs().amax(-1), self.top, self.scale)}

    def encode(self, values, parameters):
        unit = (values / read_scale(parameters["scale"], self.scale).unsqueeze(-1)).contiguous()
        order = sorted(range(8), key=self.book.__getitem__)
        middles = torch.tensor([(self.book[low] + self.book[high]) / 2 for low, high in zip(order, order[1:])], device=values.device)
        if order == list(range(8)):  # a tie below an even code goes up to it
            middles[1::2] = middles[1::2].nextafter(torch.zeros(3, device=values.device))
        place = torch.bucketize(unit.abs(), middles, out_int32=True)
        codes = torch.tensor(order, dtype=torch.uint8, device=values.device)[place]
        return codes + 8 * unit.signbit().to(torch.uint8)

    def scale_of(self, parameters):
        return read_scale(parameters["scale"], self.scale)


@register("storage", "fp4", config=FP4, title="FP4 groups (E2M1, MXFP4, NVFP4, bitsandbytes fp4)", lossless=False,
          summary="4-bit floats in groups of 64 with fp16 scales: 4.25 bits a weight; scales may be E4M3 or powers of two",
          paper="2307.09782",
          bibtex="@article{wu2023zeroquantfp, title={ZeroQuant-FP: A Leap Forward in LLMs Post-Training W4A8 Quantization Using "
                 "Floating-Point Formats}, author={Wu, Xiaoxia and Yao, Zhewei and He, Yuxiong}, journal={arXiv:2307.09782}, "
                 "year={2023}}")
class FP4Storage(GroupStorage):
    """Leaves: `codes` (out, ceil(in/2)), `scale` (out, groups), with scale: e4m3 `outer_scale` (1, 1) fp32."""

    @classmethod
    def grid(cls, config):
        return FP4Grid(config.book, config.scale)

    @classmethod
    def prescale(cls, weight, config):
        if config.scale != "e4m3":
            return None
        room = 1 if config.calibration["method"] == "rtn" else 2
        return positive(weight.abs().amax().float() * room / (E4M3_MAX * max(BOOKS[config.book])), SCALES["fp32"]).view(1, 1)
