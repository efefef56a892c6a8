"""Published quantised checkpoints (GPTQ, AWQ, compressed-tensors, FP8 blocks, MXFP4) as storages, their codes kept.

`storage_of_checkpoint` says which storage a checkpoint's `quantization_config` belongs to, `read` makes it of one module's tensors. Codes
are laid out anew (packed along the input, row by row), never rounded: D(W) are the published values, rounded once from fp32 to
the compute dtype, which is the dtype of the scales (bf16 where these are fp32 or exponents).

    format                        tensors of a module, W (out, in), groups of g                            value
    gptq                          qweight (in b/32, out) int32, qzeros (in/g, out b/32), scales (in/g, out), g_idx (in,)
                                                                                    (q - (z + 1 mod 2^b)) s;  gptq_v2: (q - z) s
    awq, version gemm             qweight (in, out/8), qzeros (in/g, out/8), scales (in/g, out); word c, nibble i is column
                                  8 c + (0 2 4 6 1 3 5 7)[i]                        (q - z) s
    compressed-tensors
      pack-quantized              weight_packed (out, in b/32) int32, weight_scale (out, in/g), weight_shape, with zero points
                                  weight_zero_point (out b/32, in/g), with act-order weight_g_idx (in,)     (q - 2^(b-1)) s, (q - z) s
      int-quantized, naive-       weight (out, in) int8, weight_scale (out, 1)      q s
      float-quantized, naive-     weight (out, in) E4M3, weight_scale (out, 1), (1,) or of blocks           q s
    fp8 (DeepSeek, Qwen)          weight (out, in) E4M3, weight_scale_inv (out/128, in/128)                 q s
    bitsandbytes, NF4             storage/nf4.py has it
    mxfp4, per expert of gpt-oss  blocks (out, in/32, 16) bytes, low nibble first, scales (out, in/32)      2^(s - 127) q

int32 words are streams of bits from the lowest up, also where a 3-bit code lies across two. GPTQ keeps zero points less one: a kept
2^b - 1 can only come of a zero point 0, since 2^b is none, and is read so. Columns in another order than their groups (act-order) keep
`group_index` (in,) int32 as a leaf. 4-, 3- and 2-bit codes become int4, int3, int2 storages, 8-bit ones int8, whose scale and zero are
fp32; E4M3 ones fp8; MXFP4 fp4. Activation schemes are not applied: inputs stay in the compute dtype.

Which tensors of a folder are a module's, and how experts are read, whose maps files keep apart and models fuse: _published_folder.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError, UsageError
from ..modeling.protocols import has_values
from ..registry import lookup, make_config
from ._packing import pack, packed_width, unpack
from .base import Storage, StorageConfig

#: column of a word of AWQ that nibble i holds
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_FLOAT = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
#: what formats call the modules that stay dense
_SKIPPED = ("modules_to_not_convert", "ignored_layers", "ignore", "llm_int8_skip_modules")
_DENSE = "load the dense checkpoint of the model and choose a storage, for example `storage: nf4`"


def _plain(document: Any) -> dict[str, Any]:
    return dict(document) if isinstance(document, Mapping) else document.to_dict()


def _refuse(what: str) -> UsageError:
    return UsageError(f"published quantized checkpoint: {what}", remedy=_DENSE)


def _misfit(what: str) -> ModelError:
    return ModelError(f"quantized checkpoint: {what}", remedy="the files belong to another config, or are damaged: get them again")


def storage_of_checkpoint(quantization_config: Any) -> tuple[str, StorageConfig]:
    """(storage name, its options) of a checkpoint's `quantization_config` (a mapping, or Transformers' object). Scales may turn out to be
    of another dtype and `symmetric` otherwise when a module is read. Raises UsageError for what no storage holds."""
    name, options, skipped, _ = _layout(_plain(quantization_config))
    skipped = [*lookup("storage", name).config().skip_modules, *(each.split(".")[-1] for each in skipped)]
    return name, make_config("storage", name, **options, skip_modules=list(dict.fromkeys(skipped)))


def dense_modules(quantization_config: Any) -> Callable[[str], bool]:
    """Whether a checkpoint's config says of a map, by its name in the model, that it stayed dense. What is said: the name, or its last
    part, of the map or of a module that holds it, or a regular expression for one (compressed-tensors marks these by `re:`)."""
    *_, skipped, _ = _layout(_plain(quantization_config))

    def said(each: str, name: str) -> bool:
        try:
            return name.endswith(f".{each}") or bool(re.match(rf"(?:{each.removeprefix('re:')})(?:(?<=\.)|(?=\.|$))", name))
        except re.error:  # a name that is no expression
            return False

    return lambda name: any(said(each, name) for each in skipped)


def read(method: str, tensors: Mapping[str, Tensor], quantization_config: Any = None) -> Storage:
    """One module's tensors, by their names below the module, as a storage `method`. Raises UsageError when the checkpoint is of another
    storage or of none, and ModelError for tensors that are missing or do not fit together."""
    if not quantization_config:
        raise UsageError(f"storage '{method}' reads no published quantized checkpoint without its quantization_config", remedy=_DENSE)
    name, options, _, reader = _layout(_plain(quantization_config))
    if name != method:
        raise UsageError(f"storage '{method}' is not what this published quantized checkpoint holds", remedy=f"storage: {name}")
    try:
        return reader(tensors, options, tensors.get("bias"))
    except KeyError as error:
        raise _misfit(f"the tensor {error} of a module is missing") from error


def _layout(document: dict[str, Any]) -> tuple[str, dict[str, Any], list[str], Callable[..., Storage]]:
    """(storage, options, modules that stay dense, reader)."""
    kind = str(document.get("quant_method") or ("bitsandbytes" if document.get("load_in_4bit") else "")).rpartition(".")[-1].lower()
    skipped = next((list(document[key]) for key in _SKIPPED if document.get(key)), [])
    if kind == "bitsandbytes":
        if not document.get("load_in_4bit") or document.get("bnb_4bit_quant_type", "nf4") != "nf4":
            raise _refuse("bitsandbytes weights that are not NF4")
        options = {"double_quant": bool(document.get("bnb_4bit_use_double_quant"))}
        return "nf4", options, skipped, lambda tensors, *_: lookup("storage", "nf4").cls.from_checkpoint(tensors, document)
    if kind == "gptq":
        bits, form = int(document.get("bits", 4)), document.get("checkpoint_format") or "gptq"
        if bits not in (2, 3, 4, 8) or form not in ("gptq", "gptq_v2"):
            raise _refuse(f"GPTQ of {bits} bits in the format '{form}'")
        group = int(document.get("group_size", 128))
        moved = bool(document.get("desc_act")) and group > 0 and not document.get("static_groups")
        return *_integers(bits, group, False), skipped, _gptq(bits, form == "gptq_v2", moved)
    if kind == "awq":
        bits, version = int(document.get("bits", document.get("w_bit", 4))), str(document.get("version", "gemm")).lower()
        if bits != 4 or version != "gemm" or not document.get("zero_point", True):
            raise _refuse(f"AWQ of {bits} bits, version '{version}' (gemm with zero points is read)")
        return *_integers(4, int(document.get("group_size", document.get("q_group_size", 128))), False), skipped, _awq
    if kind == "fp8":
        block = list(document.get("weight_block_size") or (128, 128))
        return "fp8", {"block_rows": block[0], "group_size": block[1], "scale_dtype": "fp32"}, skipped, _float8("weight_scale_inv", block)
    if kind == "mxfp4":
        return "fp4", {"book": "e2m1", "scale": "e8m0", "group_size": 32}, skipped, _mxfp4
    if kind == "compressed-tensors":
        return _compressed(document, skipped)
    raise _refuse(f"quant_method '{kind}' is not known")


def _compressed(document: dict[str, Any], skipped: list[str]):
    groups = list((document.get("config_groups") or {}).values())
    if len(groups) != 1 or not groups[0].get("weights"):
        raise _refuse(f"compressed-tensors with {len(groups)} groups of modules (one is read)")
    weights = groups[0]["weights"]
    form, bits, strategy = groups[0].get("format") or document.get("format"), int(weights["num_bits"]), weights.get("strategy")
    group = int(weights.get("group_size") or -1) if strategy == "group" else -1
    if form == "pack-quantized" and bits in (2, 4, 8) and weights.get("type", "int") == "int" and strategy in ("group", "channel"):
        return *_integers(bits, group, bool(weights.get("symmetric", True))), skipped, _packed(bits)
    if form in ("int-quantized", "naive-quantized") and bits == 8 and weights.get("type", "int") == "int" and strategy == "channel" \
            and weights.get("symmetric", True):
        return *_integers(8, -1, True), skipped, _int8
    if form in ("float-quantized", "naive-quantized") and bits == 8 and weights.get("type") == "float":
        block = list(weights.get("block_structure") or (1, -1)) if strategy == "block" else [1, group]
        return "fp8", {"block_rows": block[0], "group_size": block[1]}, skipped, _float8("weight_scale", block)
    raise _refuse(f"compressed-tensors format '{form}' with {bits}-bit {weights.get('type', 'int')} weights by {strategy}")


def _integers(bits: int, group: int, symmetric: bool) -> tuple[str, dict[str, Any]]:
    return ("int8", {"group_size": group} if group > 0 else {}) if bits == 8 else (f"int{bits}", {"group_size": group,
                                                                                               "symmetric": symmetric})


# -- integers ------------------------------------------------------------------------------------------------------------------
def _words(packed: Tensor, count: int, bits: int) -> Tensor:
    """int32 words (rows, n) -> (rows, count) uint8 codes."""
    if packed.dtype != torch.int32 or packed.shape[1] * 32 < count * bits:
        raise _misfit(f"words {tuple(packed.shape)} {packed.dtype} do not hold rows of {count} {bits}-bit codes")
    return unpack(packed.contiguous().view(torch.uint8)[:, : packed_width(count, bits)], count, bits)


def _stored(bits: int, codes: Tensor, scale: Tensor, zero: Tensor | None, options: dict[str, Any], bias: Tensor | None,
            index: Tensor | None = None, moved: bool = True) -> Storage:
    """codes (out, in) uint8, scale and zero (out, groups), index (in,): the group of every column, where they are not in order. moved:
    whether they are not, when index has no values."""
    rows, columns = codes.shape
    group = int(options.get("group_size", -1))
    group = group if 0 < group < columns else columns
    if scale.shape != (rows, -(-columns // group)) or (zero is not None and zero.shape != scale.shape):
        raise _misfit(f"scales {tuple(scale.shape)} do not fit a weight of {rows} x {columns} in groups of {group}")
    if index is not None:
        if index.shape != (columns,):
            raise _misfit(f"groups of {tuple(index.shape)} columns do not fit a weight of {rows} x {columns}")
        if has_values(index):
            moved = not torch.equal(index, torch.arange(columns, device=index.device, dtype=index.dtype) // group)
            if moved and (int(index.min()) < 0 or int(index.max()) >= scale.shape[1]):
                raise _misfit(f"columns are of groups {int(index.min())} to {int(index.max())}, and there are {scale.shape[1]}")
        index = index if moved else None
    if bits == 8:
        if index is not None or columns % group or group < 16:
            raise _refuse(f"8-bit codes of {columns} columns in groups of {group}" + (" in act-order" if index is not None else ""))
        zeros = torch.full_like(scale, 128.0, dtype=torch.float32) if zero is None else zero.float()
        config = make_config("storage", "int8", group_size=group)
        leaves = {"codes": codes.reshape(-1), "scale": scale.float().reshape(-1), "zero": zeros.reshape(-1)}
    else:
        config = make_config("storage", f"int{bits}", group_size=int(options["group_size"]), symmetric=zero is None,
                             scale_dtype=_FLOAT[scale.dtype])
        leaves = {"codes": pack(codes.contiguous(), bits), "scale": scale.contiguous()}
        if zero is not None:
            leaves["zero"] = zero.contiguous()
        if index is not None:
            leaves["group_index"] = index.to(torch.int32)
    dtype = scale.dtype if scale.dtype != torch.float32 else torch.bfloat16
    return lookup("storage", config.method).cls(rows, columns, config, leaves, bias, dtype)


def _gptq(bits: int, second: bool, moved: bool):
    def reader(tensors, options, bias):
        words, scales = tensors["qweight"], tensors["scales"]
        codes = _words(words.T, words.shape[0] * 32 // bits, bits)
        zeros = _words(tensors["qzeros"], scales.shape[1], bits)
        zeros = zeros if second else (zeros + 1) & (2**bits - 1)
        return _stored(bits, codes, scales.T, zeros.T, options, bias, tensors.get("g_idx"), moved)

    return reader


def _awq(tensors, options, bias):
    order = torch.tensor(AWQ_ORDER, device=tensors["scales"].device).argsort()

    def unpacked(name: str) -> Tensor:
        words = tensors[name]
        return _words(words, words.shape[1] * 8, 4).unflatten(-1, (-1, 8))[..., order].flatten(-2).T

    return _stored(4, unpacked("qweight"), tensors["scales"].T, unpacked("qzeros"), options, bias)


def _packed(bits: int):
    def reader(tensors, options, bias):
        rows, columns = (int(n) for n in tensors["weight_shape"])
        codes, scale, zero = _words(tensors["weight_packed"], columns, bits), tensors["weight_scale"], tensors.get("weight_zero_point")
        if codes.shape[0] != rows or (zero is None) != (options.get("symmetric", zero is None)):
            raise _misfit("codes, zero points and config of a module do not fit together")
        zero = None if zero is None else _words(zero.T, rows, bits).T
        return _stored(bits, codes, scale.reshape(rows, -1), zero, options, bias, tensors.get("weight_g_idx"))

    return reader


def _int8(tensors, options, bias):
    codes = (tensors["weight"].to(torch.int16) + 128).to(torch.uint8)
    return _stored(8, codes, tensors["weight_scale"].reshape(codes.shape[0], -1), None, options, bias)


# -- floats ---------------------------------------------------------------------------------------------------------------------
def _float8(name: str, block: list[int]):
    def reader(tensors, options, bias):
        weight, scale = tensors["weight"], tensors[name]
        if weight.dtype != torch.float8_e4m3fn:
            raise _misfit(f"the weight is {weight.dtype}, not E4M3")
        rows, columns = weight.shape
        step, group = (rows, -1) if scale.numel() == 1 else block  # one scale of the whole matrix
        group = columns if group < 1 else min(group, columns)
        shape = (-(-rows // step), -(-columns // group))
        if scale.numel() != shape[0] * shape[1]:
            raise _misfit(f"scales {tuple(scale.shape)} do not fit a weight of {rows} x {columns}")
        scale = scale if scale.dtype in _FLOAT else scale.float()  # powers of two in one byte
        config = make_config("storage", "fp8", block_rows=step, group_size=-1 if group == columns else group,
                             scale_dtype=_FLOAT[scale.dtype])
        leaves = {"codes": weight.view(torch.uint8), "scale": scale.reshape(shape)}
        dtype = scale.dtype if scale.dtype != torch.float32 else torch.bfloat16
        return lookup("storage", "fp8").cls(rows, columns, config, leaves, bias, dtype)

    return reader


def _mxfp4(tensors, options, bias):
    blocks, scales = tensors["blocks"], tensors["scales"]
    if blocks.shape[:-1] != scales.shape or blocks.dim() != 3 or blocks.shape[-1] != 16:
        raise _misfit(f"blocks {tuple(blocks.shape)} and scales {tuple(scales.shape)} are no MXFP4 matrix (of one expert)")
    if has_values(scales) and bool((scales == 255).any()):
        raise _misfit("a scale is NaN")
    leaves = {"codes": blocks.flatten(1), "scale": scales}
    config = make_config("storage", "fp4", **options)
    return lookup("storage", "fp4").cls(blocks.shape[0], blocks.shape[1] * 32, config, leaves, bias, torch.bfloat16)
