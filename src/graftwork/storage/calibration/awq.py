"""AWQ: input channels that see large activations are scaled up before rounding (arXiv 2306.00978).

With a (in,) the mean |x| of every input, X (n, in) sampled inputs and W (out, in):

    s = max(a^rho, 1e-4) / sqrt(largest * smallest of it),   D(W) = decode(codes of W diag(s)) / s,
    rho in {0, 1/20, ..., 19/20} with the least |X (W - D(W))^T|^2

and then, for every group, the range max|w| (1 - i/20), i < 10, whose error of the group's own part of the outputs is least. s is kept
beside the codes as `input_scale` (fp16) and divides the decoded weight.

Bits a weight: the format's + 16/out.
Departures: the paper folds 1/s into the norm or map before and picks rho by the error of a whole block; here nothing outside the
layer changes, so that q, k, v and maps without a norm before them are all treated alike, and rho is picked by the layer's own outputs.
The official code leaves the ranges of q and k alone (their outputs meet in a product): give those a storage with `clip: false`. A
range is taken only where it is better than the whole one. s is rounded to fp16 before it is judged. An input that was always 0 counts
as an average one: its weights would otherwise be divided by almost nothing.
Oracle: the definition written out in float64 (tests/oracles/test_calibration_awq.py).
"""

from __future__ import annotations

import torch
from pydantic import Field

from ...registry import MethodConfig, register
from .base import PIECE, Calibrated, Calibration, in_pieces


class AWQ(MethodConfig):
    scale: bool = True
    """Search the scale of the inputs."""
    steps: int = Field(20, ge=1, description="exponents tried: 0, 1/steps, ..., 1 - 1/steps")
    clip: bool = True
    """Search the range of every group."""


@register("calibration", "awq", config=AWQ, title="AWQ", paper="2306.00978",
          summary="inputs scaled by a power of their mean size before rounding, then the range of every group searched",
          bibtex="@inproceedings{lin2024awq, title={AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and "
                 "Acceleration}, author={Lin, Ji and Tang, Jiaming and Tang, Haotian and Yang, Shang and Chen, Wei-Ming and Wang, "
                 "Wei-Chen and Xiao, Guangxuan and Dang, Xingyu and Gan, Chuang and Han, Song}, booktitle={MLSys}, year={2024}}")
class AWQCalibration(Calibration):
    @property
    def needs(self):
        if self.config.scale:
            return frozenset({"samples", "mean_abs"})
        return frozenset({"samples"} if self.config.clip else ())

    @property
    def scales_input(self):
        return self.config.scale

    def calibrate(self, weight, quantizer, statistics):
        scale = wide = moments = None
        if self.needs:
            samples = self.statistic(statistics, "samples").to(weight.device)
        if self.config.scale:
            scale = self._scale(weight, quantizer, samples, self.statistic(statistics, "mean_abs").to(weight.device))
            wide = scale.float()
        if self.config.clip:
            inputs = samples if wide is None else samples / wide
            padded = torch.nn.functional.pad(inputs, (0, -inputs.shape[1] % quantizer.group)).view(len(inputs), quantizer.groups, -1)
            moments = torch.einsum("ngi,ngj->gij", padded, padded)

        def part(rows, _):
            rows = rows if wide is None else rows * wide
            parameters = quantizer.fit(rows) if moments is None else clipped(quantizer, rows, moments)
            return Calibrated(quantizer.encode(rows, parameters), parameters, scale)

        return in_pieces(weight, part)

    def _scale(self, weight, quantizer, samples, size):
        seen = size[size > 0]
        size = torch.where(size > 0, size, seen.mean() if len(seen) else torch.ones_like(size))
        best, least, kinds = None, None, torch.finfo(torch.float16)
        for step in range(self.config.steps):
            scale = size.pow(step / self.config.steps).clamp(min=1e-4)
            scale = (scale / (scale.max() * scale.min()).sqrt()).clamp(kinds.tiny, kinds.max).half()
            wide, loss = scale.float(), 0.0
            for rows in weight.split(max(1, PIECE // weight.shape[1])):
                rows = rows.float()
                loss = loss + (samples @ (rows - quantizer.nearest(rows * wide) / wide).T).double().square().sum()
            if least is None or loss < least:
                best, least = scale, loss
        return best


def clipped(quantizer, rows, moments):
    """rows (n, in), moments (groups, g, g) of the inputs -> the grid's parameters for the best range of each group."""
    groups, best = quantizer.split(rows), quantizer.fit(rows)
    whole = groups.abs().amax(-1, keepdim=True)

    def loss(parameters):
        off = groups - quantizer.grid.decode(quantizer.grid.encode(groups, parameters), parameters)
        return (torch.einsum("rgi,gij->rgj", off, moments) * off).sum(-1)

    least = loss(best)
    for step in range(1, 10):
        limit = whole * (1 - step / 20)
        tried = quantizer.fit(quantizer.join(groups.clamp(-limit, limit)))
        now = loss(tried)
        better = now < least
        least = torch.where(better, now, least)
        best = {name: torch.where(better, tried[name], value) for name, value in best.items()}
    return best
