"""NF4: 4-bit normal-float codes in blocks, the block maxima quantised once more (QLoRA, arXiv 2305.14314).

W (out, in), read row by row, is cut into blocks of B weights (the last may be short). With s_b = max |w| over block b:

    t = clamp(w / s_b, -1, 1),   code = number of midpoints of the code book strictly below t,   D(W) = book[code] * s_b

The product of fp32 book value and fp32 s_b is rounded once, to the compute dtype. Two codes share a byte, the even
index in the high nibble. With `double_quant` the s_b are kept in 8 bits: with o = mean(s), every 256 values of s - o are
scaled by their own fp32 maximum m and coded against the signed dynamic map:  s'_b = map[code8_b] * m + o.

Bits per weight: 4 + 8/B + 32/(256 B) and 32 bits a matrix (4.127 at B = 64), or 4 + 32/B without double quantisation.

Departures from the paper: none in the numbers. Codes, maxima and D(W) equal those of bitsandbytes on the CPU bit for bit,
which fixes two details: values of a short last block are divided by s_b, the others multiplied by 1/s_b; s - o is rounded
to a grid of 65536 steps before its nearest map entry is taken. As there, a block far below the mean of its maxima can get a
small negative s'_b under double quantisation; for all other blocks quantising D(W) gives the same codes again.
bitsandbytes' own modules re-pack their weight in place at the first inference; here its functions run on raw tensors only.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import torch
from pydantic import field_validator
from torch import Tensor, nn

from ..errors import ModelError, UsageError
from ..modeling.arithmetic import kind_of
from ..modeling.blockwise import BLOCK as NESTED_BLOCK
from ..modeling.blockwise import dequantize_blockwise, dynamic_map, map_on, quantize_blockwise
from ..registry import register
from . import _compiled
from ._coded import tiled_product, tiled_transposed
from ._tiles import row_tiles
from .base import Storage, StorageConfig, bytes_parameter, check_weight, has_values, view_as

#: the 16 values of the code book (exact in fp32)
NF4_VALUES = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
              -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
              0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
#: weights dequantised at a time: on a CPU index and fp32 values of a chunk stay in the cache, elsewhere they are bounded
CHUNK, CHUNK_ELSEWHERE = 1 << 18, 1 << 24


class NF4(StorageConfig):
    block_size: int = 64
    """Weights that share one scale: 32, 64, ... 4096."""
    double_quant: bool = True
    """Keep the scales in 8 bits (0.373 bits a weight less at block 64)."""
    compute: Literal["auto", "pytorch", "bitsandbytes", "numba"] = "auto"
    """Who dequantises; the values are the same. auto: on CUDA bitsandbytes, on a CPU a loop that numba compiles. Without numba bitsandbytes
    for fp32, and for 16 bits where it has vector code for them (AVX-512, Arm). PyTorch where these are not installed."""

    @field_validator("block_size")
    @classmethod
    def _known_block(cls, value: int) -> int:
        if value not in BLOCK_SIZES:
            raise ValueError(f"must be one of {', '.join(map(str, BLOCK_SIZES))}")
        return value


@register("storage", "nf4", config=NF4, title="QLoRA: 4-bit NormalFloat with double quantization", lossless=False,
          summary="16 quantiles of a normal distribution in blocks of 64, 8-bit scales: 4.127 bits a weight",
          paper="2305.14314", aliases=("bnb-4bit", "normal-float-4"),
          bibtex="@inproceedings{dettmers2023qlora, title={{QLoRA}: Efficient Finetuning of Quantized {LLM}s}, "
                 "author={Dettmers, Tim and Pagnoni, Artidoro and Holtzman, Ari and Zettlemoyer, Luke}, "
                 "booktitle={Advances in Neural Information Processing Systems}, year={2023}}")
class NF4Storage(Storage):
    """Leaves: `codes` (ceil(out*in/2),) uint8, and `absmax` (blocks,) fp32 or, with double_quant, `absmax_codes` (blocks,)
    uint8, `absmax_scale` (ceil(blocks/256),) fp32 and `absmax_offset` (1,) fp32. All are kept as frozen uint8 Parameters."""

    trainable_leaves = ("absmax", "absmax_scale", "absmax_offset")

    def __init__(self, out_features: int, in_features: int, config: NF4, leaves: dict[str, Tensor], bias: Tensor | None,
                 compute_dtype: torch.dtype):
        super().__init__(out_features, in_features, bias, compute_dtype)
        if not {"bitsandbytes": _importable, "numba": _compiled.available}.get(config.compute, lambda: True)():
            raise UsageError(f"storage 'nf4' was asked to compute with {config.compute}, which is not installed",
                             remedy=f"pip install {config.compute}, or choose compute: auto")
        self.options = config
        for name, value in leaves.items():
            self.register_parameter(name, bytes_parameter(value))

    @classmethod
    @torch.no_grad()
    def from_weight(cls, weight, config, *, bias=None, dtype=None, statistics=None, generator=None):
        check_weight(weight, "nf4 storage")
        block = config.block_size
        if has_values(weight):
            codes, absmax = quantize(weight, block)
        else:
            codes = weight.new_empty(-(-weight.numel() // 2), dtype=torch.uint8)
            absmax = weight.new_empty(-(-weight.numel() // block), dtype=torch.float32)
        leaves = {"codes": codes, **(quantize_absmax(absmax) if config.double_quant else {"absmax": absmax})}
        return cls(*weight.shape, config, leaves, bias, dtype or weight.dtype)

    @classmethod
    def from_checkpoint(cls, tensors: Mapping[str, Tensor], quantization_config: Mapping[str, Any] | None = None):
        """A module of a published 4-bit bitsandbytes checkpoint: `weight` (packed), `weight.absmax`, `weight.quant_map`,
        `weight.quant_state.bitsandbytes__nf4`, with `weight.nested_absmax` and `weight.nested_quant_map` where the scales
        are quantised, and `bias`. The codes are kept. quantization_config: `bnb_4bit_compute_dtype` sets the compute dtype
        (default: the one the weight was quantised from). Raises ModelError on missing or inconsistent tensors and on
        another code book (FP4)."""
        state = _quant_state(tensors)
        (out_features, in_features), block = state["shape"], state["blocksize"]
        nested = "weight.nested_absmax" in tensors
        if nested and state.get("nested_blocksize") != NESTED_BLOCK:
            raise ModelError(f"the checkpoint quantises scales in blocks of {state.get('nested_blocksize')}; only 256 is known")
        _same_map(tensors["weight.quant_map"], torch.tensor(NF4_VALUES), "weight.quant_map")
        leaves = {"codes": tensors["weight"].contiguous().view(torch.uint8).reshape(-1)}
        if nested:
            _same_map(tensors["weight.nested_quant_map"], dynamic_map(), "weight.nested_quant_map")
            offset = torch.tensor([state["nested_offset"]], dtype=torch.float32, device=leaves["codes"].device)
            leaves.update(absmax_codes=tensors["weight.absmax"], absmax_scale=tensors["weight.nested_absmax"].float(),
                          absmax_offset=offset)
        else:
            leaves["absmax"] = tensors["weight.absmax"].float()
        expected = _leaf_sizes(out_features * in_features, block, nested)
        if wrong := [k for k, size in expected.items() if leaves[k].numel() != size]:
            raise ModelError(f"quantized checkpoint: {', '.join(wrong)} do not fit a weight of {out_features} x {in_features}",
                             remedy="the model file is damaged; load it anew")
        wanted = (quantization_config or {}).get("bnb_4bit_compute_dtype") or state["dtype"]
        dtype = wanted if isinstance(wanted, torch.dtype) else getattr(torch, str(wanted).removeprefix("torch."))
        config = NF4(block_size=block, double_quant=nested)
        return cls(out_features, in_features, config, leaves, tensors.get("bias"), dtype)

    @classmethod
    @torch.no_grad()
    def joined(cls, parts):
        """Scales that were quantised are kept as what they stand for, in fp32: each part has an offset of its own."""
        first = cls.alike(parts, parts[0].options.block_size)
        leaves = {"codes": torch.cat([part.leaves()["codes"] for part in parts]), "absmax": torch.cat([part.scales() for part in parts])}
        options = first.options.model_copy(update={"double_quant": False})
        return cls(sum(part.out_features for part in parts), first.in_features, options, leaves, None, first.compute_dtype)

    def leaves(self):
        floats, names = self.trainable_leaves, _leaf_sizes(1, self.options.block_size, self.options.double_quant)
        return {n: view_as(getattr(self, n).detach(), torch.float32 if n in floats else torch.uint8) for n in names}

    def scales(self, leaves: dict[str, Tensor] | None = None) -> Tensor:
        """The scale of every block, (blocks,) fp32, differentiable in the given leaves."""
        if leaves and "absmax" in leaves:
            return leaves["absmax"]

        def leaf(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
            return leaves[name] if leaves and name in leaves else view_as(self._parameters[name], dtype)

        if not self.options.double_quant:
            return leaf("absmax")
        codes, scale, offset = leaf("absmax_codes", torch.uint8), leaf("absmax_scale"), leaf("absmax_offset")
        known = codes.device.type in ("cpu", "cuda") and self.options.compute in ("auto", "bitsandbytes") and _importable()
        if leaves is None and known and has_values(codes):
            return _operation("dequantize_blockwise")(codes, scale, map_on(codes.device), NESTED_BLOCK, torch.float32).add_(offset)
        return dequantize_absmax(codes, scale, offset)

    def dequantize(self, leaves=None):
        """W (out, in) in the compute dtype. leaves: any of `leaves()`, or `absmax` (blocks,) fp32 for the scales as a
        whole, also under double quantisation; differentiable in the float ones. Raises UsageError on an unknown leaf."""
        if leaves is None:
            return self.dense_as(self.compute_dtype)
        if unknown := set(leaves) - set(_leaf_sizes(1, 64, True)) - {"absmax"}:
            raise UsageError(f"storage 'nf4' has no leaf '{sorted(unknown)[0]}'", remedy=f"leaves: {', '.join(self.leaves())}")
        codes, size = leaves.get("codes", self.codes), self.out_features * self.in_features
        with torch.no_grad():
            values = _values(codes, torch.ones_like(self.scales()), size, self.options.block_size, torch.float32, torch.float32)
        scaled = values * _per_weight(self.scales(leaves), values, self.options.block_size)
        return scaled.to(self.compute_dtype).view(self.out_features, self.in_features)

    @torch.no_grad()
    def dense_as(self, dtype: torch.dtype) -> Tensor:
        return self._decode(self.codes, self.scales(), self.out_features, dtype)

    def _decode(self, codes: Tensor, absmax: Tensor, rows: int, dtype: torch.dtype, out: Tensor | None = None,
                rounding: torch.dtype | None = None) -> Tensor:
        """codes and absmax of `rows` whole rows, the first of which starts with a block -> (rows, in) in dtype, rounded on the way to
        `rounding`, by default the compute dtype. out (rows * in,): may be filled with it."""
        block, rounding, who = self.options.block_size, rounding or self.compute_dtype, self._who(codes.device)
        if who == "bitsandbytes" and (kind_of(codes.device) != "cpu" or rounding == torch.float32 or _vector_code()):
            return _bitsandbytes(codes, absmax, (rows, self.in_features), block, rounding).to(dtype)
        if who == "numba" and dtype == rounding == torch.float32 and _compiled.decodes(codes, absmax):  # in as few calls as can be
            out = torch.empty(rows * self.in_features, device=codes.device) if out is None else out
            return _compiled.decode_table(codes, absmax, block, NF4_VALUES, out, high_first=True).view(rows, self.in_features)
        return _values(codes, absmax, rows * self.in_features, block, rounding, dtype, who, out).view(rows, self.in_features)

    def _who(self, device: torch.device) -> str:
        """Who decodes. The vector code of bitsandbytes takes for granted that every row starts with its own block."""
        wanted = self.options.compute
        if self._loops() and kind_of(device) == "cpu" and _compiled.decodes():
            return "numba"
        fits = not self.in_features % self.options.block_size and self.options.block_size <= 1024 and self.compute_dtype != torch.float64
        if fits and wanted in ("auto", "bitsandbytes") and _importable():
            quick = kind_of(device) == "cuda" or kind_of(device) == "cpu" and (_vector_code() or self.compute_dtype == torch.float32)
            if quick or wanted == "bitsandbytes":
                return "bitsandbytes"
        return "pytorch"

    # -- products, tile by tile -------------------------------------------------------------------------------------
    def forward_product(self, x):
        block = self.options.block_size
        run = math.gcd(self.in_features, block)  # columns that never lie in two blocks
        if self._loops() and _compiled.suits(x, 4, run):
            y = _compiled.few_product(x, self.codes, 4, self.scales(), 0, block, run, table=NF4_VALUES, high_first=True)
            return y.to(x.dtype)
        return tiled_product(x, self._tiles(), self._decoder())

    def _loops(self) -> bool:
        return self.options.compute in ("auto", "numba")

    def transposed(self, grad):
        rounding = torch.float32 if self._loops() and _compiled.few(grad) else None  # few rows meet values that nothing rounds, both ways
        return tiled_transposed(grad, self._tiles(), self._decoder(rounding))

    def _tiles(self) -> list[slice]:
        block = self.options.block_size
        return row_tiles(self.out_features, self.in_features, block // math.gcd(self.in_features, block))

    def _decoder(self, rounding: torch.dtype | None = None):
        """Rows of W in a dtype, rounded as by `_decode`; the rows start with a block (and so, as blocks are even, with a byte)."""
        columns, absmax, block = self.in_features, self.scales(), self.options.block_size
        scratch: Tensor | None = None  # of all tiles but a shorter last one: where one was is in the cache

        def decode(rows: slice, dtype: torch.dtype) -> Tensor:
            nonlocal scratch
            if rows.stop - rows.start == self.out_features:  # without slices, calls that a small matrix feels
                return self._decode(self.codes, absmax, self.out_features, dtype, None, rounding)
            first, last = rows.start * columns, rows.stop * columns
            codes, own = self.codes[first // 2: -(-last // 2)], absmax[first // block: -(-last // block)]
            if scratch is None or scratch.numel() != last - first:
                scratch = torch.empty(last - first, dtype=dtype, device=codes.device)
            return self._decode(codes, own, rows.stop - rows.start, dtype, scratch, rounding)

        return decode

    @torch.no_grad()
    def rows(self, index):
        """Rows (n,) int64 of W: (n, in). Only those rows are decoded when blocks do not run over the end of a row."""
        if self.in_features % self.options.block_size:
            return super().rows(index)
        codes = self.codes.view(self.out_features, -1).index_select(0, index).view(-1)
        absmax = self.scales().view(self.out_features, -1).index_select(0, index).view(-1)
        return self._decode(codes, absmax, index.numel(), self.compute_dtype)

    def fake_quantize(self, weight, leaves=None):
        """D(Q(weight)) (out, in) in the compute dtype, against the given scales (default: weight's own block maxima);
        the gradient of an unclipped weight goes straight through, that of the scales through the code book."""
        block, flat = self.options.block_size, weight.reshape(-1).float()
        straight = flat - flat.detach()
        if leaves is None:
            codes, absmax = quantize(weight.detach(), block)
            leaves = quantize_absmax(absmax) if self.options.double_quant else {"absmax": absmax}
        else:
            with torch.no_grad():
                unit = flat / _per_weight(self.scales(leaves), flat, block)
            codes = _pack(_nearest(unit))
            straight = torch.where(unit.abs() <= 1, straight, torch.zeros_like(flat))
        value = self.dequantize({**leaves, "codes": codes})
        return value + straight.view_as(weight).to(value.dtype)


# -- the format ---------------------------------------------------------------------------------------------------------
def normal_float(bits: int) -> Tensor:
    """Code book of the normal-float type of `bits` bits, (2**bits,) fp32, sorted, from -1 to 1 with an exact 0.

    2**(bits-1) positive and one fewer negative values: normal quantiles at equally spaced probabilities (fp32) between 1/2
    and 0.9677083 (the mean of 1 - 1/32 and 1 - 1/30, to seven digits), divided by the largest."""
    from scipy.stats import norm

    half = 2 ** (bits - 1)
    sides = [sign * torch.from_numpy(norm.ppf(torch.linspace(0.9677083, 0.5, count + 1)[:-1].numpy())).float()
             for sign, count in ((1, half), (-1, half - 1))]
    book = torch.cat([*sides, torch.zeros(1)]).sort().values
    return book / book.max()


def quantize(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """weight (out, in), finite, any float dtype -> packed codes (ceil(n/2),) uint8 and block maxima (ceil(n/block),) fp32."""
    flat = weight.detach().reshape(-1)
    packed, maxima = [], []
    for part in flat.split(1 << 20):  # a bounded number of weights in fp32 at a time; a multiple of every block size
        part = part.float()
        full = part.numel() // block * block
        blocks = part[:full].view(-1, block)
        maxima.append(blocks.abs().amax(1))
        scaled = (blocks * (1 / maxima[-1].clamp(min=1e-38))[:, None]).view(-1)
        if full < part.numel():
            maxima.append(part[full:].abs().amax(0, keepdim=True).clamp(min=1e-38))
            scaled = torch.cat([scaled, part[full:] / maxima[-1]])
        packed.append(_pack(_nearest(scaled)))
    return torch.cat(packed), torch.cat(maxima)


def quantize_absmax(absmax: Tensor) -> dict[str, Tensor]:
    """Block maxima (blocks,) fp32 -> leaves absmax_codes (blocks,) uint8, absmax_scale (ceil(blocks/256),), absmax_offset (1,),
    both fp32."""
    offset = absmax.mean().reshape(1)
    codes, scale = quantize_blockwise(absmax - offset, grid=True)
    return {"absmax_codes": codes, "absmax_scale": scale, "absmax_offset": offset}


def dequantize_absmax(codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """The inverse of quantize_absmax: (blocks,) fp32, differentiable in scale and offset."""
    return dequantize_blockwise(codes, scale) + offset


def _values(codes: Tensor, absmax: Tensor, size: int, block: int, rounding: torch.dtype, dtype: torch.dtype,
            who: str = "pytorch", out: Tensor | None = None) -> Tensor:
    """book[code] * absmax, (size,), rounded to `rounding` and kept as `dtype`. The product is fp32 times fp32, rounded once,
    hence no 16-bit table. On a CPU it is done chunk by chunk, so that only the result leaves the cache. who: whose the fp32 values of a
    chunk are; bitsandbytes' own 16-bit output is slow where it has no vector code for it."""
    out, real = torch.empty(size, dtype=dtype, device=codes.device) if out is None else out, has_values(codes)
    if who == "numba" and real and not _compiled.serves(codes, absmax):
        who = "pytorch"
    direct = dtype == rounding == torch.float32 and who == "pytorch" and size % 2 == 0  # the result as the scratch
    chunk = min((4 * CHUNK if direct else CHUNK) if kind_of(codes.device) == "cpu" else CHUNK_ELSEWHERE, size + size % 2)
    scratch = None if direct or who == "bitsandbytes" and real else torch.empty(chunk, dtype=torch.float32, device=codes.device)
    index = torch.empty(chunk // 2, dtype=torch.int32, device=codes.device) if who == "pytorch" else None
    rounded = None if dtype == rounding else torch.empty(chunk, dtype=rounding, device=codes.device)
    for start in range(0, size if real else 0, chunk):
        stop = min(start + chunk, size)
        packed, scale = codes[start // 2: -(-stop // 2)], absmax[start // block: -(-stop // block)]
        own = out[start:stop] if direct else scratch
        if who == "bitsandbytes":
            values = _bitsandbytes(packed, scale, (1, stop - start), block, torch.float32).view(-1)
        elif who == "numba":
            values = _compiled.decode_table(packed, scale, block, NF4_VALUES, own[: stop - start], high_first=True)
        else:
            values = _look_up(packed, scale, block, index[: packed.numel()], own)[: stop - start]
        if not direct:
            out[start:stop].copy_(values if rounded is None else rounded[: stop - start].copy_(values))
        del values  # or two chunks would be alive at a time
    return out


def _look_up(packed: Tensor, scale: Tensor, block: int, index: Tensor, scratch: Tensor) -> Tensor:
    """Both values of a byte at once: the table's 256 entries are pairs of fp32, moved as one int64. Fills (a part of) scratch."""
    values = scratch[: 2 * packed.numel()]
    torch.index_select(_pairs(packed.device).view(torch.int64).view(-1), 0, index.copy_(packed), out=values.view(torch.int64))
    full = values.numel() // block * block
    if full == values.numel():
        values.view(-1, block).mul_(scale[:, None])
    else:
        values[:full].view(-1, block).mul_(scale[: full // block, None])
        values[full:].mul_(scale[-1])
    return values


def _bitsandbytes(codes: Tensor, absmax: Tensor, shape: tuple[int, int], block: int, dtype: torch.dtype) -> Tensor:
    if not has_values(codes):
        return torch.empty(shape, dtype=dtype, device=codes.device)
    return _operation("dequantize_4bit")(codes, absmax, block, "nf4", shape, dtype)


@cache
def _operation(name: str) -> Callable[..., Tensor]:
    """An operation of bitsandbytes as PyTorch knows it: what its functions end in after half a dozen calls and checks, which a small
    matrix feels."""
    import bitsandbytes  # noqa: F401 (registers them)

    return getattr(torch.ops.bitsandbytes, name).default


def _nearest(unit: Tensor) -> Tensor:
    """Index of the nearest code-book value of numbers in [-1, 1] (others are clamped), ties to the lower: (n,) uint8."""
    book = torch.tensor(NF4_VALUES, device=unit.device)
    return torch.bucketize(unit.clamp(-1, 1), (book[:-1] + book[1:]) / 2, out_int32=True).to(torch.uint8)


def _pack(index: Tensor) -> Tensor:
    """(n,) codes below 16 -> (ceil(n/2),) bytes, even index in the high nibble; an odd end is filled with the code of 0."""
    if index.numel() % 2:
        index = nn.functional.pad(index, (0, 1), value=7)
    return (index[::2] << 4) | index[1::2]


def _per_weight(absmax: Tensor, flat: Tensor, block: int) -> Tensor:
    return absmax.repeat_interleave(block)[: flat.numel()]


def _leaf_sizes(size: int, block: int, double_quant: bool) -> dict[str, int]:
    """Elements of every leaf for a matrix of `size` weights."""
    blocks = -(-size // block)
    scales = {"absmax_codes": blocks, "absmax_scale": -(-blocks // NESTED_BLOCK), "absmax_offset": 1}
    return {"codes": -(-size // 2), **(scales if double_quant else {"absmax": blocks})}


@cache
@torch.inference_mode(False)
def _pairs(device: torch.device) -> Tensor:
    """Both values of every byte, (256, 2) fp32."""
    byte, book = torch.arange(256), torch.tensor(NF4_VALUES)
    return torch.stack([book[byte >> 4], book[byte & 15]], 1).to(device)


@cache
def _importable() -> bool:
    return find_spec("bitsandbytes") is not None


@cache
def _vector_code() -> bool:
    """Whether bitsandbytes has vector code for 16-bit outputs on this CPU."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512") or platform.machine() in ("aarch64", "arm64")


# -- published checkpoints -----------------------------------------------------------------------------------------------
def _quant_state(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The JSON record of a bitsandbytes tensor, checked."""
    kinds = [k for k in tensors if k.startswith("weight.quant_state.")]
    if kinds != ["weight.quant_state.bitsandbytes__nf4"]:
        raise ModelError(f"not an NF4 tensor of bitsandbytes: found {', '.join(kinds) or 'no weight.quant_state'}",
                         remedy="only bnb_4bit_quant_type 'nf4' is read; load the dense checkpoint of the model")
    try:
        state = json.loads(bytes(tensors[kinds[0]].tolist()))
        shape, block = [int(n) for n in state["shape"]], int(state["blocksize"])
    except (ValueError, KeyError, TypeError):
        raise ModelError("the quantization record of the checkpoint is unreadable",
                         remedy="the model file is damaged; load it anew") from None
    needed = ["weight", "weight.absmax", "weight.quant_map"]
    needed += ["weight.nested_quant_map"] if "weight.nested_absmax" in tensors else []
    if missing := [k for k in needed if k not in tensors]:
        raise ModelError(f"quantized checkpoint: {', '.join(missing)} missing", remedy="the model file is damaged; load it anew")
    if len(shape) != 2 or block not in BLOCK_SIZES or state.get("quant_type") != "nf4":
        raise ModelError(f"quantized checkpoint of an unknown kind: shape {shape}, block {block}, {state.get('quant_type')}")
    return {**state, "shape": shape, "blocksize": block}


def _same_map(found: Tensor, expected: Tensor, name: str) -> None:
    found = found.detach().float().cpu().reshape(-1)
    if found.shape != expected.shape or (found - expected).abs().max() > 1e-6:
        raise ModelError(f"quantized checkpoint: {name} is not the code book of this format")
