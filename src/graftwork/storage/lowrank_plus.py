"""Quantised plus low-rank: W ~ Q + L1 L2, as LQ-LoRA (arXiv 2311.12023), LoRC of ZeroQuant-FP (2307.09782) and SVDQuant (2411.05007).

W (out, in); Q in any format of groups (`base`, with any calibration), L1 (out, r), L2 (r, in) in 16 or 8 bits, lambda (in,) fp16:

    D(W) = (D(Q) + L1 L2) / lambda,      W x = D(Q) z + L1 (L2 z),   z = x / lambda   (lambda only with svdquant)

Products never form the sum. `init`:
    lq_lora   from Q = 0: L1 L2 <- the nearest of rank r to W - Q, Q <- quantise(W - L1 L2), until the error grows; the best is kept.
              `weighting`: what nearest means. none: |E|_F. diagonal, hessian: |E x|^2 over inputs, by the diagonal of H or all of it (the
              factors are exact for that). fisher: errors count by F (out, in), the factors by the roots of its row and column means
    lorc      Q <- quantise(W), then L1 L2 <- the nearest to W - Q, once: |E|_F^2 is the sum of the squared singular values beyond r
    svdquant  lambda_j = max |x_j|^a / max |w_j|^c over (0, 0), (k/n, 0), (k/n, 1 - k/n), k < n = `smooth_steps`; for each, one round of the
              alternation on W lambda; the least error of outputs on samples wins, and there the alternation goes on by that error. With
              `activation_bits`, samples go through the quantised part rounded (symmetric, per token in groups of 64), as they will be

Factors are rounded before Q is fitted to what they leave. r is cut at min(out, in).

Bits a weight: those of the base, + f r (out + in) / (out in), f = 16 (32, 8) bits, + 32 r / (out in) of fp16 scales with 8-bit
factors, + 16 / out with svdquant.

Departures. LQ-LoRA: keeps the best iterate, where its code returns the one after; groups along a row; its nested 8-bit scales are
`base: {method: nf, scale_dtype: int8}`. SVDQuant: sqrt(S) in both factors instead of S in L1; no L2 shared by weights of one input;
activations are not quantised by this format. INT2.1 trains its correction by distillation, for which no storage has the gradients: that
is a LoRA on `int2` with objective `distill`.
Factors of sides above 1,536 come from a randomised range (seeded).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from torch import Tensor

from ..errors import UsageError
from ..modeling.arithmetic import dtype_for, product_dtype
from ..modeling.protocols import has_values
from ..registry import lookup, make_config, register
from ._coded import CodedStorage
from ._groups import GroupStorage, _mapping
from ._low_rank_fit import Fit, base_of, factors
from .base import StorageConfig, check_weight


def _resolved(value: dict[str, Any]) -> dict[str, Any]:
    options = dict(value)
    info = lookup("storage", options.pop("method", "nf"))
    if not issubclass(info.cls, GroupStorage):
        raise UsageError(f"storage 'lowrank_plus': base '{info.name}' is no format of groups along the input", remedy="base: nf, int4, ...")
    return {"method": info.name, **make_config("storage", info.name, **options).model_dump(exclude={"skip_modules"})}


class LowRankPlus(StorageConfig):
    base: Annotated[dict[str, Any], BeforeValidator(_mapping), AfterValidator(_resolved)] = {"method": "nf"}
    """The format of Q: a name or {method, options}."""
    r: int = Field(16, ge=1, description="rank of the factors")
    init: Literal["lq_lora", "lorc", "svdquant"] = "lq_lora"
    factor_dtype: Literal["fp16", "fp32", "int8"] = "fp16"
    iterations: int = Field(20, ge=1, description="lq_lora, svdquant: most rounds of the alternation (100 in the papers)")
    weighting: Literal["none", "diagonal", "hessian", "fisher"] = "none"
    smooth_steps: int = Field(20, ge=0, description="svdquant: steps of the search for lambda; 0: none, lambda = 1")
    activation_bits: int = Field(0, ge=0, le=8, description="svdquant: bits that activations will have; 0: they are not quantised")

    @model_validator(mode="after")
    def _consistent(self):
        if self.init == "svdquant" and self.weighting != "none":
            raise ValueError("svdquant goes by the error of the outputs: weighting must be none")
        if self.activation_bits == 1:
            raise ValueError("activation_bits: 0 or 2 to 8")
        return self


@register("storage", "lowrank_plus", config=LowRankPlus, title="Quantised plus low-rank", lossless=False, paper="2311.12023",
          aliases=("lq-lora", "lorc", "svdquant"),
          summary="codes of any format of groups and a 16-bit low-rank part fitted together",
          bibtex="@inproceedings{guo2024lqlora, title={{LQ-LoRA}: Low-rank Plus Quantized Matrix Decomposition for Efficient Language "
                 "Model Finetuning}, author={Guo, Han and Greengard, Philip and Xing, Eric P. and Kim, Yoon}, booktitle={ICLR}, "
                 "year={2024}}")
class LowRankPlusStorage(CodedStorage):
    """Leaves: those of the base with `base_` before their names, `up` (out, r), `down` (r, in), with int8 `up_scale`, `down_scale` (r,)
    fp16; `input_scale` (in,) fp16 with svdquant."""

    trainable_leaves = ("up", "down", "up_scale", "down_scale")

    def __init__(self, out_features, in_features, config, leaves, bias, compute_dtype):
        super().__init__(out_features, in_features, config, leaves, bias, compute_dtype)
        cls, options = base_of(config)
        own = {name.removeprefix("base_"): value for name, value in leaves.items() if name.startswith("base_")}
        base = cls(out_features, in_features, options, own, None, torch.float32)
        base._parameters.clear()  # the codes are leaves of this module; what stays knows how to decode them
        self._base = (base,)  # in a tuple: no module of the model

    @classmethod
    def needs(cls, config):
        base, options = base_of(config)
        own = {"samples", "max_abs"} if config.init == "svdquant" else {"hessian"} if config.weighting in ("diagonal", "hessian") else ()
        return base.needs(options) | frozenset(own)

    @classmethod
    def without_data(cls, config):
        base, options = base_of(config)
        plain = base.without_data(options)
        return config.model_copy(update={"base": {"method": plain.method, **plain.model_dump(exclude={"skip_modules"})},
                                         "init": "lq_lora" if config.init == "svdquant" else config.init, "weighting": "none"})

    @classmethod
    @torch.no_grad()
    def from_weight(cls, weight, config, *, bias=None, dtype=None, statistics=None, generator=None):
        check_weight(weight, "lowrank_plus storage")
        fit = Fit(weight, config, statistics)
        if not has_values(weight):
            low = fit.kept(weight.new_empty((weight.shape[0], fit.r)), weight.new_empty((fit.r, weight.shape[1])))
            stored = fit.base.from_weight(weight.float(), fit.options)
            scale = weight.new_empty(weight.shape[1], dtype=torch.float16) if config.init == "svdquant" else None
        else:
            stored, low, scale = getattr(fit, config.init)()
        leaves = {**{f"base_{name}": value for name, value in stored.leaves().items()}, **low}
        if scale is not None:
            leaves["input_scale"] = scale
        return cls(*weight.shape, config, leaves, bias, dtype or weight.dtype)

    def _parts(self, leaves: dict[str, Tensor], rows: slice) -> Tensor:
        return self._base[0].decode({name.removeprefix("base_"): leaf for name, leaf in leaves.items() if name.startswith("base_")}, rows)

    def decode(self, leaves, rows):
        up, down = factors(leaves)
        dense = self._parts(leaves, rows) + up[rows] @ down
        return dense / leaves["input_scale"].float() if "input_scale" in leaves else dense

    # -- products without the sum; in float64, by tiles of it, since `dequantize` is a sum in fp32 -----------------------
    def product(self, x, leaves=None):
        if leaves is None or self.compute_dtype == torch.float64:
            return super().product(x, leaves)
        leaves = self._given(leaves)
        up, down = (each.to(x.dtype) for each in factors(leaves))
        z = (x / leaves["input_scale"].float()).to(x.dtype) if "input_scale" in leaves else x
        dense = self._parts(leaves, slice(0, self.out_features)).to(self.compute_dtype).to(x.dtype)
        return F.linear(z, dense) + F.linear(F.linear(z, down), up)

    def forward_product(self, x):
        if torch.float64 in (self.compute_dtype, x.dtype):
            return super().forward_product(x)
        dtype, leaves = dtype_for(x), self.leaves()
        z = ((x / leaves["input_scale"].float()) if "input_scale" in leaves else x).to(dtype)
        up, down = (each.to(self.compute_dtype).to(dtype) for each in factors(leaves))
        low, y = F.linear(z, down), torch.empty(*x.shape[:-1], self.out_features, dtype=x.dtype, device=x.device)
        for rows in self._tiles():
            y[..., rows] = F.linear(z, self._parts(leaves, rows).to(self.compute_dtype).to(dtype)) + F.linear(low, up[rows])
        return y

    def transposed(self, grad):
        if torch.float64 in (self.compute_dtype, grad.dtype):
            return super().transposed(grad)
        dtype, leaves = product_dtype(grad.dtype, grad.device), self.leaves()
        up, down = (each.to(self.compute_dtype).to(dtype) for each in factors(leaves))
        wide = grad.to(dtype)
        found = (wide @ up) @ down
        for rows in self._tiles():
            found += wide[..., rows] @ self._parts(leaves, rows).to(self.compute_dtype).to(dtype)
        return (found / leaves["input_scale"].float() if "input_scale" in leaves else found).to(grad.dtype)

    def fake_quantize(self, weight, leaves=None):
        """D(Q(weight)). Given factors stay: Q is fitted to what they leave; straight through to weight, and to the factors with Q as
        it is."""
        if leaves is None:
            return super().fake_quantize(weight)
        leaves = self._given(leaves)
        cls, options = base_of(self.options)
        with torch.no_grad():
            up, down = factors(leaves)
            scale = leaves["input_scale"].float() if "input_scale" in leaves else 1.0
            own = cls.from_weight(weight.float() * scale - up @ down, cls.without_data(options)).leaves()
        value = self.dequantize({**leaves, **{f"base_{name}": leaf for name, leaf in own.items()}})
        return value + (weight - weight.detach()).to(value.dtype)
