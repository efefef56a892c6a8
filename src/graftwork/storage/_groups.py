"""Formats whose weights are coded one by one, in groups along the input that share a few numbers (a scale, a zero point, ...).

W (out, in) is cut, row by row, into groups of g; the last group of a row may be short. A **grid** says what a group's numbers are
(`fit`) and how values become codes (`encode`, `decode`); a **calibration** (storage/calibration) says which codes and numbers
a matrix gets, given how its inputs are distributed; this file keeps the result:

    codes (out, ceil(in b / 8)) bytes;   every parameter of the grid (out, ceil(in / g));   input_scale (in,) fp16 with AWQ;
    channels (2, in) with QLLM (_channels.py); input_shift (in,) fp16 with RepQuant, which matters only to inputs that are rounded

    D(W) = decode(codes, parameters) / input_scale,   D(W) = decode(codes, parameters) M with channels

A format may keep one more scale, of a row or of the whole matrix (`prescale`): the grid then sees W / outer_scale. Its grid may keep
parameters in fewer than 8 bits (`packed`), and its codes may hang on their neighbors (`joint`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import AfterValidator, BeforeValidator, Field
from torch import Tensor

from ..errors import UsageError
from ..modeling.protocols import has_values
from ..registry import lookup, make_config
from . import _compiled
from ._activations import RoundedProduct, straight_through
from ._channels import columns, reassembled, restored
from ._coded import CodedStorage
from ._packing import look_up, pack, unpack
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
    activations: Literal["none", "int8", "int4", "fp8"] = "none"
    """How inputs are rounded before the product, token by token. An adapter beside the layer sees them as they are."""


class Grid:
    """The values that the weights of a group may take. Stateless but for its options; every method works on any leading shape, and
    on fake tensors.

    parameters: {name: dtype} of what a group keeps, in the order of `fit`'s result."""

    bits: int
    parameters: dict[str, torch.dtype]
    packed: ClassVar[dict[str, int]] = {}
    """Parameters (uint8) that a leaf keeps in fewer bits: {name: bits}, packed along a row."""
    table: tuple[float, ...] = ()
    """2**bits numbers where decode is `place(table[codes], parameters)`: codes are then looked up byte by byte."""
    choice: str = ""
    """The parameter (uint8) that says which table of a group it is, where `table` is several, one after the other."""
    joint: str = ""
    """Why a column cannot be coded without others; empty where it can. Only calibration rtn is then possible."""

    def fit(self, groups: Tensor) -> dict[str, Tensor]:
        """groups (..., g) fp32 -> {name: (...)} in the dtypes of `parameters`: already as they are kept."""
        raise NotImplementedError

    def encode(self, values: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """values (..., m) fp32 under parameters (...) -> codes (..., m) uint8 of the nearest grid values."""
        raise NotImplementedError

    def decode(self, codes: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """The inverse, fp32 (..., m); differentiable in float parameters."""
        if self.choice:
            codes = codes + (parameters[self.choice] << self.bits).unsqueeze(-1)
        return self.place(look_up(codes.reshape(1, -1), codes.numel(), 8, self.table).view(codes.shape), parameters)

    def integers(self, codes: Tensor, parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """(whole numbers (..., m) of magnitude below 16, scale (...)), both fp32, whose product decode is; None if it is no such."""
        return None

    def scale_of(self, parameters: dict[str, Tensor]) -> Tensor | None:
        """Fp32 scales (...) where `place` is a multiplication by them, and `table` is one; None where it is not."""
        return None

    def place(self, values: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Values (..., m) fp32 of the table, which may be overwritten -> of the group. Default: times `scale_of`."""
        scale = self.scale_of(parameters).unsqueeze(-1)
        return values * scale if torch.is_grad_enabled() else values.mul_(scale)


@dataclass(frozen=True)
class GroupQuantizer:
    """A grid over the groups of matrices of `columns` columns: what calibrations are given."""

    grid: Grid
    group: int
    columns: int
    activations: str = "none"

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
        full = self.columns // self.group * self.group
        found = self.grid.fit(weight[:, :full].reshape(weight.shape[0], full // self.group, self.group))
        if full == self.columns:
            return found
        last = self.grid.fit(weight[:, None, full:])
        return {name: torch.cat([value, last[name]], 1) for name, value in found.items()}

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
        return GroupQuantizer(cls.grid(config), group, columns, config.activations)

    @classmethod
    def prescale(cls, weight: Tensor, config: GroupConfig) -> Tensor | None:
        """A scale of every row (out, 1) or of all (1, 1), positive, as it is kept: the grid sees the weight divided by it."""
        return None

    @classmethod
    def needs(cls, config):
        from .calibration.base import calibration_of

        return calibration_of(config.calibration).needs

    @classmethod
    def windowed(cls, config):
        from .calibration.base import calibration_of

        calibration = calibration_of(config.calibration)
        return calibration if calibration.windowed else None

    @classmethod
    def source(cls, weight: Tensor, config: GroupConfig) -> tuple[Tensor, Tensor | None]:
        """(what the grid sees of a weight (out, in), with the padding that the format declares; the scale that it was divided by)."""
        outer, columns = cls.prescale(weight, config), cls.quantizer(config, weight.shape[1]).columns
        source = weight if outer is None else weight.float() / outer.float()
        return (source if columns == weight.shape[1] else F.pad(source, (0, columns - weight.shape[1]))), outer

    @classmethod
    @torch.no_grad()
    def from_weight(cls, weight, config, *, bias=None, dtype=None, statistics=None, generator=None):
        from .calibration.base import calibration_of

        check_weight(weight, f"{cls.method} storage")
        quantizer, calibration = cls.quantizer(config, weight.shape[1]), calibration_of(config.calibration)
        grid = quantizer.grid
        if grid.joint and config.calibration["method"] != "rtn":
            raise UsageError(f"storage '{cls.method}' cannot be calibrated by {config.calibration['method']}: {grid.joint}",
                             remedy="calibration: rtn")
        source, outer = cls.source(weight, config)
        if has_values(weight):
            found = calibration.calibrate(source, quantizer, statistics)
        else:
            found = calibration.shapes(source, quantizer)
        return cls.from_codes(found.codes, found.parameters, config, shape=tuple(weight.shape), input_scale=found.input_scale,
                              channels=found.channels, input_shift=found.input_shift, outer_scale=outer, bias=bias,
                              dtype=dtype or weight.dtype)

    @classmethod
    def from_codes(cls, codes: Tensor, parameters: dict[str, Tensor], config: GroupConfig, *, shape: tuple[int, int] | None = None,
                   input_scale: Tensor | None = None, channels: Tensor | None = None, input_shift: Tensor | None = None,
                   outer_scale: Tensor | None = None, bias: Tensor | None = None, dtype: torch.dtype) -> GroupStorage:
        """Codes (out, in) uint8, with the padding that a format declares, and the grid's parameters {name: (out, groups)}, found
        elsewhere. shape: of W (default: of the codes). dtype: the compute dtype."""
        grid = cls.grid(config)
        leaves = {"codes": pack(codes, grid.bits)}
        for name, kept in grid.parameters.items():
            value = parameters[name].to(kept)
            leaves[name] = pack(value, grid.packed[name]) if name in grid.packed else value
        if outer_scale is not None:
            leaves["outer_scale"] = outer_scale
        if input_scale is not None:
            leaves["input_scale"] = input_scale
        more = {"channels": channels, "input_shift": input_shift}
        leaves |= {name: value for name, value in more.items() if value is not None}
        return cls(*(shape or codes.shape), config, leaves, bias, dtype)

    @classmethod
    @torch.no_grad()
    def joined(cls, parts):
        first, every = cls.alike(parts), [part.leaves() for part in parts]
        own = {"codes", *cls.grid(first.options).parameters}
        leaves = {name: torch.cat([each[name] for each in every]) if name in own else value for name, value in every[0].items()}
        for name in set(leaves) - own:
            if has_values(leaves[name]) and not all(torch.equal(each[name], leaves[name]) for each in every):
                raise UsageError(f"maps that the model keeps as one differ in '{name}', of which one storage has one",
                                 remedy="give the dense model")
        return cls(sum(part.out_features for part in parts), first.in_features, first.options, leaves, None, first.compute_dtype)

    def with_leaves(self, leaves, *, exact=True):
        leaves, options = self._checked(leaves), self.options
        if exact and "scale_dtype" in type(options).model_fields:
            options = options.model_copy(update={"scale_dtype": "fp32"})
        kinds = {**{name: dtype for name, (_, dtype) in self.leaf_kinds().items()}, **self.grid(options).parameters}
        kept = {name: value.detach().to(kinds[name]) for name, value in self._given(leaves).items()}
        cls = getattr(type(self), "plain_class", type(self))
        return cls(self.out_features, self.in_features, options, kept, self.bias, self.compute_dtype)

    def recoded(self, weight, leaves, moved):
        if (channels := self._given(leaves).get("channels")) is not None:  # a code moves where a weight that it stands for does
            weight, moved = columns(weight, channels), columns(moved.float(), channels) > 0
        return super().recoded(weight, leaves, moved)

    def nearest_codes(self, weight, leaves):
        quantizer, parameters = self._read(leaves, slice(0, self.out_features))
        if "input_scale" in leaves:
            weight = weight * leaves["input_scale"].float()
        if "outer_scale" in leaves:
            weight = weight / leaves["outer_scale"].float()
        return quantizer.encode(weight, parameters), quantizer.grid.bits

    def decode(self, leaves, rows):
        dense = self.values(leaves, rows)
        if "channels" in leaves:
            dense = restored(dense, leaves["channels"])
        return dense if "input_scale" not in leaves else dense / leaves["input_scale"].float()

    def inputs(self, x: Tensor, leaves: dict[str, Tensor]) -> Tensor:
        """x (..., in) as the codes get it, but for `offset`: what `values` is multiplied by."""
        return self._placed(x - leaves["input_shift"].to(x.dtype) if "input_shift" in leaves else x, leaves)

    def offset(self, leaves: dict[str, Tensor], dtype: torch.dtype) -> Tensor | None:
        """What `inputs` took off every input, (in,) as the codes would get it; None for nothing."""
        return self._placed(leaves["input_shift"].to(dtype), leaves) if "input_shift" in leaves else None

    def _placed(self, x, leaves):
        x = x if "input_scale" not in leaves else x / leaves["input_scale"].to(x.dtype)
        return reassembled(x, leaves["channels"]) if "channels" in leaves else x

    def values(self, leaves: dict[str, Tensor], rows: slice) -> Tensor:
        """Rows of W but for input_scale and channels, (n, in) fp32."""
        dense = self._grid_values(leaves, rows)
        if "outer_scale" in leaves:
            outer = leaves["outer_scale"].float()
            dense = dense * (outer if len(outer) == 1 else outer[rows])
        return dense

    def integers(self, leaves: dict[str, Tensor], rows: slice) -> tuple[Tensor, Tensor] | None:
        """The same as whole numbers (n, groups, g) and scales (n, groups), where the format is of such; a short last group is filled."""
        quantizer, parameters = self._read(leaves, rows)
        codes = unpack(leaves["codes"][rows], quantizer.columns, quantizer.grid.bits)
        return quantizer.grid.integers(quantizer.split(codes), parameters)

    def product(self, x, leaves=None):
        if self.options.activations == "none":
            return super().product(x, leaves)
        if leaves is None:
            return RoundedProduct.apply(x, self)
        leaves = self._given(leaves)
        near, offset = straight_through(self.inputs(x, leaves), self.options.activations), self.offset(leaves, x.dtype)
        dense = self.values(leaves, slice(0, self.out_features)).to(self.compute_dtype).to(x.dtype)
        return F.linear(near if offset is None else near + offset, dense)

    def forward_product(self, x):
        quantizer = self.quantizer(self.options, self.in_features)
        grid, group = quantizer.grid, quantizer.group
        if grid.bits != 4 or not grid.table or quantizer.columns % group or not _compiled.suits(x, 4, group):
            return super().forward_product(x)
        leaves = self.leaves()
        scale = grid.scale_of(self._read(leaves, slice(0, self.out_features))[1])
        if scale is None:
            return super().forward_product(x)
        scale = scale * leaves["outer_scale"].float() if "outer_scale" in leaves else scale
        placed = self._placed(x.float(), leaves)
        return _compiled.few_product(placed, leaves["codes"], 4, scale.contiguous(), 0, group, group, table=grid.table).to(x.dtype)

    def _parameter(self, name: str, value: Tensor, rows: slice) -> Tensor:
        """The rows of a leaf that belong to rows of W."""
        return value[rows]

    def _read(self, leaves, rows):
        """The quantizer, and the parameters of rows of W, (n, groups) each."""
        quantizer = self.quantizer(self.options, self.in_features)
        grid, parameters = quantizer.grid, {}
        for name in grid.parameters:
            value = self._parameter(name, leaves[name], rows)
            parameters[name] = unpack(value, quantizer.groups, grid.packed[name]) if name in grid.packed else value
        return quantizer, parameters

    def _grid_values(self, leaves, rows):
        """What the grid alone says, (n, in) fp32."""
        quantizer, parameters = self._read(leaves, rows)
        grid, codes = quantizer.grid, leaves["codes"][rows]
        uneven = quantizer.columns % quantizer.group or quantizer.group * grid.bits % 8
        if not grid.table or grid.choice and uneven:
            return quantizer.decode(unpack(codes, quantizer.columns, grid.bits), parameters)[:, : self.in_features]
        if grid.bits == 4 and not uneven and not torch.is_grad_enabled():
            scale = grid.scale_of(parameters)
            if scale is not None and _compiled.decodes(codes, scale):
                dense = torch.empty(codes.shape[0], quantizer.columns, device=codes.device)
                _compiled.decode_table(codes.reshape(-1), scale.reshape(-1), quantizer.group, grid.table, dense.view(-1))
                return dense[:, : self.in_features]
        choice = parameters[grid.choice] if grid.choice else None
        values = quantizer.split(look_up(codes, quantizer.columns, grid.bits, grid.table, choice))
        return quantizer.join(grid.place(values, parameters))[:, : self.in_features]
