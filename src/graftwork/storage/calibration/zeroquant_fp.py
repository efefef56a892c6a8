"""ZeroQuant-FP's scales: powers of two, or powers of two of one scale a row (arXiv 2307.09782).

So that a code can be cast to a wider float by moving its exponent. With S the scale a format would give a group:

    m1:  2^ceil(log2 S)
    m2:  S_max / 2^floor(log2(S_max / S)),   S_max the largest scale of the row

put in place of S before any weight is rounded, so that an inner calibration (GPTQ's loop, or the nearest codes) makes up for what it
costs. Neither loses range: the new scale is in [S, 2S). The paper's m2 rounds the exponent up, which gives (S/2, S] and cuts a group's
largest weights to as little as half; `clip` does that (and floor for m1). A zero point is moved so that the middle of the range stays:
zero <- L/2 - (L/2 - zero) S / new, L = 2^b - 1.

Bits a weight: the format's: scales stay in its scale_dtype, in which these are exact (8 bits of exponent would do for m1). Where m2 would
fall below the smallest normal number of that type, the exponent stops there.
Departures: S_max is of the weights before the loop, since the loop meets the groups one after the other; a group that it corrects to
more gets a multiple. The low-rank compensation and the float grids of the paper are formats, not calibrations.
Oracle: the definition in float64 (tests/oracles/test_calibration_zeroquant_fp.py).
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from pydantic import field_validator

from ...errors import UsageError
from ...registry import MethodConfig, register
from .._groups import CalibrationOptions, Grid
from .base import Calibration, calibration_of, in_pieces


class ZeroQuantFP(MethodConfig):
    constraint: Literal["m1", "m2"] = "m1"
    """m1: every scale a power of two; m2: the scales of a row powers of two apart."""
    clip: bool = False
    """Round scales down and cut the largest weights, where they are otherwise rounded up."""
    inner: CalibrationOptions = {"method": "gptq"}
    """What finds the codes under these scales: gptq or rtn, with its options."""

    @field_validator("inner")
    @classmethod
    def _known(cls, value):
        if value["method"] not in ("gptq", "rtn"):
            raise ValueError(f"'{value['method']}' sets scales itself; inner: gptq or rtn")
        return value


@register("calibration", "zeroquant_fp", config=ZeroQuantFP, title="ZeroQuant-FP scales", paper="2307.09782",
          summary="scales held to powers of two before rounding, inside GPTQ or the nearest",
          bibtex="@article{wu2023zeroquantfp, title={ZeroQuant-FP: A Leap Forward in LLMs Post-Training W4A8 Quantization Using "
                 "Floating-Point Formats}, author={Wu, Xiaoxia and Yao, Zhewei and He, Yuxiong}, journal={arXiv:2307.09782}, year={2023}}")
class ZeroQuantFPCalibration(Calibration):
    def __init__(self, config):
        super().__init__(config)
        self.inner = calibration_of(config.inner)
        self.needs = self.inner.needs

    def calibrate(self, weight, quantizer, statistics):
        self._check(quantizer)
        if self.config.inner["method"] == "rtn":  # pieces here, as the largest scales are of their rows
            return in_pieces(weight, lambda rows, _: self.inner.calibrate(rows, self._held(rows, quantizer), statistics))
        return self.inner.calibrate(weight, self._held(weight, quantizer), statistics)

    def shapes(self, weight, quantizer):
        self._check(quantizer)
        return super().shapes(weight, quantizer)

    def _check(self, quantizer):
        scale = quantizer.grid.parameters.get("scale")
        if scale is None or not scale.is_floating_point:
            raise UsageError("calibration 'zeroquant_fp' holds the float scales of groups to powers of two, and this format has none",
                             remedy="a format whose groups have one (int4, or fp4 with scale: fp16), or calibration: gptq")

    def _held(self, weight, quantizer):
        largest = None
        if self.config.constraint == "m2":
            largest = torch.cat([quantizer.fit(rows.float())["scale"].float().amax(1) for rows in weight.split(1024)])
        return dataclasses.replace(quantizer, grid=_PowerGrid(quantizer.grid, largest, self.config.clip))


class _PowerGrid(Grid):
    """A grid whose scales are powers of two times `largest` (rows,) of their row, or times 1."""

    def __init__(self, grid: Grid, largest: torch.Tensor | None, clip: bool):
        self.grid, self.largest, self.clip = grid, largest, clip
        self.bits, self.parameters, self.encode, self.decode = grid.bits, grid.parameters, grid.encode, grid.decode

    def fit(self, groups):
        found = self.grid.fit(groups)
        scale, dtype = found["scale"].float(), self.parameters["scale"]
        kind = torch.finfo(dtype)
        if self.largest is None:
            least = torch.full_like(scale, max(kind.smallest_normal * kind.eps, 2.0**-126))  # a power of two is exact below normal, too
            held = power_of_two(scale, up=not self.clip).maximum(least).minimum(power_of_two(torch.full_like(scale, kind.max), up=False))
        else:
            base = self.largest.view(-1, *[1] * (scale.dim() - 1))
            least = power_of_two(kind.smallest_normal / base, up=True).clamp(max=1)
            most = power_of_two((kind.max / base).clamp(max=2.0**126), up=False)
            held = base * power_of_two(scale / base, up=not self.clip).maximum(least).minimum(most)
        found = {**found, "scale": held.to(dtype)}
        if "zero" in found:
            middle, dtype = (2**self.bits - 1) / 2, self.parameters["zero"]
            zero = middle - (middle - found["zero"].float()) * scale / held
            found["zero"] = zero.to(dtype) if dtype.is_floating_point else zero.round().clamp(0, 2 * middle).to(dtype)
        return found


def power_of_two(x: torch.Tensor, up: bool) -> torch.Tensor:
    """The power of two next to x > 0 (fp32), above or below; exact, built from the exponent's bits."""
    part, exponent = torch.frexp(x)
    exponent = torch.where(part == 0.5, exponent - 1, exponent) if up else exponent - 1
    return ((exponent.clamp(-126, 127) + 127).int() << 23).view(torch.float32)
