"""BitMoD: every group picks the best of four grids, made of FP3 or FP4 and one special value in place of -0 (arXiv 2411.11745).

    4 bits: {0, +-1, +-2, +-3, +-4, +-6, +-8, +-12} and one of 10, -10, 16, -16
    3 bits: {0, +-1, +-2, +-4}                      and one of 3, -3, 6, -6
    scale = keep(max|w| / max|grid|),   code = nearest of the grid to w / scale,   D(W) = grid[code] scale

with w a group of g weights along the input. max|grid| counts the special value; the selector is the one with the least squared error
(fp32, under the scale as it is kept), the first of equal ones in the order above. Codes count the grid's values from below, ties go
to the lower value. Selectors are packed, four a byte.

`scale: fp16` keeps scales as they are, `int8` as whole 255ths, 1 to 255, of one fp16 number a row, max|row| / (12 or 4). Other
calibrations than rtn move weights, so that number then leaves them a factor of 2.

Bits a weight: b + (16 + 2) / g, with int8 scales b + (8 + 2) / g + 16 / in (a row's selectors end at a byte).
Departures from the official code: errors in fp32 (in fp16 those of small weights are all equal); scales are not held above 1e-5.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from ..registry import register
from ._groups import Grid, GroupConfig, GroupStorage
from ._scales import positive

BASE = {4: (0, 1, 2, 3, 4, 6, 8, 12), 3: (0, 1, 2, 4)}
SPECIAL = {4: (10, -10, 16, -16), 3: (3, -3, 6, -6)}


class BitMoD(GroupConfig):
    group_size: int = Field(128, ge=-1, description="weights along the input that share a grid and a scale; -1: a whole row")
    bits: Literal[4, 3] = 4
    scale: Literal["fp16", "int8"] = "fp16"
    """fp16: a float a group; int8: 8 bits a group and a float a row."""


class BitMoDGrid(Grid):
    packed, choice = {"selector": 2}, "selector"

    def __init__(self, bits: int, scale: str):
        self.bits, self.whole = bits, scale == "int8"
        self.parameters = {"scale": torch.uint8 if self.whole else torch.float16, "selector": torch.uint8}
        base = [*BASE[bits], *(-value for value in BASE[bits][1:])]
        self.grids = [tuple(sorted([*base, special])) for special in SPECIAL[bits]]
        self.table = sum(self.grids, ())

    def _tables(self, device):
        """(4, 2**bits) fp32"""
        return torch.tensor(self.grids, dtype=torch.float32, device=device)

    def _kept(self, scale):
        return (scale * 255).round().clamp(1, 255).to(torch.uint8) if self.whole else positive(scale, torch.float16)

    def _scale(self, kept):
        return (kept.float() / 255 if self.whole else kept.float()).unsqueeze(-1)

    def fit(self, groups):
        largest, table, best = groups.abs().amax(-1), self._tables(groups.device), None
        for selector, grid in enumerate(table):
            kept = self._kept(largest / max(map(abs, self.grids[selector])))
            unit, scale = groups / self._scale(kept), self._scale(kept)
            error = ((grid[_below(unit, grid)] * scale - groups) ** 2).sum(-1)
            chosen = torch.full_like(kept, selector, dtype=torch.uint8)
            if best is None:
                least, best = error, (kept, chosen)
            else:
                better = error < least
                least = torch.where(better, error, least)
                best = tuple(torch.where(better, new, old) for new, old in zip((kept, chosen), best))
        return dict(zip(self.parameters, best))

    def encode(self, values, parameters):
        unit, selector, codes = values / self._scale(parameters["scale"]), parameters["selector"].unsqueeze(-1), None
        for index, grid in enumerate(self._tables(values.device)):
            found = _below(unit, grid).to(torch.uint8)
            codes = found if codes is None else torch.where(selector == index, found, codes)
        return codes

    def place(self, values, parameters):
        scale = self._scale(parameters["scale"])
        return values * scale if torch.is_grad_enabled() else values.mul_(scale)


def _below(unit: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Index of the nearest value of an ascending grid, ties to the lower."""
    return torch.bucketize(unit.contiguous(), (grid[:-1] + grid[1:]) / 2, out_int32=True)


@register("storage", "bitmod", config=BitMoD, title="BitMoD: the best of four extended FP3 or FP4 grids", lossless=False,
          summary="4 or 3 bits a weight, a special value chosen for every group of 128: 4.141 bits a weight",
          paper="2411.11745",
          bibtex="@inproceedings{chen2025bitmod, title={{BitMoD}: Bit-serial Mixture-of-Datatype {LLM} Acceleration}, author={Chen, "
                 "Yuzong and AbouElhamayed, Ahmed F. and Dai, Xilai and Wang, Yang and Andronic, Marta and Constantinides, George A. "
                 "and Abdelfattah, Mohamed S.}, booktitle={HPCA}, year={2025}}")
class BitMoDStorage(GroupStorage):
    """Leaves: `codes`, `scale` (out, groups), `selector` (out, ceil(groups/4)), with int8 scales `outer_scale` (out, 1) fp16."""

    @classmethod
    def grid(cls, config):
        return BitMoDGrid(config.bits, config.scale)

    @classmethod
    def prescale(cls, weight, config):
        if config.scale == "fp16":
            return None
        room = 1 if config.calibration["method"] == "rtn" else 2
        return positive(weight.abs().amax(1, keepdim=True).float() * room / max(BASE[config.bits]), torch.float16)
