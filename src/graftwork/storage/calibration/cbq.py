"""CBQ: step sizes and low-rank rounding offsets, trained on the outputs of overlapping windows of blocks (arXiv 2312.07950).

W (out, in) in groups with scale s and zero z (a constant in symmetric formats), u = W / s + z at the start, L = 2^b - 1:

    D(W) = s (clamp(floor(u) + h, 0, L) - z),   h = clip(1.2 sigmoid(V) - 0.1, 0, 1),   V = V0 + A1 A2

V0 gives h = u - floor(u), so that D(W) = W at first; A1 (out, r) starts at 0, A2 (r, in) is random (seeded); rank 0 trains all of V.
s is trained by its logarithm. Least over A1, A2 and s, by windows of `window` = (blocks, of which overlap) (windows.py):

    |o - o'|^2  +  kl KL(softmax(o') || softmax(o))  +  regularize mean(1 - |2 h - 1|^beta)

o, o' outputs of the window, quantised and dense. beta falls from 20 to 2 in the soft half of the steps, after a fifth of them without the
penalty. In the rest h is rounded, and gradients go through as if it were not: a change of low rank cannot bring every entry to 0 or 1,
and what is between them at the end would else be rounded unseen. Codes differ from the nearest by one at most.

`truncate` cuts outliers of the weight beforehand. Candidates are magnitudes above Q3 + 1.5 (Q3 - Q1); sorted, o_1 ... o_n, they are cut to
o_k with the largest (o_(k+1) - o_k)^2 - var(o_1 ... o_k).

A map without a window (one outside the blocks, a single matrix, a model that cannot be run block by block): the same over
tr(E H E^T), E = W - D(W), without KL; rows that end above the nearest codes keep those. Bits a weight: the format's; the format must
have evenly spaced codes.

Wide windows want steps: with 40 a window, the first four blocks of a 135M model at 2 bits end with 0.41 of the output's square on other
text by windows (2, 1), 0.25 by (1, 0), 0.34 by gptq, 0.49 by the nearest.

Departures (there is no official code; the paper's text does not settle all of it): V0 (V = A1 A2 alone begins with every h at 1/2);
floor(u) stays that of the first s, so that the gradient by s is exact; each distance counts in its own value at the start; dynamic steps
of rounded inputs are not trained; outlier channels of inputs are not scaled (calibration awq or repquant does that).
Oracle: closed forms in float64, brute force for the cut, errors of windows (tests/oracles/test_calibration_cbq.py).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator

from ...errors import UsageError
from ...registry import MethodConfig, register
from .base import Calibrated, Calibration
from .windows import checked_window

ZETA, GAMMA = 1.1, -0.1
#: parts of the steps without the penalty, and before h is rounded
FREE, SOFT = 0.1, 0.5


class CBQ(MethodConfig):
    window: tuple[int, int] = Field((2, 1), description="blocks that are trained together, and how many of them the next window has again")
    steps: int = Field(300, ge=1, description="of Adam, for each window; a batch each")
    rank: int = Field(5, ge=0, description="of the change of V; 0: all of V")
    lr_rounding: float = Field(0.05, ge=0, description="of A1 and A2 (rank 0: of V)")
    lr_scale: float = Field(0.02, ge=0, description="of the logarithm of scales")
    kl: float = Field(1.0, ge=0, description="weight of the divergence between softmaxes of hidden states")
    regularize: float = Field(0.1, ge=0, description="weight of the penalty that drives h to 0 or 1")
    truncate: bool = False
    """Cut the outliers of the weight first."""

    _window = field_validator("window")(checked_window)


@register("calibration", "cbq", config=CBQ, title="CBQ", paper="2312.07950",
          summary="scales and low-rank rounding offsets trained on the outputs of overlapping windows of blocks",
          bibtex="@inproceedings{ding2025cbq, title={CBQ: Cross-Block Quantization for Large Language Models}, author={Ding, Xin and "
                 "Liu, Xiaoyu and Tu, Zhijun and Zhang, Yun and Li, Wei and Hu, Jie and Chen, Hanting and Tang, Yehui and "
                 "Xiong, Zhiwei and Yin, Baoqun and Wang, Yunhe}, booktitle={ICLR}, year={2025}}")
class CBQCalibration(Calibration):
    needs = frozenset({"hessian"})
    windowed = True

    @property
    def weights(self):
        return (1.0, self.config.kl)

    def distances(self, output, target):
        """(mean squared distance of tokens, mean divergence of their softmaxes)."""
        divergence = F.kl_div(output.log_softmax(-1), target.log_softmax(-1), reduction="none", log_target=True)
        return torch.stack([(output - target).square().sum(-1).mean(), divergence.sum(-1).mean()])

    def student(self, source, quantizer, statistics=None):
        _even(quantizer.grid)
        return Rounding(source.float(), quantizer, self.config)

    def calibrate(self, weight, quantizer, statistics):
        _even(quantizer.grid)
        if (found := getattr(statistics, "found", None)) is not None:
            return found
        hessian, weight = self.statistic(statistics, "hessian").to(weight.device), weight.float()
        student, config = self.student(weight, quantizer), self.config
        start = quantizer.fit(weight)
        nearest = quantizer.encode(weight, start)

        def error(dense):
            off = dense - weight
            return ((off @ hessian) * off).sum(-1)

        unit = error(quantizer.decode(nearest, start)).sum().clamp(min=1e-30)
        with torch.enable_grad():
            optimizer = torch.optim.Adam([{**group, "full": group["lr"]} for group in student.groups])
            for step in range(config.steps):
                t = step / config.steps
                optimizer.zero_grad()
                (error(student.dense(t)).sum() / unit + student.penalty(t) / student.size).backward()
                for group in optimizer.param_groups:
                    group["lr"] = group["full"] * (1 + math.cos(math.pi * t)) / 2
                optimizer.step()
        found = student.found()
        better = error(quantizer.decode(found.codes, found.parameters)) < error(quantizer.decode(nearest, start))
        return Calibrated(torch.where(better[:, None], found.codes, nearest),
                          {name: torch.where(better[:, None], found.parameters[name], start[name]) for name in start})

    def shapes(self, weight, quantizer):
        _even(quantizer.grid)
        return super().shapes(weight, quantizer)


class Rounding:
    """A matrix whose codes are floor(u) + h. See windows.py for what a student offers."""

    def __init__(self, weight, quantizer, config):
        self.quantizer, self.grid, self.config = quantizer, quantizer.grid, config
        if config.truncate:
            limit = reserved(weight.abs().flatten())
            weight = weight.clamp(-limit, limit)
        self.start, self.top = quantizer.fit(weight), 2**self.grid.bits - 1
        scale = self.start["scale"].float()
        self.zero = self.start["zero"].float() if "zero" in self.start else torch.full_like(scale, -self.grid.table[0])
        units = quantizer.split(weight) / scale.unsqueeze(-1) + self.zero.unsqueeze(-1)
        self.base, self.size = units.floor(), weight.numel()
        self.offset = torch.logit((quantizer.join(units - self.base) - GAMMA) / (ZETA - GAMMA))
        (rows, columns), rank = weight.shape, config.rank
        if rank:
            generator = torch.Generator().manual_seed(0)
            second = torch.randn(rank, columns, generator=generator).to(weight.device)
            self.factors = [torch.zeros(rows, rank, device=weight.device), second / rank**0.5]
        else:
            self.factors = [torch.zeros_like(self.offset)]
        self.log_scale = torch.zeros_like(self.zero)
        for each in (*self.factors, self.log_scale):
            each.requires_grad_()
        self.groups = [{"params": self.factors, "lr": config.lr_rounding}, {"params": [self.log_scale], "lr": config.lr_scale}]

    def rounding(self):
        """h (rows, columns)."""
        change = self.factors[0] @ self.factors[1] if len(self.factors) == 2 else self.factors[0]
        return (torch.sigmoid(self.offset + change) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def scale(self):
        """As it is kept, in fp32; the gradient goes through the rounding."""
        kept = self.start["scale"].dtype
        wide = self.start["scale"].float() * self.log_scale.exp()
        near = wide.detach().clamp(torch.finfo(kept).tiny, torch.finfo(kept).max).to(kept).float()
        return wide + (near - wide).detach()

    def dense(self, t):
        h = self.rounding()
        if t >= SOFT:
            h = h + ((h >= 0.5).float() - h).detach()
        codes = (self.base + self.quantizer.split(h)).clamp(0, self.top)
        return self.quantizer.join((codes - self.zero.unsqueeze(-1)) * self.scale().unsqueeze(-1))

    def penalty(self, t):
        if not FREE <= t < SOFT or not self.config.regularize:
            return self.log_scale.sum() * 0  # a part of the graph
        beta = 2 + 18 * (SOFT - t) / (SOFT - FREE)
        return self.config.regularize * (1 - (2 * self.rounding() - 1).abs() ** beta).sum()

    @torch.no_grad()
    def found(self):
        codes = self.quantizer.join(self.base + self.quantizer.split((self.rounding() >= 0.5).float())).clamp(0, self.top)
        return Calibrated(codes.to(torch.uint8), {**self.start, "scale": self.scale().to(self.start["scale"].dtype)})


def reserved(magnitudes):
    """The largest of magnitudes (n,) that is no outlier."""
    ordered = magnitudes.sort().values.double()
    low, high = (ordered[round(part * (len(ordered) - 1))] for part in (0.25, 0.75))
    candidates = ordered[ordered > high + 1.5 * (high - low)]
    if len(candidates) < 2:
        return ordered[-1].float()
    count = torch.arange(1, len(candidates) + 1, dtype=torch.float64, device=ordered.device)
    off = candidates - candidates.mean()
    spread = off.square().cumsum(0) / count - (off.cumsum(0) / count).square()
    measure = candidates.diff().square() - spread[:-1]
    return candidates[int(measure.argmax())].float()


def _even(grid):
    """Raises UsageError for a grid whose codes are not s (code - z) with a float s."""
    steps = {high - low for low, high in zip(grid.table, grid.table[1:])}
    if grid.choice or steps != {1.0} or not set(grid.parameters) <= {"scale", "zero"} or not grid.parameters["scale"].is_floating_point:
        raise UsageError("calibration 'cbq' shifts codes that are evenly spaced, which this format's are not",
                         remedy="storage: int4, int3 or int2; or calibration: adaquant")
