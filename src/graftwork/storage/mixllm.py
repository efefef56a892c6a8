"""MixLLM: the output features that the model feels most in 8 bits, the others in 4 (arXiv 2412.14590).

The rows of W (out, in) are two matrices in groups of g along the input, each with any calibration (storage/calibration; the
paper's is gptq):

    wide rows:   symmetric, 8 bits, scale fp16;    the others: asymmetric, `bits` bits, scale fp16 and zero in 8 bits (storage/intk.py)

Which rows are wide: the part `wide` of all rows of the model that are largest in a global ranking by the change of the loss
(storage/calibration/sensitivity.py), found before a calibration run begins. Where that is not to be had (`salience: local`, a single
matrix, a model without next-token loss), the part `wide` of every matrix, by the error e of its rows in few bits: e H e^T where the
calibration collects H, else sum_j |e_j| mean|x_j|, else (without data, with a warning) |e|^2.

Bits a weight: 8 p + b (1 - p) + (16 p + 24 (1 - p)) / g + 32 / in with p the part of wide rows of this matrix, which the global
ranking decides; for weights without values (plans) p = wide. Oracles: tests/oracles/test_storage_mixllm.py.

Departures: g = 64 by default, since 128 divides few small models (a group may be short, too); the search for a smaller range is gptq's
option `mse`; groups are not reordered. Activations stay as they are here.
"""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ..errors import UsageError
from ..modeling.protocols import has_values
from ..registry import lookup, register
from ._coded import CodedStorage
from ._groups import GroupConfig, GroupQuantizer
from ._packing import pack, unpack
from .base import check_weight
from .intk import IntGrid


class MixLLM(GroupConfig):
    wide: float = Field(0.1, ge=0, le=1, description="part of the rows in 8 bits")
    bits: int = Field(4, ge=2, le=7, description="of the other rows")
    salience: Literal["global", "local"] = "global"
    """global: rows of the whole model are ranked by what their rounding costs the loss; local: those of each matrix by their error."""
    activations: Literal["none"] = "none"
    """Inputs are not rounded by this format."""


def quantizer(config: MixLLM, columns: int, wide: bool) -> GroupQuantizer:
    group = columns if config.group_size < 1 else min(config.group_size, columns)
    return GroupQuantizer(IntGrid(8 if wide else config.bits, wide, True, torch.float16), group, columns)


def local_rows(weight: Tensor, config: MixLLM, statistics) -> Tensor:
    """bool (out,): the part `wide` of the rows with the largest error."""
    error = quantizer(config, weight.shape[1], False).nearest(weight) - weight
    hessian, mean = (None if statistics is None else getattr(statistics, name) for name in ("hessian", "mean_abs"))
    if hessian is not None:
        score = ((error @ hessian.to(error.device)) * error).sum(1)
    elif mean is not None:
        score = error.abs() @ mean.to(error.device)
    else:
        warnings.warn("storage 'mixllm' had no calibration data: rows are ranked by their own error, which costs quality", stacklevel=3)
        score = error.square().sum(1)
    chosen = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)
    chosen[score.argsort(descending=True, stable=True)[: round(config.wide * len(weight))]] = True
    return chosen


@register("storage", "mixllm", config=MixLLM, title="MixLLM: output features in 8 and 4 bits", lossless=False, paper="2412.14590",
          summary="the tenth of all output features that the loss feels most in 8 bits, the others in 4: about 4.8 bits a weight",
          bibtex="@article{zheng2024mixllm, title={{MixLLM}: {LLM} Quantization with Global Mixed-precision between Output-features and "
                 "Highly-efficient System Design}, author={Zheng, Zhen and Song, Xiaonan and Liu, Chuanjie}, "
                 "journal={arXiv:2412.14590}, year={2024}}")
