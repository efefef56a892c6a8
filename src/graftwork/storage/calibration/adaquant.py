"""AdaQuant: the weight, the scale and the zero of every group trained on the layer's own outputs (arXiv 2006.10518).

A continuous V (out, in), which starts at W (out, in), is rounded with a straight-through gradient; with H (in, in) the mean of x x^T

    least over V, scale, zero:   mean |W x - D(Q(V)) x|^2  =  tr(E H E^T),   E = W - D(Q(V))

by Adam with a cosine schedule. A weight may move by more than one level. V counts in steps of its group (scale at the start), the
scale by its logarithm and the zero in codes (a whole zero is rounded straight-through too), so that one rate does for every
magnitude. Where V lies within the grid, D(Q(V)) has derivative 1 by V and (D(Q(V)) - V) / scale by the scale; outside it follows the last
grid value. Each row keeps the best it has met, and stays at the nearest codes where nothing was better.

Bits a weight: the format's.
Departures from the paper: the mean over all tokens comes from their second moments, not from batches of some kept ones, which is the
same objective in full (on 384 inputs, batches of 250 kept tokens end above the nearest codes on other tokens, the moments at 0.6 of
them); the bias is not changed, as it is no part of a storage and other parts of the program count on it; inputs are not quantised, and no
ReLU follows a linear map of a language model. The official code takes two rates and ignores them; here every rate is used. The
integer programme for bits a layer is storage/_allocate.py.
Oracle: gradients by autograd in float64, held-out error (tests/oracles/test_calibration_adaquant.py).
"""

from __future__ import annotations

import math

import torch
from pydantic import Field

from ...registry import MethodConfig, register
from .base import Calibrated, Calibration, in_pieces


class AdaQuant(MethodConfig):
    steps: int = Field(100, ge=1, description="of Adam")
    lr_weight: float = Field(0.05, ge=0, description="of weights, in steps of their group")
    lr_scale: float = Field(0.02, ge=0, description="of the logarithm of scales")
    lr_zero: float = Field(0.1, ge=0, description="of zeros, in codes")


@register("calibration", "adaquant", config=AdaQuant, title="AdaQuant", paper="2006.10518",
          summary="weights, scales and zeros trained through the rounding, on the outputs of the layer",
          bibtex="@inproceedings{hubara2021adaquant, title={Accurate Post Training Quantization With Small Calibration Sets}, "
                 "author={Hubara, Itay and Nahshan, Yury and Hanani, Yair and Banner, Ron and Soudry, Daniel}, booktitle={ICML}, "
                 "year={2021}}")
class AdaQuantCalibration(Calibration):
    needs = frozenset({"hessian"})

    def calibrate(self, weight, quantizer, statistics):
        hessian = self.statistic(statistics, "hessian").to(weight.device)
        hessian = hessian / hessian.diagonal().mean().clamp(min=1e-30)
        return in_pieces(weight, lambda rows, _: self._rows(rows, quantizer, hessian))

    def _rows(self, rows, quantizer, hessian):
        tuned, grid = Tuned(rows, quantizer), quantizer.grid
        rates = {"units": self.config.lr_weight, "log_scale": self.config.lr_scale, "shift": self.config.lr_zero}
        with torch.enable_grad():
            optimizer = torch.optim.Adam([{"params": [p], "lr": rates[name], "full": rates[name]} for name, p in tuned.trained.items()])
            best, least = None, None
            for step in range(self.config.steps + 1):
                off = quantizer.join(tuned.dense()) / tuned.size - rows / tuned.size
                with torch.no_grad():
                    slope = off @ hessian
                    loss = (off * slope).sum(-1)
                    better = torch.ones_like(loss, dtype=torch.bool) if least is None else loss < least
                    least = loss if least is None else torch.where(better, loss, least)
                    best = {name: p.detach().clone() if best is None else _where(better, p.detach(), best[name])
                            for name, p in tuned.trained.items()}
                if step == self.config.steps:
                    break
                optimizer.zero_grad()
                (off * slope).sum().backward()  # H is symmetric: half the gradient of the loss, which Adam does not see
                for group in optimizer.param_groups:
                    group["lr"] = group["full"] * (1 + math.cos(math.pi * step / self.config.steps)) / 2
                optimizer.step()
        groups = quantizer.split(rows)
        start, parameters = tuned.start, tuned.kept(best)
        codes = quantizer.join(grid.encode(tuned.values(best["units"]), parameters))
        nearest = quantizer.join(grid.encode(groups, start))
        errors = []
        for each, found in ((codes, parameters), (nearest, start)):
            off = (quantizer.decode(each, found) - rows) / tuned.size
            errors.append(((off @ hessian) * off).sum(-1))
        better = errors[0] < errors[1]
        return Calibrated(_where(better, codes, nearest), {name: _where(better, parameters[name], start[name]) for name in start})


