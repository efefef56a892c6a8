"""GGUF files for llama.cpp and what builds on it: the adapter alone, or the whole merged model, each with a Modelfile.

Adapter: general.type adapter, adapter.type lora, adapter.lora.alpha, and per map `NAME.weight.lora_a` (r, in), `.lora_b` (out, r)
in fp32. llama.cpp applies user_scale * alpha / rank with the rank of the tensor and knows no rsLoRA: here every map has one
rank, alpha = r, and the scale is folded into B.
Rows of q and k of Llama-type models are stored in another order in GGUF (rotary pairs side by side instead of in two
halves), (heads, 2, d/2) -> (heads, d/2, 2); B's rows and merged weights and biases follow.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.graft import Graft, MergeReport
from ..errors import GraftworkError, IncompatibleError, UsageError, nearest
from ..files import atomic_folder
from ..modeling.gguf_import import open_gguf
from ..modeling.protocols import is_conv1d
from ..modeling.references import resolve
from .factors import base_name, lora_factors
from .gguf_metadata import architecture, copy_fields, write_sizes, write_tokenizer
from .merged import MergedWeights, copy_licenses
from .modelfile import modelfile

ADAPTER, MODEL = "adapter.gguf", "model.gguf"
#: dtype of a merged file -> llama.cpp's number of the file type
FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32}


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise GraftworkError("writing GGUF needs the package 'gguf'", remedy="pip install gguf") from None
    return gguf


def name_map(model: Any) -> Any:
    """The gguf package's map from Transformers' tensor names to GGUF's, for this model."""
    gguf = _package()
    name = architecture(model)
    arch = next(a for a, text in gguf.MODEL_ARCH_NAMES.items() if text == name)
    layers = getattr(model.config, "num_hidden_layers", None) or model.config.n_layer
    return gguf.get_tensor_name_map(arch, layers)


def gguf_name(names: Any, name: str) -> str:
    """GGUF's name of a tensor. Raises IncompatibleError when the architecture has no place for it."""
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise IncompatibleError(f"GGUF has no name for '{name}' in this architecture",
                                remedy="convert --to merged, then run llama.cpp's convert_hf_to_gguf.py on that folder")
    return found


def permuted(value: Tensor, name: str, model: Any) -> Tensor:
    """`value` (out, ...) of a tensor called `name` with its rows in GGUF's order; other tensors unchanged."""
    if architecture(model) != "llama":
        return value
    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return value
    return value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:]).transpose(1, 2).reshape(value.shape)


def base_file(model: Any) -> Path | None:
    """The GGUF file that this model came from, or None."""
    source = getattr(model, "graft_source", None)
    if source is None or source.ref is None:
        return None
    try:
        ref = resolve(source.ref)
    except GraftworkError:
        return None
    return ref.path if ref.kind == "gguf" else None


# -- adapter ----------------------------------------------------------------------------------------------------------------
def write_gguf_adapter(graft: Graft, folder: str | Path, *, tokenizer: Any = None, rank: int | None = None,
                       overwrite: bool = False) -> dict[str, Any]:
    """Write adapter.gguf and Modelfile. Returns {"error", "rank", "notes"}; rank: see `lora_factors`.

    Raises IncompatibleError for what llama.cpp's adapters cannot hold: experts, biases, replaced modules, a tied head."""
    gguf = _package()
    names = name_map(graft.model)
    factors = lora_factors(graft, rank)
    _refuse(graft, factors)
    r = factors.rank
    with atomic_folder(folder, overwrite=overwrite) as target, _short_writes():
        writer = gguf.GGUFWriter(target / ADAPTER, architecture(graft.model))
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", float(r))
        writer.add_name(graft.name)
        for name, pair in sorted(factors.modules.items()):
            pair, place = pair.folded(r), gguf_name(names, f"{name}.weight")
            writer.add_tensor(f"{place}.lora_a", pair.A.numpy())
            writer.add_tensor(f"{place}.lora_b", permuted(pair.B, f"{name}.weight", graft.model).contiguous().numpy())
        _finish(writer)
        base = base_file(graft.model) or base_name(graft) or "BASE.gguf"
        (target / "Modelfile").write_text(modelfile(str(base), graft.model, tokenizer, adapter=ADAPTER), encoding="utf-8")
    return {"error": factors.error, "rank": r, "notes": [f"the Modelfile's base is {base}"]}


