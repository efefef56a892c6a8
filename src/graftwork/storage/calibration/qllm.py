"""QLLM: outlier channels of the inputs taken apart, similar ones put together, and a low-rank correction (arXiv 2310.08041).

*Reassembly* (reassembly.py, storage/_channels.py): a channel far above the others costs all of them their precision where inputs are
rounded with one step for a token. It is split into copies, and as many pairs of like channels are averaged, so that the width stays:
W x = W' z but for what the averaging loses. The table (2, in) is kept beside the codes of W'; the storage applies it to its inputs before
it rounds them (`activations:` of the format), and to its decoded weights where it does not round. At most `channel_ratio` of
the channels are added; how many is searched, and without `activations` it is mostly none.

*Correction*: windows of `window` = (blocks, of which overlap) (windows.py) train B (out, r), A (r, in), B = 0 at first, so that

    least over A, B:   |o - o'|^2,   o the window's dense outputs, o' those of

    correction: inside    D(Q(W' + alpha/r B A)), the gradient straight through Q
    correction: beside    D(Q(W')) + alpha/r B A

and end in the codes Q(W' + alpha/r B A) both times: nothing is left of A and B. With `beside`, as in the paper, that is not the function
that was trained, and the run notes the error of both. A window that ends no better than it began is put back.

A map without a window: the same on 512 of its own inputs. Bits a weight: the format's + 32 / out (64 / out from 32,768 inputs on).

Departures: every map has a table of its own, judged by its own outputs; in the paper q, k and v share one, as do gate and up, judged by
what follows them. Pairs are ranked by the paper's distance; the official code has one of sums of weights, which may cancel. A token's
inputs have a symmetric step, as in all formats here. `inside` is the default, since it trains what is kept: on the tests' matrix at 4
bits, 100 steps of it leave 0.61 of the error, of `beside` all. Norms and biases are not tuned, as they are no part of a
storage; the schedule is a cosine. Tables are found on what the dense blocks give.
Oracle: closed forms in float64, brute force for the search (tests/oracles/test_calibration_qllm.py).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, field_validator

from ...errors import UsageError
from ...registry import MethodConfig, register
from .._activations import near
from .._channels import columns, identity, kind, reassembled
from .base import Calibrated, Calibration
from .reassembly import best_table
from .windows import checked_window


class QLLM(MethodConfig):
    channel_ratio: float = Field(0.1, ge=0, le=0.5, description="most channels that are added, as a part of the inputs; 0: none")
    search: int = Field(20, ge=1, description="numbers of added channels that are tried")
    r: int = Field(4, ge=0, description="rank of the correction; 0: none")
    alpha: float = Field(1.0, gt=0, description="the correction is alpha/r B A")
    lr: float = Field(5e-4, ge=0, description="of A and B")
    correction: Literal["inside", "beside"] = "inside"
    """Whether the correction is rounded with the weight while it is trained, or is added to the codes' values until the end."""
    window: tuple[int, int] = Field((4, 0), description="blocks that are trained together, and how many of them the next window has again")
    steps: int = Field(300, ge=1, description="of Adam, for each window; a batch each")

    _window = field_validator("window")(checked_window)


@register("calibration", "qllm", config=QLLM, title="QLLM", paper="2310.08041",
          summary="outlier channels split, similar ones merged, a low-rank correction trained by windows of blocks; for rounded inputs",
          bibtex="@inproceedings{liu2024qllm, title={{QLLM}: Accurate and Efficient Low-Bitwidth Quantization for Large Language Models}, "
                 "author={Liu, Jing and Gong, Ruihao and Wei, Xiuying and Dong, Zhiwei and Cai, Jianfei and Zhuang, Bohan}, "
                 "booktitle={ICLR}, year={2024}}")