class Tuned:
    """What is trained of some rows: V, the scales and the zeros, as far as the grid has them."""

    def __init__(self, rows, quantizer):
        self.grid, groups = quantizer.grid, quantizer.split(rows)
        self.start, self.top = quantizer.fit(rows), 2**self.grid.bits - 1
        scaled = "scale" in self.start and self.start["scale"].dtype.is_floating_point
        self.unit = self.start["scale"].float() if scaled else groups.abs().mean(-1).clamp(min=1e-30)
        self.size = self.unit.mean(1, keepdim=True)  # errors count in it, so that no gradient is lost against Adam's epsilon
        self.trained = {"units": groups / self.unit.unsqueeze(-1)}
        if scaled:
            self.trained["log_scale"] = torch.zeros_like(self.unit)
        if "zero" in self.start:
            self.trained["shift"] = torch.zeros_like(self.unit)
        self.trained = {name: value.requires_grad_() for name, value in self.trained.items()}

    def values(self, units):
        return units * self.unit.unsqueeze(-1)

    def parameters(self, trained):
        """The grid's parameters, differentiable, not rounded but for a whole zero."""
        found = dict(self.start)
        if "log_scale" in trained:
            found["scale"] = self.unit * trained["log_scale"].exp()
        if "shift" in trained:
            zero = self.start["zero"].float() + trained["shift"]
            if not self.start["zero"].dtype.is_floating_point:
                zero = (zero + (zero.round() - zero).detach()).clamp(0, self.top)
            found["zero"] = zero
        return found

    def dense(self):
        """D(Q(V)), straight-through: (rows, groups, group)."""
        values, parameters = self.values(self.trained["units"]), self.parameters(self.trained)
        with torch.no_grad():
            codes = self.grid.encode(values, parameters)
            far = 64 * values.abs().amax(-1, keepdim=True)
            ends = self.grid.decode(self.grid.encode(torch.cat([-far, far], -1), parameters), parameters)
            half = (ends[..., 1:] - ends[..., :1]) / 2 ** (self.grid.bits + 1)  # of a step, where steps are even
            inside = (values >= ends[..., :1] - half) & (values <= ends[..., 1:] + half)
        found = self.grid.decode(codes, parameters)
        off = (found - values).detach()
        if "log_scale" in self.trained:  # 1 + log s - log s: the derivative of s / s
            off = off * (1 + self.trained["log_scale"] - self.trained["log_scale"].detach()).unsqueeze(-1)
        return torch.where(inside, values + off, found)

    def kept(self, trained):
        """The grid's parameters as they are kept."""
        found = self.parameters(trained)
        for name, value in found.items():
            dtype = self.start[name].dtype
            if name == "scale" and dtype.is_floating_point:
                value = value.clamp(torch.finfo(dtype).tiny, torch.finfo(dtype).max)
            found[name] = value.to(dtype)
        return found


def _where(rows, yes, no):
    return torch.where(rows.view(-1, *[1] * (yes.dim() - 1)), yes, no)