class MixLLMStorage(CodedStorage):
    """Leaves: `wide_codes`, `wide_scale` of the wide rows, `codes`, `scale`, `zero` of the others, each in the order of the weight;
    `place` (out,) int32: where a row is among both, the wide ones first; `input_scale` and `wide_input_scale` with calibrations that
    make them."""

    varying = ("wide_codes", "wide_scale", "codes", "scale", "zero")
    does_without = True

    @classmethod
    def needs(cls, config):
        return frozenset({"mean_abs"}) | lookup("calibration", config.calibration["method"]).cls.needs

    @classmethod
    def prepare(cls, model, config, batches):
        from .calibration.sensitivity import global_rows, has_language_loss

        if config.salience == "local" or not config.wide or not batches:
            return {}
        if not has_language_loss(model):
            warnings.warn("the model predicts no next token: rows are ranked within each matrix by their error", stacklevel=2)
            return {}
        found = global_rows(model, config, batches, lambda w: quantizer(config, w.shape[1], False).nearest(w), config.wide)
        return {name: {"wide_rows": mask} for name, mask in found.items()}

    @classmethod
    @torch.no_grad()
    def from_weight(cls, weight, config, *, bias=None, dtype=None, statistics=None, generator=None):
        from .calibration.base import calibration_of

        check_weight(weight, "mixllm storage")
        out, columns = weight.shape
        calibration, real = calibration_of(config.calibration), has_values(weight)
        if calibration.reassembles:
            raise UsageError(f"storage 'mixllm' keeps no other order of channels, which calibration '{calibration.method}' finds",
                             remedy="calibration: gptq, or storage: int4")
        if real:
            given = getattr(statistics, "wide_rows", None)
            wide = local_rows(weight.float(), config, statistics) if given is None else given.to(weight.device)
            order = torch.cat([wide.nonzero()[:, 0], (~wide).nonzero()[:, 0]])
            place, count = order.argsort().int(), int(wide.sum())
        else:
            order, place = None, weight.new_empty(out, dtype=torch.int32)
            count = round(config.wide * out)
        leaves = {}
        for prefix, rows, is_wide in (("wide_", slice(0, count), True), ("", slice(count, out), False)):
            mine = weight[rows] if order is None else weight[order[rows]]
            grid = quantizer(config, columns, is_wide)
            if real and len(mine):
                found = calibration.calibrate(mine, grid, statistics)
            else:
                found = calibration.shapes(mine, grid)
                if real and found.input_scale is not None:
                    found.input_scale.fill_(1)
            leaves |= {f"{prefix}codes": pack(found.codes, grid.grid.bits)} | {f"{prefix}{n}": v for n, v in found.parameters.items()}
            if found.input_scale is not None:
                leaves[f"{prefix}input_scale"] = found.input_scale
        return cls(out, columns, config, {**leaves, "place": place}, bias, dtype or weight.dtype)

    def _part(self, leaves: dict[str, Tensor], prefix: str, rows: slice) -> Tensor:
        grid = quantizer(self.options, self.in_features, bool(prefix))
        codes = unpack(leaves[f"{prefix}codes"][rows], self.in_features, grid.grid.bits)
        dense = grid.decode(codes, {name: leaves[f"{prefix}{name}"][rows] for name in grid.grid.parameters})
        return dense / leaves[f"{prefix}input_scale"].float() if f"{prefix}input_scale" in leaves else dense

    def decode(self, leaves, rows):
        total, place = leaves["wide_codes"].shape[0], leaves["place"]
        first, stop = 0, total
        if (rows.start, rows.stop) != (0, self.out_features):
            if has_values(place):
                first, stop = (int((place[:end] < total).sum()) for end in (rows.start, rows.stop))
            else:  # a plan takes the wide rows as spread evenly
                first, stop = (total * end // self.out_features for end in (rows.start, rows.stop))
        parts = [self._part(leaves, "wide_", slice(first, stop)), self._part(leaves, "", slice(rows.start - first, rows.stop - stop))]
        place = place[rows].long()
        # both parts keep the order of the rows, so those of a slice are runs
        at = torch.where(place < total, place - first, place - total - rows.start + stop)
        return torch.cat(parts).index_select(0, at)

    def wide_rows(self) -> Tensor:
        """bool (out,)."""
        leaves = self.leaves()
        return leaves["place"] < leaves["wide_codes"].shape[0]
