"""SpQR: small groups whose scales and zeros are quantised themselves, and a sparse matrix of outliers (arXiv 2306.03078).

W (out, in), columns in groups of g = 16, GPTQ's loop (storage/_second_order.py, U the factor of the damped H^-1), Q the quantizer of a
row's group: with low = min(w, 0), high = max(w, 0), L = 2^b - 1

    scale = (high - low) / L,   zero = -low / scale (not rounded),   code = clamp(round(w / scale + zero), 0, L),
    D = scale (code - zero)

The scales of one group in t = 16 consecutive rows, and their zeros, are quantised between their minimum and maximum to 3 bits:
value = base + step code, base and step in fp16. The outliers are the weights that cost more than T:

    T = threshold mean_j(mean_i w_ij^2 / U_jj^2)
    before a group: e = sum_j ((w_j - Q(w_j)) / U_jj)^2; weight i is left out of the fit when fitting Q to the others lowers their
                    error below e by more than T; it is replaced by the mean of those that are not left out
    in the loop:    ((w - Q(w)) / U_jj)^2 > T

They are kept as compressed sparse rows: value in fp16, column in 16 bits, row starts in 32 bits; D(W) takes their value in place of
the dense one. Columns of large H_jj come first (`act_order`); the place of every column is kept in 16 bits.

Bits a weight: b + (b_s + b_z) / g + 64 / (g t) + 32 r + 32 / in + 16 / out, with r the part of outliers, which is known after the fact.
For weights without values (plans) r = `outlier_fraction`, an expectation and no bound; a file's r is taken over on loading.

Departures: a group's range contains 0 (else a zero may be huge and spoil those of its tile); the mean square instead of the
variance over rows in T (one row, or constant weights, would make all outliers); the second level keeps its minimum instead of its zero
point; H without the factor 2; the last tile of rows may be short. Without calibration data H = I, with a warning.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from ..errors import UsageError
from ..modeling.protocols import has_values
from ..registry import register
from ._coded import CodedStorage
from ._packing import pack, unpack
from ._second_order import hessian_or_identity, inverse_factor, solve
from .base import StorageConfig, check_weight

HALF = torch.finfo(torch.float16).max


class SpQR(StorageConfig):
    bits: int = Field(4, ge=2, le=8, description="of a dense code")
    group_size: int = Field(16, ge=1, le=1024, description="weights along the input that share a scale and a zero")
    tile_rows: int = Field(16, ge=1, description="rows whose scales (and zeros) are quantised together")
    statistic_bits: int = Field(3, ge=1, le=16, description="of a scale and of a zero; 9 and more: kept in fp16 as they are")
    threshold: float = Field(0.2, gt=0, description="error of an outlier, in parts of what a weight costs; larger: fewer outliers")
    outlier_fraction: float = Field(0.01, ge=0, le=1, description="part of outliers that plans expect; the real part is up to threshold")
    damp: float = Field(1.0, ge=0, description="of H's mean diagonal, added to the diagonal")
    act_order: bool = True
    """Columns of large activations first."""


def dense_values(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return scale * (codes.float() - zero)


def _range(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    scale = (high - low) / (2**bits - 1)
    return scale, torch.where(scale > 0, -low / scale, torch.zeros_like(scale))


def _encoded(values: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    unit = torch.where(scale > 0, values / scale, torch.zeros_like(values)) + zero
    return unit.round().clamp(0, 2**bits - 1)


def left_out(columns: Tensor, diagonal: Tensor, bits: int, threshold: Tensor) -> Tensor:
    """columns (out, m) of one group -> bool (out, m): weights whose absence from the fit lowers the others' error by more than T."""
    width = columns.shape[1]
    if width == 1:
        return torch.zeros_like(columns, dtype=torch.bool)

    def errors(low, high):
        scale, zero = (each[:, None] for each in _range(low, high, bits))
        return ((columns - dense_values(_encoded(columns, scale, zero, bits), scale, zero)) / diagonal).square()

    lows, highs = columns.clamp(max=0).topk(2, 1, largest=False), columns.clamp(min=0).topk(2, 1)
    whole = errors(lows.values[:, 0], highs.values[:, 0]).sum(1)
    found = torch.empty_like(columns, dtype=torch.bool)
    for i in range(width):  # the extremes of the others are the second ones where i is an extreme
        low, high = (torch.where(each.indices[:, 0] == i, each.values[:, 1], each.values[:, 0]) for each in (lows, highs))
        error = errors(low, high)
        found[:, i] = whole - (error.sum(1) - error[:, i]) > threshold
    return found


