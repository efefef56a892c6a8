"""A model folder whose weights are codes, written block by block from a dense one.

The model is built without memory. What lies outside the blocks is read first; then each block is read, calibrated on what the blocks
before it give (storage/calibration/walk.py), put into the storage, written as one shard and dropped. Peak: embeddings and head, one
block dense and as codes, and the hidden states of the calibration rows.

A kill loses one block at most: shards appear by a rename, and `quantize-state.json` says what the folder is going to be. The same call
again goes on behind the last shard; the blocks that are done run once more, as codes, to give the next one its inputs, so the
files are the same as without the kill. config.json is written last, and a folder without it is no model. A calibration that trains
windows of blocks (storage/calibration/windows.py) has a window dense, and starts anew after a kill: what it trained of the blocks
ahead is in no file.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.calibration import CalibrationRows, calibration_rows
from ..errors import GraftworkError, ModelError, UsageError
from ..files import FileLock, atomic_file, atomic_write_text, disk_errors, folder_bytes
from ..modeling.arithmetic import widen
from ..modeling.blocks import repeated_blocks
from ..modeling.checkpoint import read_header, stored_tensors
from ..modeling.fingerprint import source_digests
from ..modeling.models import PRISTINE, hollow_model, load_config, load_tokenizer, model_folder, parse_dtype, resolve
from ..modeling.references import HALF_WRITTEN
from ..modeling.source import ModelSource, build_source, read_stored
from ..registry import MethodConfig, lookup, make_config
from ..storage._folder import dense_names, document_of, fill, folder_tensors, modules_of, put_tensor, uncalibrated_of
from ..storage.base import Storage, storage_bits
from ..storage.calibration.walk import walk

VERSION = 1
#: what a storage must know of the whole model, while the folder is half written
PREPARED = "quantize-prepared.safetensors"
#: files of a model folder that go along: tokenizer, generation, templates
COMPANIONS = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "generation_config", "chat_template", "spiece",
              "sentencepiece", "preprocessor_config")


@dataclass
class Report:
    """What was written. bits_per_weight: over the weights that are codes; bytes: of the weight files."""

    folder: str
    storage: dict[str, Any]
    bits_per_weight: float
    bytes_before: int
    bytes_after: int
    blocks: int
    maps: int
    resumed: int
    seconds: float
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def quantize(ref: str | Path, output: str | Path, *, storage: Any, data: Any = None, samples: int = 128, length: int = 512,
             dtype: str | torch.dtype | None = None, task: str = "causal_lm", trust_remote_code: bool = False,
             progress: Callable[[int, int], None] | None = None) -> Report:
    """Write the model `ref` into the folder `output` with its weights in `storage` (a name, {method, options} or a config).

    data: what a calibration reads, see data.calibration. dtype: of what stays dense (default: the checkpoint's). progress(done, blocks).
    Raises UsageError (options, another half-written folder), DataError (too little data), ModelError, GraftworkError (folder not
    empty, disk full)."""
    start, output = time.monotonic(), Path(output)
    config = _storage(storage)
    ref = replace(resolve(ref, trust_remote_code=trust_remote_code), trust_remote_code=trust_remote_code)
    _check_folder(output)
    folder = model_folder(ref)
    stored = stored_tensors(folder)
    local = replace(ref, kind="folder", path=folder)
    model_config, wanted = load_config(local), parse_dtype(dtype)
    if getattr(model_config, "quantization_config", None):
        raise ModelError(f"{ref.ref} is quantized already", remedy="give the full-precision model")
    rows = _rows(config, data, local, model_config, samples, length)
    if wanted is None and parse_dtype(getattr(model_config, "dtype", None)) is None:
        wanted = next((read_stored(each, name).dtype for name, each in stored.items() if each.dtype in ("F32", "F16", "BF16", "F64")), None)
    model = hollow_model(model_config, task=task, dtype=wanted)
    source = build_source(model, folder, ref=ref.ref)
    work = _Work(model, source, config, output, rows)
    with disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    with FileLock(output / ".lock", what=f"the folder {output}"):
        _check_folder(output)
        work.begin(task, str(dtype) if dtype is not None else None)
        work.run(progress)
        work.finish(model_config, folder)
    kept = [m for m in model.modules() if isinstance(m, Storage)]
    return Report(str(output), {"method": config.method, **config.model_dump(mode="json")}, storage_bits(model),
                  sum(file.stat().st_size for file in source.files()), sum(folder_bytes(file) for file in output.glob("*.safetensors")),
                  len(work.blocks), len(kept), work.resumed, round(time.monotonic() - start, 3), work.notes)


def _storage(storage: Any) -> MethodConfig:
    if isinstance(storage, MethodConfig):
        config = storage
    else:
        options = {"method": storage} if isinstance(storage, str) else dict(storage)
        config = make_config("storage", options.pop("method"), **options)
    if config.method == "dense":
        raise UsageError("storage dense keeps the weights as they are", remedy="storages: `graft methods --axis storage`")
    return config


def _check_folder(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise GraftworkError(f"{output} is a file", remedy="choose another folder")
    left = [p for p in output.iterdir() if p.name != ".lock"] if output.is_dir() else []
    if left and not (output / HALF_WRITTEN).is_file():
        raise GraftworkError(f"{output} is not empty", remedy="choose another folder, or empty it")


def _rows(config: MethodConfig, data: Any, ref: Any, model_config: Any, samples: int, length: int) -> CalibrationRows | None:
    cls = lookup("storage", config.method).cls
    if not cls.needs(config):
        if data is not None:
            raise UsageError(f"storage {config.method} with these options reads no data",
                             remedy="leave the data out, or choose a calibration that reads it: --calibration gptq")
        return None
    if data is None:
        raise UsageError(f"storage {config.method} with these options reads calibration data, and none is given",
                         remedy="--data FILE.jsonl (texts like those that the model will see)"
                                + ", or --calibration rtn" * (not cls.does_without))
    room = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if room is not None and length > room:
        raise UsageError(f"rows of {length} tokens exceed the model's context of {room}", remedy=f"--length {room} or less")
    return calibration_rows(data, load_tokenizer(ref), samples=samples, length=length)


class _Work:
    """One folder on its way. Block i is shard i + 1 of as many as there are blocks and one; what lies outside them is the last."""

    def __init__(self, model: nn.Module, source: ModelSource, config: MethodConfig, output: Path, rows: CalibrationRows | None):
        self.model, self.source, self.config, self.output, self.rows = model, source, config, output, rows
        self.blocks = [name for name, _ in repeated_blocks(model)]
        self.notes, self.present, self.resumed = list(rows.notes if rows else ()), set(), 0
        self.rounded: dict[str, list[str]] = {}  # maps without statistics, by shard
        self.modules: dict[str, dict[str, Any]] = {}  # maps of another method than the model's, by shard
        owners: dict[int, str] = {}
        for name in self.blocks:
            for parameter in model.get_submodule(name).parameters():
                if owners.setdefault(id(parameter), name) != name:
                    raise ModelError(f"blocks {owners[id(parameter)]} and {name} share weights, and cannot be written one by one",
                                     remedy="quantize it in memory: graftwork.load(model, storage=...)")
        self.inside = tuple(f"{name}." for name in self.blocks)

    def shard(self, index: int) -> Path:
        return self.output / f"model-{index + 1:05d}-of-{len(self.blocks) + 1:05d}.safetensors"

    # -- the record of what the folder is going to be ---------------------------------------------------------------------
    def begin(self, task: str, dtype: str | None) -> None:
        """Writes the record, or compares it with the one that is there. Raises UsageError for another one."""
        self.digests = source_digests(self.source)
        asked = {"version": VERSION, "model": hashlib.sha256(json.dumps(sorted(self.digests.items())).encode()).hexdigest(),
                 "task": task, "dtype": dtype, "storage": {"method": self.config.method, **self.config.model_dump(mode="json")},
                 "data": None if self.rows is None else self.rows.digest, "blocks": len(self.blocks)}
        record, self.asked = self.output / HALF_WRITTEN, asked
        if not record.is_file():
            self._note()
            return
        try:
            before = dict(json.loads(record.read_text(encoding="utf-8")))
            self.rounded = {str(shard): list(names) for shard, names in before.pop("rounded").items()}
            self.modules = {str(shard): dict(found) for shard, found in before.pop("modules", {}).items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise GraftworkError(f"{record} is damaged", remedy=f"delete {self.output} and start anew") from error
        other = sorted(key for key in {*asked, *before} if asked.get(key) != before.get(key))
        if other:
            raise UsageError(f"{self.output} is half written with another {', '.join(other)}",
                             remedy="call it as before to go on, or choose another folder (or delete this one)")

    def _note(self) -> None:
        record = {**self.asked, "rounded": self.rounded, "modules": self.modules}
        atomic_write_text(self.output / HALF_WRITTEN, json.dumps(record, indent=1) + "\n")

    # -- reading and writing blocks -----------------------------------------------------------------------------------------
    def run(self, progress: Callable[[int, int], None] | None) -> None:
        if lookup("storage", self.config.method).cls.windowed(self.config) is not None:
            for index in range(len(self.blocks)):
                self.shard(index).unlink(missing_ok=True)
            self.rounded = {}
        self._load("")
        self._tie()

        def before(index: int) -> None:
            if index in self.present:
                return
            self.present.add(index)
            if self.shard(index).is_file():
                self.resumed += 1
                self._read_shard(index)
            else:
                self._load(self.blocks[index])

        def after(index: int) -> None:
            name = self.blocks[index]
            if not self.shard(index).is_file():
                mine = uncalibrated_of(self.model, self.config, name)
                other = modules_of(self.model, self.config, name)
                stale = self.rounded.pop(str(index), None), self.modules.pop(str(index), None)
                if mine or other or any(stale):  # known before the shard is there
                    self.rounded |= {str(index): mine} if mine else {}
                    self.modules |= {str(index): other} if other else {}
                    self._note()
                self._write(index, folder_tensors(self.model, name))
            self._drop(name)
            if progress:
                progress(index + 1, len(self.blocks))

        walk(self.model, self.config, self.rows.batches if self.rows else None, before=before, after=after, notes=self.notes,
             prepared=self._prepared())

    def _prepared(self) -> dict[str, dict[str, Any]]:
        """What the storage must know of the whole model. It is found before the first block is coded, and kept for a resumed run."""
        cls = lookup("storage", self.config.method).cls
        if cls.prepare.__func__ is Storage.prepare.__func__:
            return {}
        file = self.output / PREPARED
        if not file.is_file():
            from safetensors.torch import save_file

            for name in self.blocks:
                self._load(name)
            widen(self.model)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                found = cls.prepare(self.model, self.config, list(self.rows.batches()) if self.rows else [])
            flat = {f"{name} {key}": value.contiguous() for name, more in found.items() for key, value in more.items()}
            with atomic_file(file) as part:
                save_file(flat, part, metadata={"notes": json.dumps([str(each.message) for each in said])})
            for name in self.blocks:
                self._drop(name)
        from safetensors import safe_open

        prepared: dict[str, dict[str, Any]] = {}
        with safe_open(file, framework="pt") as handle:
            self.notes += json.loads(handle.metadata()["notes"])
            for key in handle.keys():
                name, _, attribute = key.rpartition(" ")
                prepared.setdefault(name, {})[attribute] = handle.get_tensor(key)
        return prepared

    def _load(self, within: str) -> None:
        """Read the dense weights of a block, or ("") of what lies outside the blocks."""
        aliases = set(getattr(self.model, "all_tied_weights_keys", None) or {})
        for name, live in dense_names(self.model, within).items():
            if not within and name.startswith(self.inside):
                continue
            if name in self.source and name not in self.source.aliases:
                put_tensor(self.model, name, self.source.read(name, dtype=live.dtype))
            elif name not in aliases and name not in self.source.aliases:
                raise ModelError(f"{self.source.folder} lacks the weight '{name}' of {type(self.model).__name__}",
                                 remedy="give a whole checkpoint, or another --task")

    def _tie(self) -> None:
        for alias, kept in self.source.aliases.items():
            owner, _, last = alias.rpartition(".")
            self.model.get_submodule(owner)._parameters[last] = self.model.get_parameter(kept)

    def _read_shard(self, index: int) -> None:
        header = read_header(self.shard(index))
        fill(self.model, document_of(self.config, self.rounded.get(str(index), ()), self.modules.get(str(index))),
             {n: each.shape for n, each in header.items()}, lambda name: read_stored(header[name], name), within=self.blocks[index])

    def _write(self, index: int, tensors: dict[str, torch.Tensor]) -> None:
        from safetensors.torch import save_file

        with atomic_file(self.shard(index)) as file:
            save_file(tensors, file, metadata={"format": "pt"})  # a second key would come in any order
            file.chmod(0o644)  # safetensors makes it for the owner alone

    def _drop(self, name: str) -> None:
        for module in self.model.get_submodule(name).modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[key] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)

    # -- the end -----------------------------------------------------------------------------------------------------------
    def finish(self, model_config: Any, folder: Path) -> None:
        """The last shard, the index and what goes along; config.json makes it a model."""
        outside = {n: t for n, t in folder_tensors(self.model).items() if not n.startswith(self.inside)}
        rounded = [n for n in uncalibrated_of(self.model, self.config) if not n.startswith(self.inside)]
        self._write(len(self.blocks), outside)
        shards = [self.shard(i) for i in range(len(self.blocks) + 1)]
        files = {name: file.name for file in shards for name in read_header(file)}
        index = {"metadata": {"total_size": sum(file.stat().st_size for file in shards)}, "weight_map": files}
        atomic_write_text(self.output / "model.safetensors.index.json", json.dumps(index, indent=1, sort_keys=True) + "\n")
        atomic_write_text(self.output / PRISTINE, json.dumps({"digests": self.digests}, indent=1, sort_keys=True) + "\n")
        with disk_errors(self.output):
            for file in sorted(folder.iterdir()):
                if file.is_file() and file.name.startswith(COMPANIONS):
                    shutil.copyfile(file, self.output / file.name)
            for file in self.source.license_files():
                shutil.copyfile(file, self.output / file.name)
        model_config.architectures = [type(self.model).__name__]
        model_config.dtype = str(next(p.dtype for p in self.model.parameters() if p.is_floating_point())).removeprefix("torch.")
        model_config.quantization_config = document_of(self.config, {*rounded, *sum(self.rounded.values(), [])},
                                                       modules_of(self.model, self.config),
                                                       bits=round(storage_bits(self.model), 6))
        atomic_write_text(self.output / "config.json", model_config.to_json_string())
        (self.output / PREPARED).unlink(missing_ok=True)
        (self.output / HALF_WRITTEN).unlink()