class QLLMCalibration(Calibration):
    needs = frozenset({"samples", "max_abs"})
    student_needs = needs
    reassembles = True
    weights = (1.0,)

    @property
    def windowed(self):
        return self.config.r > 0

    @property
    def said_beside(self):
        """Windows tell the error with the correction beside the codes from that with it inside."""
        return self.config.correction == "beside"

    def distances(self, output, target):
        """(mean squared distance of tokens,)."""
        return (output - target).square().sum(-1).mean()[None]

    def student(self, source, quantizer, statistics=None):
        if quantizer.grid.joint:
            raise UsageError(f"calibration 'qllm' gives columns other neighbors, and here {quantizer.grid.joint}", remedy="storage: int4")
        weight = source.float()
        if statistics is None or not statistics.count:  # no token reached it: nothing is known of its channels
            return Corrected(weight, identity(weight.shape[1], weight.device), quantizer, self.config)
        samples, largest = (self.statistic(statistics, name).to(weight.device) for name in ("samples", "max_abs"))
        channels = best_table(weight, quantizer, samples, largest, self.config.channel_ratio, self.config.search)
        return Corrected(weight, channels, quantizer, self.config)

    def calibrate(self, weight, quantizer, statistics):
        if (found := getattr(statistics, "found", None)) is not None:
            return found
        samples = self.statistic(statistics, "samples").to(weight.device)
        self.statistic(statistics, "max_abs")
        student = self.student(weight, quantizer, statistics)
        if self.config.r:
            self._correct(student, near(reassembled(samples, student.channels), quantizer.activations), samples @ weight.float().T)
        return student.found()

    def _correct(self, student, inputs, wanted):
        """Train a student on inputs (n, in) as the codes get them and outputs (n, out)."""
        def error(t):
            return (inputs @ student.dense(t).T - wanted).square().mean()

        with torch.no_grad():
            before = error(1.0).clamp(min=1e-30)
        with torch.enable_grad():
            optimizer = torch.optim.Adam(student.groups)
            for step in range(self.config.steps):
                optimizer.param_groups[0]["lr"] = self.config.lr * (1 + math.cos(math.pi * step / self.config.steps)) / 2
                optimizer.zero_grad()
                (error(step / self.config.steps) / before).backward()
                optimizer.step()
        with torch.no_grad():
            if not error(1.0) < before:
                student.factors[0].zero_()

    def shapes(self, weight, quantizer):
        found = super().shapes(weight, quantizer)
        found.channels = torch.empty(2, weight.shape[1], dtype=kind(weight.shape[1]), device=weight.device)
        return found


class Corrected:
    """W' and a change of low rank. See windows.py for what a student offers; its columns are those of W'."""

    def __init__(self, weight, channels, quantizer, config):
        self.channels, self.quantizer, self.beside = channels, quantizer, config.correction == "beside"
        self.weight, self.size = columns(weight, channels), weight.numel()
        self.codes = quantizer.nearest(self.weight) if self.beside else None
        (rows, width), r = weight.shape, min(config.r, *weight.shape)
        self.scale = config.alpha / max(config.r, 1)
        down = torch.rand(r, width, generator=torch.Generator().manual_seed(0)).to(weight.device)
        self.factors = [torch.zeros(rows, r, device=weight.device), (2 * down - 1) / width**0.5]
        for each in self.factors:
            each.requires_grad_()
        self.groups = [{"params": self.factors, "lr": config.lr}]

    def _changed(self):
        return self.weight + self.scale * self.factors[0] @ self.factors[1]

    def dense(self, t):
        if self.beside and t < 1:
            return self.codes + self.scale * self.factors[0] @ self.factors[1]
        changed = self._changed()
        with torch.no_grad():
            off = self.quantizer.nearest(changed) - changed
        return changed + off

    def penalty(self, t):
        return 0.0

    @torch.no_grad()
    def found(self):
        changed = self._changed()
        parameters = self.quantizer.fit(changed)
        return Calibrated(self.quantizer.encode(changed, parameters), parameters, channels=self.channels)
