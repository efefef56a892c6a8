"""Formats whose weights are coded one by one, in groups along the input that share a few numbers (a scale, a zero point, ...).

W (out, in) is cut, row by row, into groups of g; the last group of a row may be short. A **grid** says what a group's numbers are
(`fit`) and how values become codes (`encode`, `decode`); a **calibration** (storage/calibration) says which codes and numbers
a matrix gets, given how its inputs are distributed; this file keeps the result:

    codes (out, ceil(in b / 8)) bytes;   every parameter of the grid (out, ceil(in / g));   input_scale (in,) fp16 with AWQ

    D(W) = decode(codes, parameters) / input_scale
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BeforeValidator, Field
from torch import Tensor

from ..modeling.protocols import has_values
from ..registry import lookup, make_config
from ._coded import CodedStorage
from ._packing import pack, unpack
from .base import StorageConfig, check_weight


def _mapping(value: Any) -> Any:
    return {"method": value} if isinstance(value, str) else value


def _resolved(value: dict[str, Any]) -> dict[str, Any]:
    options = dict(value)
    name = lookup("calibration", options.pop("method", "rtn")).name
    return {"method": name, **make_config("calibration", name, **options).model_dump()}


#: a name or {method, options}; kept as {method, all options}
CalibrationOptions = Annotated[dict[str, Any], BeforeValidator(_mapping), AfterValidator(_resolved)]


class GroupConfig(StorageConfig):
    group_size: int = Field(64, ge=-1, description="weights along the input that share a scale; -1: a whole row")
    calibration: CalibrationOptions = {"method": "rtn"}
    """How codes are found: rtn (the nearest), or a method that reads calibration data."""


class Grid:
    """The values that the weights of a group may take. Stateless but for its options; every method works on any leading shape, and
    on fake tensors.

    parameters: {name: dtype} of what a group keeps, in the order of `fit`'s result."""

    bits: int
    parameters: dict[str, torch.dtype]

    def fit(self, groups: Tensor) -> dict[str, Tensor]:
        """groups (..., g) fp32 -> {name: (...)} in the dtypes of `parameters`: already as they are kept."""
        raise NotImplementedError

    def encode(self, values: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """values (..., m) fp32 under parameters (...) -> codes (..., m) uint8 of the nearest grid values."""
        raise NotImplementedError

    def decode(self, codes: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """The inverse, fp32 (..., m); differentiable in float parameters."""
        raise NotImplementedError


@dataclass(frozen=True)
class GroupQuantizer:
    """A grid over the groups of matrices of `columns` columns: what calibrations are given."""

    grid: Grid
    group: int
    columns: int

    @property
    def groups(self) -> int:
        return -(-self.columns // self.group)

    def split(self, weight: Tensor) -> Tensor:
        """(rows, columns) -> (rows, groups, group); a short last group is filled with its last column, which changes no extreme."""
        if short := -self.columns % self.group:
            weight = torch.cat([weight, weight[:, -1:].expand(-1, short)], 1)
        return weight.reshape(weight.shape[0], self.groups, self.group)

    def join(self, groups: Tensor) -> Tensor:
        """The inverse: (rows, groups, group) -> (rows, columns)."""
        return groups.flatten(1)[:, : self.columns]

    def fit(self, weight: Tensor) -> dict[str, Tensor]:
        """weight (rows, columns) fp32 -> {name: (rows, groups)}."""
        return self.grid.fit(self.split(weight))

    def encode(self, weight: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """-> codes (rows, columns) uint8."""
        return self.join(self.grid.encode(self.split(weight), parameters))

    def decode(self, codes: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """-> (rows, columns) fp32."""
        return self.join(self.grid.decode(self.split(codes), parameters))

    def nearest(self, weight: Tensor) -> Tensor:
        """D(Q(weight)) with parameters fitted to it."""
        parameters = self.fit(weight)
        return self.decode(self.encode(weight, parameters), parameters)


class GroupStorage(CodedStorage):
    """Subclasses give `grid(config)`."""

    @classmethod
    def grid(cls, config: GroupConfig) -> Grid:
        raise NotImplementedError

    @classmethod
    def quantizer(cls, config: GroupConfig, columns: int) -> GroupQuantizer:
        group = columns if config.group_size < 1 else min(config.group_size, columns)
        return GroupQuantizer(cls.grid(config), group, columns)

    @classmethod
    def needs(cls, config):
        return lookup("calibration", config.calibration["method"]).cls.needs

    @classmethod
    @torch.no_grad()
    def from_weight(cls, weight, config, *, bias=None, dtype=None, statistics=None, generator=None):
        from .calibration.base import calibration_of

        check_weight(weight, f"{cls.method} storage")
        quantizer, calibration = cls.quantizer(config, weight.shape[1]), calibration_of(config.calibration)
        if has_values(weight):
            found = calibration.calibrate(weight, quantizer, statistics)
        else:
            found = calibration.shapes(weight, quantizer)
        leaves = {"codes": pack(found.codes, quantizer.grid.bits), **found.parameters}
        if found.input_scale is not None:
            leaves["input_scale"] = found.input_scale
        return cls(*weight.shape, config, leaves, bias, dtype or weight.dtype)

    def decode(self, leaves, rows):
        quantizer = self.quantizer(self.options, self.in_features)
        codes = unpack(leaves["codes"][rows], self.in_features, quantizer.grid.bits)
        dense = quantizer.decode(codes, {name: leaves[name][rows] for name in quantizer.grid.parameters})
        return dense if "input_scale" not in leaves else dense / leaves["input_scale"].float()
