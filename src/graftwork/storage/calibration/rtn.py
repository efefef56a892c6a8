"""Round to nearest: the parameters of every group from its own extremes, every weight to the nearest code. No data."""

from __future__ import annotations

import torch
from torch import Tensor

from ...registry import MethodConfig, register
from .base import Calibrated, Calibration

#: weights in fp32 at a time
PIECE = 1 << 22


class RTN(MethodConfig):
    """No options."""


@register("calibration", "rtn", config=RTN, title="Round to nearest", summary="each weight to the nearest code of its group; no data",
          aliases=("nearest",))
class RTNCalibration(Calibration):
    def calibrate(self, weight, quantizer, statistics):
        codes, parameters = [], []
        for rows in weight.split(max(1, PIECE // weight.shape[1])):
            rows = rows.float()
            parameters.append(quantizer.fit(rows))
            codes.append(quantizer.encode(rows, parameters[-1]))
        return Calibrated(torch.cat(codes), {name: _joined([each[name] for each in parameters]) for name in parameters[0]})


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
