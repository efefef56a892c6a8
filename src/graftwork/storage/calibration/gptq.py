"""GPTQ: rounding one column at a time, each error made up for by the columns after it (arXiv 2210.17323).

The loop and its equations are in storage/_second_order.py; here the quantizer is the grid of any format of groups. The parameters of
a group are fitted when its first column is reached, to weights that are corrected up to there. `act_order` takes columns of large
H_jj first; groups stay those of the original order, so their parameters are then fitted to the original weights before the loop
("static groups"), and no index is stored. `mse` shrinks a group's range to the fraction of it, in 20 steps down to `1 - mse`,
whose squared error weighted by 1 / U_jj^2 is least.

Departures from the reference code: the factor 2 of H is left out (it cancels); float64 for the inverse up to 4,096 inputs; a group
may be short; damping grows tenfold where the inverse fails, instead of an error.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from ...registry import MethodConfig, register
from .._second_order import solve
from .base import Calibrated, Calibration


class GPTQ(MethodConfig):
    damp: float = Field(0.01, ge=0, description="of H's mean diagonal, added to the diagonal")
    act_order: bool = False
    """Columns of large activations first, with static groups."""
    mse: float = Field(0.0, ge=0, lt=1, description="largest shrinkage tried of a group's range; 0: none")


@register("calibration", "gptq", config=GPTQ, title="GPTQ", paper="2210.17323",
          summary="column by column; the error of each is made up for by those after it, by the second moments of the inputs",
          bibtex="@inproceedings{frantar2023gptq, title={GPTQ: Accurate Post-Training Quantization for Generative Pre-trained "
                 "Transformers}, author={Frantar, Elias and Ashkboos, Saleh and Hoefler, Torsten and Alistarh, Dan}, "
                 "booktitle={ICLR}, year={2023}}")
class GPTQCalibration(Calibration):
    needs = frozenset({"hessian"})

    def calibrate(self, weight, quantizer, statistics):
        hessian = self.statistic(statistics, "hessian").to(weight.device)
        order = hessian.diagonal().argsort(descending=True) if self.config.act_order else None
        columns = _Columns(quantizer, weight, hessian, order, self.config.mse)
        if order is None:
            solve(weight, hessian, columns, damp=self.config.damp)
        else:
            solve(weight[:, order], hessian[order][:, order], columns, damp=self.config.damp)
        return Calibrated(columns.codes, columns.parameters)


class _Columns:
    """The grid of a format, one column at a time. order: of the columns that come; parameters are then fitted beforehand."""

    def __init__(self, quantizer, weight: Tensor, hessian: Tensor, order: Tensor | None, mse: float):
        self.grid, self.mse = quantizer.grid, mse
        self.group = quantizer.group if order is None else weight.shape[1]
        self.inside, self.order = quantizer.group, None if order is None else order.tolist()
        self.codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        if order is None or not mse:
            self.parameters = quantizer.fit(weight.float())
        else:  # H_jj^-1/2 stands for U_jj, which is of the other order
            groups = quantizer.split(weight.float()).transpose(0, 1)
            spread = quantizer.split(hessian.diagonal().clamp(min=1e-12).rsqrt()[None])[0]
            found = [fitted(self.grid, group, each, mse) for group, each in zip(groups, spread)]
            self.parameters = {name: torch.stack([each[name] for each in found], 1) for name in found[0]}

    def start(self, j, columns, diagonal):
        if self.order is None:
            for name, value in fitted(self.grid, columns, diagonal, self.mse).items():
                self.parameters[name][:, j // self.inside] = value

    def quantize(self, j, column, u):
        place = j if self.order is None else self.order[j]
        own = {name: value[:, place // self.inside] for name, value in self.parameters.items()}
        codes = self.grid.encode(column[:, None], own)
        self.codes[:, place] = codes[:, 0]
        return self.grid.decode(codes, own)[:, 0]


def fitted(grid, columns: Tensor, diagonal: Tensor, mse: float) -> dict[str, Tensor]:
    """Parameters of one group (out, m) of columns: of its whole range, or of the part of it with the least weighted error."""
    best = grid.fit(columns)
    if not mse:
        return best

    def loss(parameters):
        return (((columns - grid.decode(grid.encode(columns, parameters), parameters)) / diagonal) ** 2).sum(-1)

    least = loss(best)
    for step in range(1, 21):
        tried = grid.fit(columns * (1 - mse * step / 20))
        now = loss(tried)
        better = now < least
        least = torch.where(better, now, least)
        best = {name: torch.where(better, tried[name], value) for name, value in best.items()}
    return best
