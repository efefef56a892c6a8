"""The contract of a calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ...errors import UsageError
from ...registry import MethodConfig, lookup, make_config
from .statistics import InputStatistics

if TYPE_CHECKING:
    from .._groups import GroupQuantizer


@dataclass
class Calibrated:
    """codes (out, in) uint8; parameters {name: (out, groups)} of the grid; input_scale (in,) fp16: D(W) is divided by it."""

    codes: Tensor
    parameters: dict[str, Tensor]
    input_scale: Tensor | None = None


class Calibration:
    """Subclasses implement `calibrate`. needs: names of the statistics that it reads (see InputStatistics)."""

    needs: ClassVar[frozenset[str]] = frozenset()
    scales_input: ClassVar[bool] = False
    """Whether the result has an `input_scale`."""

    def __init__(self, config: MethodConfig):
        self.config = config

    def calibrate(self, weight: Tensor, quantizer: GroupQuantizer, statistics: InputStatistics | None) -> Calibrated:
        """weight (out, in), finite, any float dtype. Raises UsageError where statistics that it needs are missing."""
        raise NotImplementedError

    def shapes(self, weight: Tensor, quantizer: GroupQuantizer) -> Calibrated:
        """What `calibrate` returns, of the right shapes and dtypes: for weights without values."""
        parameters = quantizer.fit(weight.float())
        scale = torch.empty(weight.shape[1], dtype=torch.float16, device=weight.device) if self.scales_input else None
        return Calibrated(quantizer.encode(weight.float(), parameters), parameters, scale)

    def statistic(self, statistics: InputStatistics | None, name: str) -> Tensor:
        found = None if statistics is None else getattr(statistics, name)
        if found is None:
            raise UsageError(f"calibration '{self.method}' reads how the inputs of each layer are distributed, and there is no such data",
                             remedy="give calibration data (`graft quantize --calibration`, or a recipe with data), or calibration: rtn")
        return found


def calibration_of(options: dict[str, Any]) -> Calibration:
    """{method, options} -> the calibration."""
    options = dict(options)
    name = options.pop("method")
    return lookup("calibration", name).cls(make_config("calibration", name, **options))
