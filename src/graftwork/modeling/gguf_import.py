"""GGUF files, converted once to a safetensors folder in the cache.

Transformers de-quantises the tensors. Two things are mended here. (1) It parses the file's metadata three times and
rebuilds its table of tensor names for every submodule; both are memoised while a conversion runs. (2) A `smollm`
tokenizer splits digits off before byte-level BPE (no token of its vocabulary joins a digit to anything), a step that
the GGUF path leaves out, so that "\\n\\n1" and "  2" came out as other tokens than in training.

dtype of the converted weights: the smallest of bf16, fp16, fp32 that holds every value exactly. De-quantised blocks
need fp32: of SmolLM2's Q4_1 weights, bf16 would change 74 % and fp16 31 %.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..cache import cache_dir, cache_folder, entry_lock, file_digest
from ..errors import GraftworkError, ModelError
from ..files import atomic_folder, disk_errors
from .checkpoint import license_files, stored_tensors

#: raise it when the conversion changes; older cache entries are then left alone and not used
CONVERTER_VERSION = 1
_AGAIN = "get the file again (a download or a copy was probably cut short)"


def check_gguf(path: str | Path) -> Path:
    """`path` if it starts like a GGUF file; raises ModelError when it is missing, empty or something else."""
    path = Path(path)
    try:
        with open(path, "rb") as handle:
            magic = handle.read(4)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}", remedy="check the path and its permissions") from error
    if magic != b"GGUF":
        raise ModelError(f"{path} is not a GGUF file", remedy=_AGAIN)
    return path


def _plain_reader(gguf: Any) -> type:
    """The package's reader on a plain array view of the mapped file: numpy's memmap class makes each slice 3x slower."""

    class Reader(gguf.GGUFReader):
        @property
        def data(self):
            return self._view

        @data.setter
        def data(self, mapped):
            import numpy

            self._view = mapped.view(numpy.ndarray)

    return Reader


@functools.lru_cache(maxsize=2)
def _reader(path: str, size: int, mtime: int) -> Any:
    """A parsed GGUF file, whole: every tensor lies inside the file."""
    try:
        import gguf
    except ImportError:
        raise ModelError("reading a GGUF file needs the package 'gguf'", remedy="pip install gguf") from None
    try:
        reader = _plain_reader(gguf)(path)
        end = max((t.data_offset + t.n_bytes for t in reader.tensors), default=0)
    except Exception as error:  # the reader has no error of its own: IndexError, ValueError, UnicodeDecodeError, ...
        raise ModelError(f"{path} is truncated or damaged ({type(error).__name__} after {size} bytes)", remedy=_AGAIN) from error
    if not reader.tensors or end > size:
        raise ModelError(f"{path} is truncated: it has {size} bytes, its tensors need {end}", remedy=_AGAIN)
    return reader


def open_gguf(path: str | Path) -> Any:
    """The `gguf.GGUFReader` of a whole file. Raises ModelError (missing package, truncated, damaged)."""
    stat = check_gguf(path).stat()
    return _reader(str(Path(path).resolve()), stat.st_size, stat.st_mtime_ns)


@contextmanager
def _parsed_once(path: Path) -> Iterator[None]:
    """Within: Transformers' GGUF code gets our parsed reader and a memoised table of tensor names."""
    import gguf
    from transformers import modeling_gguf_pytorch_utils as theirs

    reader = open_gguf(path)
    plain = gguf.GGUFReader, gguf.get_tensor_name_map, theirs.tqdm
    theirs.tqdm = functools.partial(plain[2], disable=None)  # a progress bar on a terminal only
    gguf.GGUFReader = lambda file, *rest: reader if Path(file).resolve() == path.resolve() else plain[0](file, *rest)
    gguf.get_tensor_name_map = functools.cache(plain[1])
    try:
        yield
    except (ValueError, NotImplementedError, KeyError) as error:
        raise ModelError(f"{path} cannot be converted: {error}",
                         remedy="use a safetensors folder of this model") from error
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map, theirs.tqdm = plain


