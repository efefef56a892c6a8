"""The fits of storage/lowrank_plus.py, where their equations are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..registry import lookup, make_config
from ._groups import GroupStorage
from ._low_rank import Measure, alternate, of_fisher, of_hessian
from .base import StorageConfig

FACTORS = {"fp16": torch.float16, "fp32": torch.float32, "int8": torch.int8}


def base_of(config: Any) -> tuple[type[GroupStorage], StorageConfig]:
    options = dict(config.base)
    name = options.pop("method")
    return lookup("storage", name).cls, make_config("storage", name, **options)


def factors(leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """L1 (out, r) and L2 (r, in), fp32, differentiable in the float leaves."""
    up, down = leaves["up"].float(), leaves["down"].float()
    if "up_scale" in leaves:
        return up * leaves["up_scale"].float(), down * leaves["down_scale"].float()[:, None]
    return up, down


class Fit:
    """One weight (out, in) -> the stored base, the leaves of the factors, and lambda."""

    def __init__(self, weight: Tensor, config: Any, statistics: Any):
        self.weight, self.config, self.statistics = weight.detach().float(), config, statistics
        self.base, self.options = base_of(config)
        self.r = min(config.r, *weight.shape)

    def kept(self, up: Tensor, down: Tensor) -> dict[str, Tensor]:
        """Factors as leaves."""
        dtype = FACTORS[self.config.factor_dtype]
        if dtype != torch.int8:
            top = torch.finfo(dtype).max
            return {"up": up.clamp(-top, top).to(dtype), "down": down.clamp(-top, top).to(dtype)}
        found = {}
        for name, value, along in (("up", up, 0), ("down", down, 1)):
            scale = (value.abs().amax(along) / 127).clamp(6e-8, 65504).to(torch.float16)
            unit = value / scale.to(value.dtype).unsqueeze(along)
            found |= {name: unit.round().clamp(-127, 127).to(torch.int8), f"{name}_scale": scale}
        return found

    def split(self, measure: Measure):
        def found(matrix):
            low = self.kept(*measure.factors(matrix, self.r))
            up, down = factors(low)
            return low, up @ down
        return found

    def quantize(self, matrix: Tensor, statistics: Any = None):
        stored = self.base.from_weight(matrix, self.options, statistics=statistics or self.statistics)
        return stored, stored.dequantize()

    def known(self, name: str, reader: str) -> Tensor:
        found = getattr(self.statistics, name, None)
        if found is None:
            raise UsageError(f"storage 'lowrank_plus' with {reader} reads {name} of each layer, and there is no such data",
                             remedy="give calibration data, or init: lq_lora with weighting: none")
        return found.to(self.weight.device)

    def measure(self) -> Measure:
        kind = self.config.weighting
        if kind == "none":
            return Measure()
        if kind == "fisher":
            return of_fisher(self.known("fisher", "weighting: fisher"))
        return of_hessian(self.known("hessian", f"weighting: {kind}"), kind == "diagonal")

    def lq_lora(self):
        measure = self.measure()
        stored, low, _ = alternate(self.weight, self.split(measure), self.quantize, lambda q, low: measure.error(self.weight - q - low),
                                   self.config.iterations)
        return stored, low, None

    def lorc(self):
        stored, dense = self.quantize(self.weight)
        return stored, self.split(self.measure())(self.weight - dense)[0], None

    def svdquant(self):
        x, expected = self.known("samples", "init: svdquant").float(), None
        largest = self.known("max_abs", "init: svdquant").float() if self.config.smooth_steps else None
        expected = x @ self.weight.T

        def decompose(scale: Tensor, rounds: int):
            wide, z = self.weight * scale.float(), x / scale.float()
            rounded, seen = _rounded(z, self.config.activation_bits), _smoothed(self.statistics, scale.float())

            def error(dense, product):
                return float(((rounded @ dense.T + z @ product.T - expected) ** 2).sum(dtype=torch.float64))

            return alternate(wide, self.split(Measure()), lambda matrix: self.quantize(matrix, seen), error, rounds)

        steps, scales = self.config.smooth_steps, [torch.ones(x.shape[1], dtype=torch.float16, device=x.device)]
        for a, c in [pair for k in range(1, steps) for pair in ((k / steps, 0.0), (k / steps, 1 - k / steps))]:
            scale = largest**a / self.weight.abs().amax(0) ** c
            usable = scale.isfinite() & (scale > 0)
            middle = scale[usable].log().mean().exp() if usable.any() else 1.0  # a common factor changes nothing but the range
            scales.append(torch.where(usable, scale / middle, 1.0).clamp(1e-3, 1e4).to(torch.float16))
        best = min(range(len(scales)), key=lambda i: decompose(scales[i], 1)[2]) if len(scales) > 1 else 0
        stored, low, _ = decompose(scales[best], self.config.iterations)
        return stored, low, scales[best]


def _smoothed(statistics: Any, scale: Tensor) -> Any:
    """Statistics of x / scale."""
    found = {name: None if (value := getattr(statistics, name)) is None else value / scale
             for name in ("hessian", "samples", "mean_abs", "max_abs")}
    if found["hessian"] is not None:
        found["hessian"] = found["hessian"] / scale[:, None]
    return SimpleNamespace(**found)


def _rounded(x: Tensor, bits: int, group: int = 64) -> Tensor:
    """x (tokens, in) as symmetric integers in groups along the input, each with its own scale."""
    if not bits:
        return x
    parts = []
    for part in x.split(group, 1):
        scale = (part.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)).clamp(min=1e-30)
        parts.append((part / scale).round() * scale)
    return torch.cat(parts, 1)