def _refuse(graft: Graft, factors: Any) -> None:
    advice = "convert --to gguf-merged"
    if factors.experts:
        raise IncompatibleError("llama.cpp's adapters hold no change of expert parameters", remedy="convert --to merged")
    if any(bool(change.any()) for change in factors.biases.values()):
        raise IncompatibleError("llama.cpp's adapters hold no change of biases", remedy=advice)
    if graft.saved_modules:
        raise IncompatibleError(f"llama.cpp's adapters hold no whole modules ({', '.join(graft.saved_modules)})", remedy=advice)
    if graft.trainable_tokens:
        raise IncompatibleError(f"llama.cpp's adapters hold no rows of trained tokens ({', '.join(graft.trainable_tokens)})", remedy=advice)
    tied = getattr(graft.model, "all_tied_weights_keys", None) or {}
    for name in factors.modules:
        if f"{name}.weight" in {*tied, *tied.values()}:
            raise IncompatibleError(f"'{name}' shares its weight with the embedding, which GGUF keeps once: llama.cpp refuses it",
                                    remedy=advice)


# -- merged -----------------------------------------------------------------------------------------------------------------
def write_gguf_merged(graft: Graft, folder: str | Path, *, tokenizer: Any = None, base: str = "trained", dtype: str | None = None,
                      overwrite: bool = False) -> MergeReport:
    """Write model.gguf, Modelfile and the base's licence files. dtype of matrices: f16 (default), bf16 or f32; vectors are f32.

    Raises IncompatibleError for an architecture or a tokenizer that cannot be written."""
    gguf = _package()
    kind = _file_type(dtype)
    merged = MergedWeights(graft, base=base, dtype={"f32": "fp32", "f16": "fp16"}.get(kind, kind), vectors=torch.float32)
    names, origin = name_map(graft.model), base_file(graft.model)
    reader = open_gguf(origin) if origin is not None else None
    shapes = {k: v for k, v in merged.skeleton.state_dict().items()}
    places = {name: gguf_name(names, name) for name in merged.names()}
    with atomic_folder(folder, overwrite=overwrite) as target, _short_writes():
        writer = gguf.GGUFWriter(target / MODEL, architecture(graft.model))
        if reader is not None:
            copy_fields(writer, reader)
        else:
            write_sizes(writer, merged.config(), f"{graft.name} merged")
            write_tokenizer(writer, tokenizer, graft.model.config.vocab_size)
        writer.add_file_type(FILE_TYPES[kind])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for name, place in places.items():
            shape = tuple(shapes[name].shape)
            shape = shape[::-1] if _transposed(graft.model, name) else shape
            raw = _raw_type(gguf, kind, len(shape))
            size = shapes[name].numel() * (4 if raw == gguf.GGMLQuantizationType.F32 else 2)
            writer.add_tensor_info(place, shape, None, size, raw)
        extra = [t for t in reader.tensors if t.name.startswith("rope_")] if reader is not None else []
        for each in extra:  # rotary factors, which Transformers keeps in the config
            writer.add_tensor_info(each.name, [int(n) for n in each.shape[::-1]], None, each.n_bytes, each.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name in places:
            value = merged.one(name)
            value = value.T if _transposed(graft.model, name) else value
            writer.write_tensor_data(_bytes(permuted(value, name, graft.model).contiguous(), name))
        for each in extra:
            writer.write_tensor_data(each.data)
        writer.close()
        (target / "Modelfile").write_text(modelfile(f"./{MODEL}", graft.model, tokenizer), encoding="utf-8")
        copy_licenses(graft.model, target)
    return merged.report


def _file_type(dtype: str | None) -> str:
    wanted = {"fp32": "f32", "float32": "f32", "fp16": "f16", "float16": "f16", "bfloat16": "bf16", None: "f16"}.get(dtype, dtype)
    if wanted not in FILE_TYPES:
        raise UsageError(f"GGUF matrices are not written as '{dtype}'{nearest(str(dtype), FILE_TYPES)}",
                         remedy=f"use {', '.join(FILE_TYPES)}, and llama-quantize for fewer bits")
    return wanted


def _raw_type(gguf: Any, kind: str, dimensions: int) -> Any:
    types = gguf.GGMLQuantizationType
    return types.F32 if dimensions < 2 else {"f32": types.F32, "f16": types.F16, "bf16": types.BF16}[kind]


def _transposed(model: Any, name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    return attribute == "weight" and is_conv1d(model.get_submodule(module))


def _bytes(value: Tensor, name: str) -> Any:
    if value.dtype == torch.bfloat16:
        return value.view(torch.uint16).numpy()
    if not torch.isfinite(value).all():
        raise GraftworkError(f"'{name}' has values that fp16 cannot hold", remedy="write it as bf16 or f32")
    return value.numpy()


@contextmanager
def _short_writes() -> Iterator[None]:
    """numpy reports a full disk without the system's error number."""
    try:
        yield
    except OSError as error:
        if error.errno is None and "requested" in str(error):
            raise OSError(errno.ENOSPC, str(error)) from error
        raise


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