def gguf_config(path: str | Path) -> Any:
    """The Transformers config of a GGUF file, from its metadata alone, with the dtype its conversion will have."""
    from transformers import AutoConfig

    path = Path(path)
    with _parsed_once(path):
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    kinds = {t.tensor_type.name for t in open_gguf(path).tensors if len(t.shape) > 1}
    config.dtype = {frozenset({"BF16"}): "bfloat16", frozenset({"F16"}): "float16"}.get(frozenset(kinds), "float32")
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def converted_folder(path: str | Path) -> Path:
    """Where the conversion of this file is or will be: a cache entry named by the file's SHA-256."""
    path = check_gguf(path)
    stem = re.sub(r"[^\w.-]+", "-", path.stem).strip(".-")[:60] or "model"
    return cache_dir() / "models" / f"{stem}-{file_digest(path)[:12]}-v{CONVERTER_VERSION}"


def convert_gguf(path: str | Path, *, expected_digest: str | None = None, extra_files: list[Path] = (),
                 remedy: str = _AGAIN, weights: bool = True) -> Path:
    """The safetensors folder of a GGUF file, from the cache or converted now (one process at a time, atomically).

    `expected_digest`: SHA-256 the file must have; `remedy`: what to do when it has another. `extra_files`: licence texts
    copied along. Without `weights` the folder has config and tokenizer only. Raises ModelError for a damaged file or an
    architecture that Transformers cannot read from GGUF.
    """
    path = check_gguf(path)
    if expected_digest is not None and file_digest(path) != expected_digest:
        raise ModelError(f"{path} is damaged: its SHA-256 is not the published one", remedy=remedy)
    folder = converted_folder(path)
    if _usable(folder):
        return folder
    folder = folder if weights else folder.with_name(f"{folder.name}-codes")
    if _usable(folder, weights):
        return folder
    cache_folder("models")
    with entry_lock(folder):
        if not _usable(folder, weights):
            with disk_errors(folder, remedy="free some space, or set GRAFTWORK_CACHE to a folder on another disk"):
                with atomic_folder(folder, overwrite=True) as temporary:
                    (_convert if weights else _convert_tokenizer)(path, temporary, [*license_files(path.parent), *extra_files])
    return folder


def is_converted(path: str | Path) -> bool:
    """Whether the cache holds the conversion of this file."""
    return _usable(converted_folder(path))


def _usable(folder: Path, weights: bool = True) -> bool:
    try:
        return (folder / "config.json").is_file() and (not weights or bool(stored_tensors(folder)))
    except GraftworkError:
        return False


def _convert(path: Path, folder: Path, licenses: list[Path]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    with _parsed_once(path), quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True,
            quantization_config=GgufConfig(gguf_file=path.name, dequantize=True))
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise ModelError(f"{path} is damaged: '{name}' holds values that are not finite", remedy=_AGAIN)
    model.to(lossless_dtype([p.detach() for p in model.parameters()]))
    for holder, attribute in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(holder, attribute):
            delattr(holder, attribute)
    with quiet_transformers():
        model.save_pretrained(folder)
    _save_rest(path, folder, tokenizer, model.config, model.dtype, licenses)


def _convert_tokenizer(path: Path, folder: Path, licenses: list[Path]) -> None:
    from transformers import AutoTokenizer

    with _parsed_once(path), quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    config = gguf_config(path)
    config.save_pretrained(folder)
    _save_rest(path, folder, tokenizer, config, config.dtype, licenses)


def _save_rest(path: Path, folder: Path, tokenizer: Any, config: Any, dtype: Any, licenses: list[Path]) -> None:
    import transformers

    _mend_tokenizer(tokenizer, open_gguf(path), config)
    with quiet_transformers():
        tokenizer.save_pretrained(folder)
    for file in licenses:
        shutil.copyfile(file, folder / file.name)
    facts = {"source": path.name, "sha256": file_digest(path), "converter": CONVERTER_VERSION,
             "transformers": transformers.__version__, "dtype": str(dtype).removeprefix("torch.")}
    (folder / "conversion.json").write_text(json.dumps(facts, indent=1) + "\n")


def lossless_dtype(tensors: list) -> Any:
    """The first of bf16, fp16, fp32 that holds every value of the fp32 `tensors` exactly."""
    import torch

    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(t.to(dtype).float(), t) for t in tensors):
            return dtype
    return torch.float32


def _mend_tokenizer(tokenizer: Any, reader: Any, config: Any) -> None:
    from tokenizers import pre_tokenizers

    tokenizer.model_max_length = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", 2**31))
    pre = reader.fields.get("tokenizer.ggml.pre")
    if pre is not None and pre.contents() == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within: no progress bars and no loading reports of Transformers; errors still come through."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