def quantized_statistics(values: Tensor, tile: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """values (out,) of one group -> codes (out,) uint8, step and base (tiles,) fp16: of every `tile` rows."""
    short = -len(values) % tile
    tiles = torch.cat([values, values[-1:].expand(short)]).view(-1, tile)
    low, high = tiles.amin(1), tiles.amax(1)
    base = low.clamp(-HALF, HALF).half()
    step = ((high - base.float()) / (2**bits - 1)).clamp(0, HALF).half()
    safe = torch.where(step > 0, step.float(), torch.ones_like(low))
    codes = ((tiles - base.float()[:, None]) / safe[:, None]).round().clamp(0, 2**bits - 1)
    return codes.flatten()[: len(values)].to(torch.uint8), step, base


class _Columns:
    """Notes codes, statistics and outliers of the columns as they come."""

    def __init__(self, config: SpQR, shape: tuple[int, int], threshold: Tensor, device: torch.device):
        self.config, self.group, self.threshold = config, config.group_size, threshold
        (out, columns), groups = shape, -(-shape[1] // config.group_size)
        tiles = -(-out // config.tile_rows)
        self.codes = torch.empty(out, columns, dtype=torch.uint8, device=device)
        self.values: Tensor | None = None  # what the solver returned
        self.is_outlier = torch.empty(out, columns, dtype=torch.bool, device=device)
        self.outliers = torch.empty(out, columns, dtype=torch.float16, device=device)
        self.statistics = {f"{name}{part}": torch.empty(size, groups, dtype=dtype, device=device)
                           for name in ("scale", "zero")
                           for part, size, dtype in ((("", out, torch.float16),) if config.statistic_bits > 8 else
                                                     (("_codes", out, torch.uint8), ("_step", tiles, torch.float16),
                                                      ("_base", tiles, torch.float16)))}

    def start(self, j, columns, diagonal):
        config = self.config
        marked = left_out(columns, diagonal, config.bits, self.threshold)
        mean = (columns * ~marked).sum(1, keepdim=True) / (~marked).sum(1, keepdim=True).clamp(min=1)
        columns = torch.where(marked, mean, columns)
        found = _range(columns.amin(1).clamp(max=0), columns.amax(1).clamp(min=0), config.bits)
        self.current = []
        for name, values in zip(("scale", "zero"), found):
            if config.statistic_bits > 8:
                parts = (values.clamp(-HALF, HALF).half(),)
                self.current.append(parts[0].float())
            else:
                parts = quantized_statistics(values, config.tile_rows, config.statistic_bits)
                self.current.append(restored(*parts, config.tile_rows))
            for key, value in zip([key for key in self.statistics if key.startswith(name)], parts):
                self.statistics[key][:, j // self.group] = value

    def quantize(self, j, column, u):
        scale, zero = self.current
        dense = dense_values(_encoded(column, scale, zero, self.config.bits), scale, zero)
        outlier = ((column - dense) / u).square() > self.threshold
        codes = _encoded(column.masked_fill(outlier, 0), scale, zero, self.config.bits)
        exact = column.clamp(-HALF, HALF).half()
        self.codes[:, j], self.is_outlier[:, j], self.outliers[:, j] = codes.to(torch.uint8), outlier, exact
        return torch.where(outlier, exact.float(), dense_values(codes, scale, zero))


def restored(codes: Tensor, step: Tensor, base: Tensor, tile: int, first: int = 0) -> Tensor:
    """The inverse of `quantized_statistics`, of rows from `first` on; any trailing shape."""
    at = torch.arange(first, first + len(codes), device=codes.device) // tile
    return base.float()[at] + step.float()[at] * codes.float()


@register("storage", "spqr", config=SpQR, title="SpQR: sparse outliers and quantized statistics", lossless=False, paper="2306.03078",
          summary="4-bit codes in groups of 16 with 3-bit scales and zeros, weights that would cost too much kept in 16 bits: about 4.7 "
                  "bits a weight and 32 for each outlier",
          bibtex="@inproceedings{dettmers2024spqr, title={{SpQR}: A Sparse-Quantized Representation for Near-Lossless {LLM} Weight "
                 "Compression}, author={Dettmers, Tim and Svirschevski, Ruslan and Egiazarian, Vage and Kuznedelev, Denis and Frantar, "
                 "Elias and Ashkboos, Saleh and Borzunov, Alexander and Hoefler, Torsten and Alistarh, Dan}, booktitle={ICLR}, "
                 "year={2024}}")
class SpQRStorage(CodedStorage):
    """Leaves: `codes`, `scale_codes`, `zero_codes` (out, bytes of a row) uint8; `scale_step`, `scale_base`, `zero_step`, `zero_base`
    (tiles, groups) fp16, or `scale`, `zero` (out, groups) fp16; `outlier_values` (n,) fp16, `outlier_columns` (n,) uint16,
    `outlier_starts` (out + 1,) int32; with act_order `place` (in,) uint16, of every column among the codes."""

    varying = ("outlier_values", "outlier_columns")
    does_without = True

    @classmethod
    def needs(cls, config):
        return frozenset({"hessian"})

    @classmethod
    @torch.no_grad()
    def from_weight(cls, weight, config, *, bias=None, dtype=None, statistics=None, generator=None):
        check_weight(weight, "spqr storage")
        out, columns = weight.shape
        if columns > 1 << 16:
            raise UsageError(f"spqr storage: outliers have columns in 16 bits, the weight has {columns} inputs", remedy="storage: int4")
        if has_values(weight):
            found, order = _solved(weight, config, hessian_or_identity(statistics, weight, "spqr"))
            places = None if order is None else order.argsort().to(torch.uint16)
            mask = found.is_outlier if order is None else found.is_outlier[:, order.argsort()]
            values = found.outliers if order is None else found.outliers[:, order.argsort()]
            numbers = torch.arange(columns, device=mask.device).expand(out, -1)
            sparse = {"outlier_values": values[mask], "outlier_columns": numbers[mask].to(torch.uint16)}
            starts = torch.cat([mask.new_zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)]).int()
        else:
            found = _Columns(config, (out, columns), weight, weight.device)
            count = round(config.outlier_fraction * out * columns)
            places = weight.new_empty(columns, dtype=torch.uint16) if config.act_order else None
            sparse = {"outlier_values": weight.new_empty(count, dtype=torch.float16),
                      "outlier_columns": weight.new_empty(count, dtype=torch.uint16)}
            starts = weight.new_empty(out + 1, dtype=torch.int32)
        coded = {name: pack(value, config.statistic_bits) if name.endswith("_codes") else value for name, value in found.statistics.items()}
        leaves = {"codes": pack(found.codes, config.bits), **coded, **sparse, "outlier_starts": starts}
        if places is not None:
            leaves["place"] = places
        return cls(out, columns, config, leaves, bias, dtype or weight.dtype)

    def _statistic(self, leaves: dict[str, Tensor], name: str, rows: slice) -> Tensor:
        config, groups = self.options, -(-self.in_features // self.options.group_size)
        if config.statistic_bits > 8:
            found = leaves[name][rows].float()
        else:
            codes = unpack(leaves[f"{name}_codes"][rows], groups, config.statistic_bits)
            found = restored(codes, leaves[f"{name}_step"], leaves[f"{name}_base"], config.tile_rows, rows.start)
        return found.repeat_interleave(config.group_size, 1)[:, : self.in_features]

    def decode(self, leaves, rows):
        codes = unpack(leaves["codes"][rows], self.in_features, self.options.bits)
        dense = dense_values(codes, self._statistic(leaves, "scale", rows), self._statistic(leaves, "zero", rows))
        if "place" in leaves:
            dense = dense.index_select(1, leaves["place"].int())
        if has_values(codes):  # in a plan their number is not that of these rows; they take no memory to speak of
            starts = leaves["outlier_starts"][rows.start: rows.stop + 1].long()
            first, stop = starts[[0, -1]].tolist()
            row = torch.arange(len(dense), device=dense.device).repeat_interleave(starts.diff(), output_size=stop - first)
            column = leaves["outlier_columns"][first:stop].long()
            dense = dense.index_put_((row, column), leaves["outlier_values"][first:stop].float())
        return dense

    def outlier_part(self) -> float:
        """r: outliers among all weights."""
        return self.leaves()["outlier_values"].numel() / (self.out_features * self.in_features)


def _solved(weight: Tensor, config: SpQR, hessian: Tensor) -> tuple[_Columns, Tensor | None]:
    order = hessian.diagonal().argsort(descending=True, stable=True) if config.act_order else None
    work = weight.float().masked_fill(hessian.diagonal() == 0, 0)
    if order is not None:
        work, hessian = work[:, order], hessian[order][:, order]
    factor = inverse_factor(hessian, config.damp)
    threshold = config.threshold * (work.square().mean(0) / factor.diagonal().square()).mean()
    found = _Columns(config, tuple(work.shape), threshold, work.device)
    found.values = solve(work, hessian, found, factor=factor)
    return found, order
