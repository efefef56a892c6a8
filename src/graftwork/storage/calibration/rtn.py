"""Round to nearest: the parameters of every group from its own extremes, every weight to the nearest code. No data."""

from __future__ import annotations

from ...registry import MethodConfig, register
from .base import Calibrated, Calibration, in_pieces


class RTN(MethodConfig):
    """No options."""


@register("calibration", "rtn", config=RTN, title="Round to nearest", summary="each weight to the nearest code of its group; no data",
          aliases=("nearest",))
class RTNCalibration(Calibration):
    def calibrate(self, weight, quantizer, statistics):
        def nearest(rows, _):
            parameters = quantizer.fit(rows)
            return Calibrated(quantizer.encode(rows, parameters), parameters)

        return in_pieces(weight, nearest)
