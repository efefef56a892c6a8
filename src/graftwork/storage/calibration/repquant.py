"""RepQuant: inputs are brought to one scale by the weight, so that a single rounding step suits all channels (arXiv 2402.05628).

With m (in,) the largest |x| of every input channel, cut to c m where that rounds the channel's values better, at `bits` bits:

    s = c m / top,   r = s / mean(s),   x' = x / r,   W' = W diag(r):    W' x' = W x,   round(x' / mean(s)) = round(x / s)

so a step of its own for every channel becomes one step for all of them. `asymmetric` gives every channel a zero of its own too: with v
(in,) the middle between its least and largest value, the same is done to x - v, and as v is no input any more,

    W x = W' (x - v) / r + W v

where W v is computed with the decoded weight. v is kept as `input_shift` (fp16). W' is put into codes by the `inner` calibration, which
is given the statistics of x / r; r is kept beside the codes as `input_scale` (fp16), by which the storage divides its inputs before it
rounds them (`activations:` of a format) and its decoded weights where it does not. Made for rounded inputs: with float inputs it gains
nothing, since r moves all of the spread of the inputs into the weight.

Bits a weight: the inner calibration's, + 16/out, 32/out with `asymmetric`.
Departures: r and v stay at the layer and are not folded into the norm before it, so that maps without one, and RMSNorms, which have no
offset that could take up v, are treated alike. A zero is the middle of a channel's range, not a whole number of steps. The layer-wise step
mean(s) is not used: inputs are rounded token by token. The factors c are learned in the paper by a loss that is not known; here each is the
best of 1, 0.95, ..., 0.5 by squared error of its channel. The log-sqrt(2) quantizer of attention weights is no part of a linear map.
Oracle: the two identities, and the error with rounded inputs, in float64 (tests/oracles/test_calibration_repquant.py).
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from pydantic import Field, field_validator

from ...registry import MethodConfig, register
from .._groups import CalibrationOptions
from .base import Calibration, calibration_of


class RepQuant(MethodConfig):
    bits: int = Field(4, ge=2, le=8, description="of the inputs; says how far their largest values are cut")
    asymmetric: bool = False
    """Take the middle of its range off every channel before the rounding."""
    clip: bool = True
    """Cut the largest values of a channel where the others gain by it."""
    inner: CalibrationOptions = {"method": "gptq"}
    """What finds the codes of the scaled weight, with its options."""

    @field_validator("inner")
    @classmethod
    def _plain(cls, value):
        if calibration_of(value).scales_input:
            raise ValueError(f"'{value['method']}' scales the inputs itself; inner: rtn, gptq, adaquant or hqq")
        return value


@register("calibration", "repquant", config=RepQuant, title="RepQuant scales", paper="2402.05628",
          summary="a step for every input channel moved into the weight, so that inputs are rounded with one; for rounded inputs",
          bibtex="@article{li2024repquant, title={RepQuant: Towards Accurate Post-Training Quantization of Large Transformer Models via "
                 "Scale Reparameterization}, author={Li, Zhikai and Liu, Xuewen and Zhang, Jing and Gu, Qingyi}, "
                 "journal={arXiv:2402.05628}, year={2024}}")
class RepQuantCalibration(Calibration):
    scales_input = True

    def __init__(self, config):
        super().__init__(config)
        self.inner = calibration_of(config.inner)
        ends = {"low", "high"} if config.asymmetric else {"max_abs"}
        self.needs = self.inner.needs | ends | ({"samples"} if config.clip else set())

    def calibrate(self, weight, quantizer, statistics):
        kinds, middle = torch.finfo(torch.float16), None
        if self.config.asymmetric:
            low, high = (self.statistic(statistics, name).to(weight.device).float() for name in ("low", "high"))
            middle = ((low + high) / 2).clamp(-kinds.max, kinds.max).half()
            step = torch.maximum(high - middle.float(), middle.float() - low) * (high > low)
        else:
            step = self.statistic(statistics, "max_abs").to(weight.device).float()
        if self.config.clip:
            samples = self.statistic(statistics, "samples").to(weight.device)
            step = step * cuts(samples if middle is None else samples - middle.float(), step, self.config.bits)
        seen = step > 0
        ratio = torch.where(seen, step / step[seen].mean(), torch.ones_like(step))  # an input that was never seen stays as it is
        scale = ratio.clamp(kinds.tiny, kinds.max).half()
        wide = scale.float()
        found = self.inner.calibrate(weight.float() * wide, quantizer, self._scaled(statistics, wide))
        found.input_scale, found.input_shift = scale, middle
        return found

    def _scaled(self, statistics, scale):
        """The statistics of x / scale that the inner calibration reads."""
        found = {"hessian": None, "samples": None, "mean_abs": None, "max_abs": None}
        for name in self.inner.needs:
            value = self.statistic(statistics, name).to(scale.device)
            found[name] = value / scale if name != "hessian" else value / scale / scale[:, None]
        return SimpleNamespace(**found)

    def shapes(self, weight, quantizer):
        found = self.inner.shapes(weight, quantizer)
        found.input_scale = torch.empty(weight.shape[1], dtype=torch.float16, device=weight.device)
        found.input_shift = torch.empty_like(found.input_scale) if self.config.asymmetric else None
        return found


def cuts(samples, largest, bits: int):
    """(in,): the part of each channel's range (in,) under which its samples (n, in) are rounded best."""
    top, best, least = 2 ** (bits - 1) - 1, None, None
    for step in range(11):
        part = 1 - step / 20
        unit = (largest * part / top).clamp(min=1e-30)
        loss = ((samples / unit).round().clamp(-top, top) * unit - samples).square().sum(0)
        if best is None:
            best, least = torch.ones_like(loss), loss
        else:
            best, least = torch.where(loss < least, torch.full_like(best, part), best), torch.minimum(loss, least)
    return best
