"""HQQ: half-quadratic quantization, without data (Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023).

The scale of a group comes from its extremes; its float zero z is moved so that few weights are far off, which leaves outliers out of
account. With W (out, in) in groups, D(q) = s (q - z), the error term E is what an l_p norm (p < 1) would let pass:

    q = nearest codes under (s, z),   R = W - D(q),   E = sign(R) relu(|R| - |R|^(p-1) / beta),
    z <- z + mean over the group of (D(q) - W + E) / s,   beta <- kappa beta

at most `steps` times. It acts on formats that keep a float zero; others are refused.

Bits a weight: the format's, b + 32/g with fp16 scales and zeros.
Departures from the hqq package: the zero with the least mean |W - D(q)| is kept for every group (the package stops all of them when
the mean over the matrix rises, and returns the zero after that); zeros are judged as they are kept; beta grows by kappa (the
package has the number and leaves beta as it is). beta is in units of W, as there: for weights far below 1 E is 0 and a step is a
plain mean. Oracle: the hqq package (tests/oracles/test_calibration_hqq.py).
"""

from __future__ import annotations

import torch
from pydantic import Field

from ...errors import UsageError
from ...registry import MethodConfig, register
from .base import Calibrated, Calibration, in_pieces


class HQQ(MethodConfig):
    steps: int = Field(20, ge=1, description="largest number of updates of the zeros")
    p: float = Field(0.7, gt=0, le=1, description="of the norm of the error; less: outliers count for less")
    beta: float = Field(10.0, gt=0, description="first weight of the quadratic term, in units of 1 / weight^(2-p)")
    kappa: float = Field(1.01, ge=1, description="growth of beta a step")


@register("calibration", "hqq", config=HQQ, title="HQQ", summary="float zeros moved until few weights are far off; no data",
          bibtex="@misc{badri2023hqq, title={Half-Quadratic Quantization of Large Machine Learning Models}, author={Badri, Hicham and "
                 "Shaji, Appu}, year={2023}, url={https://mobiusml.github.io/hqq_blog/}}")
class HQQCalibration(Calibration):
    def _check(self, quantizer) -> None:
        zero = quantizer.grid.parameters.get("zero")
        if zero is None or not zero.is_floating_point:
            raise UsageError("calibration 'hqq' moves float zero points, and this format has " + ("none" if zero is None else "whole ones"),
                             remedy="zero_point: float (of int4, int3, int2, with symmetric: false), or calibration: gptq or awq")

    def shapes(self, weight, quantizer):
        self._check(quantizer)
        return super().shapes(weight, quantizer)

    def calibrate(self, weight, quantizer, statistics):
        self._check(quantizer)
        return in_pieces(weight, lambda rows, _: self._rows(rows, quantizer))

    def _rows(self, rows, quantizer):
        grid, groups = quantizer.grid, quantizer.split(rows)
        real = (torch.arange(quantizer.groups * quantizer.group, device=rows.device) < rows.shape[1]).view(quantizer.groups, -1).float()
        count, beta = real.sum(-1), self.config.beta
        tried = quantizer.fit(rows)
        best, least = dict(tried), None
        for _ in range(self.config.steps + 1):
            off = groups - grid.decode(grid.encode(groups, tried), tried)
            loss = (off.abs() * real).sum(-1)
            if least is None:
                least = loss
            else:
                better = loss < least
                if not better.any():
                    break
                least, best["zero"] = torch.where(better, loss, least), torch.where(better, tried["zero"], best["zero"])
            size = off.abs()
            let_pass = off.sign() * (size - size.pow(self.config.p - 1) / beta).clamp(min=0)
            step = ((let_pass - off) * real).sum(-1) / count / tried["scale"].float()
            tried = {**tried, "zero": (tried["zero"].float() + step).to(tried["zero"].dtype)}
            beta *= self.config.kappa
        return Calibrated(quantizer.join(grid.encode(groups, best)), best)
