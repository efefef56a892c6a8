"""The contract of a calibration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ...errors import UsageError
from ...modeling.protocols import has_values
from ...registry import MethodConfig, lookup, make_config
from .statistics import InputStatistics

if TYPE_CHECKING:
    from .._groups import GroupQuantizer

#: weights in fp32 at a time, where a method works row by row
PIECE = 1 << 22


@dataclass
class Calibrated:
    """codes (out, in) uint8; parameters {name: (out, groups)} of the grid; input_scale (in,) fp16: D(W) is divided by it; channels
    (2, in): of storage/_channels.py, the codes are of the reassembled weight; input_shift (in,) fp16: taken off inputs before they are
    rounded, and D(W) times it added to the outputs."""

    codes: Tensor
    parameters: dict[str, Tensor]
    input_scale: Tensor | None = None
    channels: Tensor | None = None
    input_shift: Tensor | None = None


class Calibration:
    """Subclasses implement `calibrate`. needs: names of the statistics that it reads (see InputStatistics); a property where it
    depends on the options, and so may `scales_input` be."""

    needs: ClassVar[frozenset[str]] = frozenset()
    scales_input: ClassVar[bool] = False
    """Whether the result has an `input_scale`."""
    reassembles: ClassVar[bool] = False
    """Whether the result has `channels`."""
    windowed: ClassVar[bool] = False
    """Whether it can train the weights of several blocks on their common output: it then has `student`, `distances`, `weights` and the
    options `window` and `steps`; see windows.py. Its `calibrate` returns `statistics.found` where a window found the codes."""
    student_needs: ClassVar[frozenset[str]] = frozenset()
    """Statistics of what dense blocks give a map that `student` reads."""
    said_beside: ClassVar[bool] = False
    """Whether what a window trains is only turned into codes at its end, so that the run should note what that costs."""

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
        if has_values(found) and not torch.isfinite(found).all():
            raise UsageError("the inputs of a layer are NaN or infinite", remedy="calibrate in fp32, or with other data")
        return found


def calibration_of(options: dict[str, Any]) -> Calibration:
    """{method, options} -> the calibration."""
    options = dict(options)
    name = options.pop("method")
    return lookup("calibration", name).cls(make_config("calibration", name, **options))


def in_pieces(weight: Tensor, calibrate: Callable[[Tensor, slice], Calibrated]) -> Calibrated:
    """calibrate(rows in fp32, which rows) for a piece of weight (out, in) after the other, joined: for methods whose rows do not know
    of each other."""
    step = max(1, PIECE // weight.shape[1])
    found = [calibrate(weight[start: start + step].float(), slice(start, min(start + step, len(weight))))
             for start in range(0, len(weight), step)]
    if len(found) == 1:
        return found[0]
    parameters = {name: torch.cat([each.parameters[name] for each in found]) for name in found[0].parameters}
    return Calibrated(torch.cat([each.codes for each in found]), parameters, found[0].input_scale)
