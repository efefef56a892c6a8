"""OliVe: pairs of 4-bit codes, in which an outlier takes the code of its neighbor, the victim (arXiv 2304.07493).

W (out, in) is cut along the input into groups (-1, the default: a row) and these into pairs. In units of the group's scale

    normal values     int: {0, +-1 ... +-7}      flint: {0, +-1, +-2, +-3, +-4, +-6, +-8, +-16} / 2
    outliers          sign (2 + m) 2^(e + 2), e = 0 ... 3, m = 0, 1, without (0, 0): +-{12, 16, 24, 32, 48, 64, 96}

Every weight goes to the nearest of both. Where the first of a pair is an outlier, or
else the second, its partner is 0 and is coded as 1000b, which no other weight has; the outlier's own four bits are its sign and
2 e + m. So one byte a pair is read alone, without an index.

    scale = r max(|mu + 3 sigma|, |mu - 3 sigma|) / top,  r = 0.75, 0.77, ... `widest`;   top = 7 or 8

with mu and sigma of the group and the r whose squared error after victims are zeroed is least.

Bits a weight: 4 + 16 / g; a row of odd length is padded by one weight.

Departures: pairs lie along the input, never across rows; the search of the official code judges errors before victims are zeroed;
int or flint is an option and not searched for; 8-bit pairs, of which paper and code tell different things, are left out.
A pair is coded as one, so calibrations that go column by column are refused.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from ..modeling.protocols import has_values
from ..registry import register
from ._groups import Grid, GroupConfig, GroupQuantizer, GroupStorage
from ._packing import look_up
from ._scales import positive

VICTIM = 8
NORMAL = {"int": (0, 1, 2, 3, 4, 5, 6, 7), "flint": (0, 0.5, 1, 1.5, 2, 3, 4, 8)}
#: by the code without its sign; 0 is no outlier
OUTLIER = (0, 12, 16, 24, 32, 48, 64, 96)
#: weights whose scales are searched at a time, few enough for a cache
PIECE = 1 << 16


class OliVe(GroupConfig):
    group_size: int = Field(-1, ge=-1, description="weights along the input that share a scale, an even number; -1: a whole row")
    normal: Literal["int", "flint"] = "int"
    """Values of the weights that are no outliers: evenly spaced, or denser near 0."""
    widest: int = Field(250, ge=75, description="percent of three standard deviations up to which ranges are tried, from 75 in steps of 2")

    @field_validator("group_size")
    @classmethod
    def _pairs(cls, value: int) -> int:
        if value % 2 and value != -1 or value == 0:
            raise ValueError("must be even, since weights are coded in pairs (or -1: a whole row)")
        return value


class OliVeGrid(Grid):
    bits = 4
    joint = "its codes hang on the neighbor within a pair, and columns would be coded one at a time"

    def __init__(self, normal: str, widest: int):
        self.normal, self.widest = NORMAL[normal], widest
        self.parameters = {"scale": torch.float16}

    def fit(self, groups):
        flat, found = groups.reshape(-1, groups.shape[-1]), []
        for part in flat.split(max(1, PIECE // groups.shape[-1])):
            size, wide, best = part.abs(), part.mean(-1).abs() + 3 * part.std(-1, correction=0), None
            for percent in range(75, (self.widest if has_values(groups) else 75) + 1, 2):
                scale = positive(wide * (percent / 100 / max(self.normal)), torch.float16)
                place, _, victims = self._nearest(part, scale)
                near = self._magnitudes(part.device).index_select(0, place.view(-1)).view(part.shape).masked_fill_(victims, 0)
                error = near.mul_(scale.float().unsqueeze(-1)).sub_(size).square_().sum(-1)
                if best is None:
                    best, least = scale, error
                else:
                    best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
            found.append(best)
        return {"scale": torch.cat(found).view(groups.shape[:-1])}

    def _magnitudes(self, device):
        return torch.tensor([*self.normal, *OUTLIER[1:]], dtype=torch.float32, device=device)

    def _nearest(self, values, scale):
        """Index of the nearest magnitude, whether it is an outlier's, and whether the partner's is and takes precedence."""
        every = self._magnitudes(values.device)
        size = (values / scale.float().unsqueeze(-1)).abs_()
        place = torch.bucketize(size.contiguous(), (every[:-1] + every[1:]) / 2, out_int32=True)
        outlier = place >= len(self.normal)
        first, second = _pair(outlier)
        return place, outlier, torch.stack([second & ~first, first], -1).view(values.shape)

    def encode(self, values, parameters):
        place, outlier, victims = self._nearest(values, parameters["scale"])
        low = torch.where(outlier, place - (len(self.normal) - 1), place)
        return torch.where(victims, VICTIM, low + 8 * ((values < 0) & (low > 0))).to(torch.uint8)

    def decode(self, codes, parameters):
        victim = codes == VICTIM
        first, second = _pair(victim)
        outlier = torch.stack([second, first], -1).view(codes.shape)
        index = codes + 16 * outlier.to(torch.uint8)
        table = [*_signed(self.normal), *_signed(OUTLIER)]
        table[VICTIM] = table[16 + VICTIM] = 0
        values = look_up(index.view(1, -1), index.numel(), 8, tuple(table)).view(codes.shape)
        return values * parameters["scale"].float().unsqueeze(-1)


def _pair(values: Tensor) -> tuple[Tensor, Tensor]:
    """(..., 2 n) -> the first and the second of every pair, (..., n) each."""
    pairs = values.reshape(*values.shape[:-1], -1, 2)
    return pairs[..., 0], pairs[..., 1]


def _signed(magnitudes):
    return [*magnitudes, *(-value for value in magnitudes)]


@register("storage", "olive", config=OliVe, title="OliVe: outlier-victim pairs", lossless=False, paper="2304.07493",
          summary="4-bit pairs: an outlier uses its neighbor's code for a wide range, and the neighbor is 0: 4 bits a weight and 16 a row",
          bibtex="@inproceedings{guo2023olive, title={{OliVe}: Accelerating Large Language Models via Hardware-friendly Outlier-Victim "
                 "Pair Quantization}, author={Guo, Cong and Tang, Jiaming and Hu, Weiming and Leng, Jingwen and Zhang, Chen and Yang, "
                 "Fan and Liu, Yunxin and Guo, Minyi and Zhu, Yuhao}, booktitle={ISCA}, year={2023}}")
class OliVeStorage(GroupStorage):
    """Leaves: `codes` (out, ceil(in/2)), `scale` (out, groups) fp16."""

    @classmethod
    def grid(cls, config):
        return OliVeGrid(config.normal, config.widest)

    @classmethod
    def quantizer(cls, config, columns):
        columns += columns % 2
        return GroupQuantizer(cls.grid(config), columns if config.group_size < 1 else min(config.group_size, columns), columns,
                              config.activations)
