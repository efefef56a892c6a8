"""mlx-lm's adapter folders: adapters.safetensors and adapter_config.json.

`NAME.lora_a` (in, r) = A^T and `.lora_b` (r, out) = B^T; the change is scale * (x lora_a) lora_b with one rank and one
scale for all. mlx-lm puts LoRA on every block of the last `num_layers` and on every map in `keys` (names relative to a block),
so maps that this graft leaves alone within that range are written as zeros.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from ..adapters.graft import Graft
from ..errors import IncompatibleError
from .factors import LowRank, base_name, lora_factors
from .peft_export import write_folder

TENSORS, CONFIG = "adapters.safetensors", "adapter_config.json"
#: model types whose modules have the same names in mlx-lm
MODELS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2")
_BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)")


def write_mlx(graft: Graft, folder: str | Path, *, rank: int | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Write the folder. Returns {"error", "rank", "notes"}; rank: see `lora_factors`.

    Raises IncompatibleError for other models, maps outside of the blocks, biases and replaced modules."""
    kind = getattr(graft.model.config, "model_type", "")
    if kind not in MODELS:
        raise IncompatibleError(f"the module names of '{kind}' models in mlx-lm are not known here (known: {', '.join(MODELS)})",
                                remedy="convert --to merged and use mlx_lm.convert on that folder")
    factors = lora_factors(graft, rank)
    places = {name: _BLOCK.fullmatch(name) for name in factors.modules}
    outside = [name for name, place in places.items() if place is None]
    whats = {f"a change of '{(outside or [''])[0]}'": outside, "whole modules": graft.saved_modules, "rows of trained tokens":
             graft.trainable_tokens, "changes of biases": any(bool(change.any()) for change in factors.biases.values())}
    what = next((what for what, found in whats.items() if found), None)
    if what:
        raise IncompatibleError(f"mlx-lm's adapters do not hold {what}", remedy="convert --to merged")
    r, total = factors.rank, graft.model.config.num_hidden_layers
    first = min(int(place[1]) for place in places.values())
    shapes = {place[2]: (factors.modules[name].A.shape[1], factors.modules[name].B.shape[0]) for name, place in places.items()}
    tensors = {}
    for layer in range(first, total):
        for key, (width, height) in shapes.items():
            name = f"model.layers.{layer}.{key}"
            pair = factors.modules.get(name) or LowRank(torch.zeros(r, width), torch.zeros(height, r))
            pair = pair.folded(r)
            tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = pair.A.T, pair.B.T
    config = {"fine_tune_type": "lora", "model": base_name(graft), "num_layers": total - first,
              "lora_parameters": {"rank": r, "scale": 1.0, "dropout": 0.0, "keys": sorted(shapes)}}
    write_folder(folder, TENSORS, tensors, CONFIG, config, overwrite=overwrite)
    return {"error": factors.error, "rank": r, "notes": []}
