"""Files of a model folder: which safetensors file holds which tensor, whether it is whole, which licence goes with it.

Only headers are read here, with the standard library; weights stay on disk.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

from ..errors import ModelError

#: safetensors dtype names -> bits per element
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
         "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "F4": 4, "C64": 64}
_AGAIN = "get the file again (a download or a copy was probably cut short)"


class Stored(NamedTuple):
    """Where one tensor lies: its file, its shape and its safetensors dtype name."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def read_header(path: str | Path) -> dict[str, Stored]:
    """Names, shapes and dtypes of a safetensors file, from its header alone.

    Raises ModelError when the file is missing, truncated, or not a safetensors file.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as handle:
            first = handle.read(8)
            length = int.from_bytes(first, "little")
            if len(first) < 8 or not 2 <= length <= min(size, 100_000_000):
                raise ModelError(f"{path} is not a safetensors file, or is truncated ({size} bytes)", remedy=_AGAIN)
            header = json.loads(handle.read(length))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}", remedy="check the path and its permissions") from error
    except ValueError as error:
        raise ModelError(f"{path} has a damaged header", remedy=_AGAIN) from error
    tensors, end = {}, 0
    try:
        for name, entry in header.items():
            if name != "__metadata__":
                shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
                if (stop - start) * 8 != math.prod(shape) * _BITS[entry["dtype"]]:
                    raise ValueError(name)
                tensors[name], end = Stored(path, shape, entry["dtype"]), max(end, stop)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{path} has a damaged header", remedy=_AGAIN) from error
    if size != 8 + length + end:
        raise ModelError(f"{path} is truncated or damaged: it has {size} bytes and should have {8 + length + end}", remedy=_AGAIN)
    return tensors


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a model folder, single or sharded by an index; empty when it holds none.

    Raises ModelError for a shard that is missing, a damaged index, and a folder with pickled weights only.
    """
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{index} is damaged", remedy=_AGAIN) from error
        if any(Path(name).name != name for name in names):
            raise ModelError(f"{index} names files outside its folder", remedy="do not use this model")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelError(f"{folder} lacks {', '.join(missing)}, which its index names", remedy=_AGAIN)
        return [folder / name for name in names]
    pickled = [p.name for p in folder.glob("*.bin")] + [p.name for p in folder.glob("*.pt*")]
    if pickled and (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds its weights as {pickled[0]}, a pickle, which is never opened",
                         remedy="use a safetensors version of this model")
    return []


def stored_tensors(folder: str | Path) -> dict[str, Stored]:
    """Every tensor of a model folder by its name in the files; all files checked by `read_header`."""
    return {name: stored for file in weight_files(folder) for name, stored in read_header(file).items()}


def license_files(folder: str | Path) -> list[Path]:
    """Licence texts to be copied along with weights taken from `folder`.

    Files named LICENSE, LICENCE, COPYING, NOTICE or USE_POLICY; where there are none the README (a model card states
    the licence); for a packaged model also the licence files of its pip package.
    """
    folder = Path(folder)
    words = ("license", "licence", "copying", "notice", "use_policy")
    here = sorted(p for p in folder.iterdir() if p.is_file()) if folder.is_dir() else []
    found = [p for p in here if p.name.lower().startswith(words)] or [p for p in here if p.name.lower() == "readme.md"]
    for parent in (folder, *folder.parents[:2]):  # the package's own folder, and one or two levels inside it
        for info in parent.parent.glob(f"{parent.name}-*.dist-info"):
            found += sorted(p for p in info.rglob("*") if p.is_file() and p.name.lower().startswith(words))
    return found
