"""Checkpoints: what was learned, optimizer, estimator, selections, position, random state; whole or absent, never pickled.

OUTPUT_DIR/checkpoints/step-00000014/
  learned.safetensors     every trained tensor (and, for full tuning, the buffers), by stable name
  optimizer.safetensors   state tensors; parts.safetensors: tensors of estimator and selections
  rng.safetensors         torch's CPU state and NumPy's; Python's is in progress.json
  progress.json           headers, schedule, best score, log window, length of metrics.jsonl
  trainer_state.json      the Trainer's own counters
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ArtifactError
from ..files import atomic_folder
from ..modeling.trained_codes import codes_of

NAME = "step-{:08d}"


def folder_of(output: str | Path, step: int) -> Path:
    return Path(output) / "checkpoints" / NAME.format(step)


def complete(output: str | Path) -> list[Path]:
    """Checkpoints of a run, oldest first. A folder exists only when it is whole."""
    return sorted(p for p in (Path(output) / "checkpoints").glob("step-????????") if (p / "progress.json").is_file())


def rng_state() -> tuple[dict[str, Tensor], Any]:
    """(tensors, JSON) of all generators that a model's own dropout or a library may use."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(keys.copy().view(np.uint8))}
    if torch.cuda.is_available():
        tensors.update({f"cuda{i}": s.cpu() for i, s in enumerate(torch.cuda.get_rng_state_all())})
    version, internal, gauss = random.getstate()
    return tensors, {"numpy": [kind, position, has_gauss, cached], "python": [version, list(internal), gauss]}


def set_rng_state(tensors: dict[str, Tensor], values: Any) -> None:
    """The inverse of rng_state."""
    torch.set_rng_state(tensors["torch"])
    kind, position, has_gauss, cached = values["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().view(np.uint32), position, has_gauss, cached))
    version, internal, gauss = values["python"]
    random.setstate((version, tuple(internal), gauss))
    cuda = [tensors[k] for k in sorted(tensors) if k.startswith("cuda")]
    if cuda and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(cuda)


def split(state: Any, prefix: str, tensors: dict[str, Tensor]) -> Any:
    """A nested state with its tensors moved out into `tensors` under `prefix`; what stays is JSON."""
    if isinstance(state, Tensor):
        tensors[prefix] = state.detach().cpu().contiguous()
        return {"__tensor__": prefix}
    if isinstance(state, dict):
        return {str(k): split(v, f"{prefix}.{k}", tensors) for k, v in state.items()}
    if isinstance(state, (list, tuple)):
        return [split(v, f"{prefix}.{i}", tensors) for i, v in enumerate(state)]
    return state


def join(state: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of split."""
    if isinstance(state, dict):
        return tensors[state["__tensor__"]] if "__tensor__" in state else {k: join(v, tensors) for k, v in state.items()}
    return [join(v, tensors) for v in state] if isinstance(state, list) else state


def learned_tensors(model: nn.Module, parameters: list[tuple[str, nn.Parameter]], grafts: list[Any]) -> dict[str, Tensor]:
    """Every tensor that training may have changed, by stable name."""
    tensors = {}
    for name, p in parameters:
        codes = codes_of(p)
        tensors.update({name: p.detach()} if codes is None else {
            f"{name.rpartition('.')[0]}.{key}": part for key, part in codes.parts().items()})
    if grafts:
        for graft in grafts:
            for key, module in graft.named_modules():
                tensors.update({f"buffer:{graft.name}/{key}.{n}": b for n, b in module.named_buffers()})
                tensors.update({f"moved:{graft.name}/{key}.{n}": getattr(module, n).detach() for n in getattr(module, "moves", ())})
    else:
        tensors.update({f"buffer:{n}": b for n, b in model.named_buffers()})
    return tensors


def write(folder: Path, *, learned: dict[str, Tensor], optimizer: dict[str, Tensor], parts: dict[str, Tensor],
          progress: dict[str, Any], trainer_state: str) -> None:
    """Write one checkpoint atomically."""
    from safetensors.torch import save

    rng, values = rng_state()
    with atomic_folder(folder, overwrite=True) as target:
        for name, tensors in (("learned", learned), ("optimizer", optimizer), ("parts", parts), ("rng", rng)):
            plain = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
            (target / f"{name}.safetensors").write_bytes(save(plain))
        (target / "trainer_state.json").write_text(trainer_state, encoding="utf-8")
        (target / "progress.json").write_text(json.dumps({**progress, "rng": values}), encoding="utf-8")


def read(folder: Path, name: str) -> dict[str, Tensor]:
    """Tensors of one file of a checkpoint. Raises ArtifactError when it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(folder / f"{name}.safetensors")
    except (OSError, SafetensorError, ValueError) as error:
        raise ArtifactError(f"{folder}/{name}.safetensors cannot be read ({error})",
                            remedy=f"remove {folder} and resume from the one before it") from None


def read_progress(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "progress.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{folder}/progress.json cannot be read ({error})",
                            remedy=f"remove {folder} and resume from the one before it") from None


@torch.no_grad()
def restore_learned(folder: Path, model: nn.Module, parameters: list[tuple[str, nn.Parameter]], grafts: list[Any]) -> None:
    """Copy the learned tensors back in place."""
    saved, live = read(folder, "learned"), learned_tensors(model, parameters, grafts)
    if saved.keys() != live.keys():
        raise ArtifactError(f"{folder} holds other parameters than the recipe trains: {sorted(saved.keys() ^ live.keys())[:3]}",
                            remedy="resume with the recipe of the saved run")
    for name, tensor in live.items():
        tensor.copy_(saved[name])


def rotate(output: str | Path, limit: int | None) -> None:
    """Keep the newest `limit` checkpoints."""
    if limit is not None:
        for old in complete(output)[:-limit]:
            shutil.rmtree(old, ignore_errors=True)
