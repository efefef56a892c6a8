"""What the storage claims share: SmolLM2-135M-Instruct in a storage, and its loss on text that no calibration saw.

Calibration rows are of `lm/c4_sample` (its calibration split), losses of `lm/wikitext2_raw` (test). The model's file was once in 4 bits
with groups of 32, so no claim uses that format on it. --quick: two blocks of the model, two rows: it shows that a claim runs and no more.
"""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Callable, Sequence
from typing import Any

WINDOW, ROWS, CALIBRATION = 256, 32, 24


def text(path: str) -> str:
    from .tasks import data_folder

    with gzip.open(data_folder() / path, "rt", encoding="utf-8") as file:
        return file.read()


def windows(tokenizer: Any, length: int, rows: int, seed: int = 0) -> Any:
    """(rows, length) tokens of wikitext2's test text; another seed, another stretch of it."""
    import torch

    whole, size = text("lm/wikitext2_raw/test.txt.gz"), 8 * length * rows
    first = seed * size % max(1, len(whole) - size)
    ids = tokenizer(whole[first:first + size], add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[:rows * length]).view(rows, length)


class Base:
    """The dense model, its calibration rows and its test rows."""

    def __init__(self, seed: int = 0, quick: bool = False, rows: int = ROWS, *, blocks: int | None = None,
                 calibration: tuple[int, int] = (CALIBRATION, WINDOW)):
        """blocks: only the first ones. calibration: rows and their length."""
        from .. import load
        from ..data.calibration import calibration_rows

        self.dense, tokenizer = load("smollm2-135m-instruct", dtype="fp32")
        self.dense.eval().requires_grad_(False)
        if quick or blocks:
            layers = self.dense.model.layers
            self.dense.model.layers = type(layers)(list(layers)[:blocks or 2])
            self.dense.config.num_hidden_layers = blocks or 2
        lines = text("lm/c4_sample/calibration.jsonl.gz").splitlines()[seed * 50:]
        samples, length = (2, 64) if quick else calibration
        self.calibration = calibration_rows([json.loads(line)["text"] for line in lines], tokenizer, samples=samples, length=length)
        self.test = windows(tokenizer, 64 if quick else WINDOW, 2 if quick else rows, seed)

    def stored(self, section: dict[str, Any], edit: Callable[[Any], None] | None = None) -> Any:
        """A copy of the model in a storage. edit: what is done to the dense copy before."""
        from ..registry import make_config
        from ..storage.base import apply_storage

        model, options = copy.deepcopy(self.dense), dict(section)
        if edit is not None:
            edit(model)
        return apply_storage(model, make_config("storage", options.pop("method"), **options), batches=self.calibration.batches, notes=[])

    def losses(self, model: Any) -> list[float]:
        """Mean loss (nats a token) of each test row."""
        import torch
        import torch.nn.functional as F

        found = []
        with torch.no_grad():
            for rows in self.test.split(4):
                logits = model(rows).logits[:, :-1].float()
                found += F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none").mean(1).tolist()
        return found

    def hidden(self, model: Any) -> Any:
        """(rows, tokens, width) after the last block of the test rows."""
        import torch

        with torch.no_grad():
            return torch.cat([model.model(rows, output_hidden_states=True).hidden_states[-1] for rows in self.test.split(4)])


def compare(arms: dict[str, dict[str, Any]], seed: int, quick: bool, rows: int = ROWS) -> dict[str, dict[str, Any]]:
    """{arm: {loss: by row, bits: stored a weight}} of storages on the same calibration and test rows."""
    from ..storage.base import storage_bits

    base, found = Base(seed, quick, rows), {}
    for name, section in arms.items():
        dense = section["method"] == "dense"
        model = base.dense if dense else base.stored(section)
        found[name] = {"loss": base.losses(model), "bits": 32.0 if dense else storage_bits(model)}
    return found


def planted(model: Any, channels: Sequence[int] = (3, 57, 200, 411, 500), factor: float = 20.0) -> None:
    """Outlier channels that change no output: the norms before attention and feed-forward make them `factor` times larger, the maps
    that read them divide by it."""
    import torch

    with torch.no_grad():
        for block in model.model.layers:
            for norm, maps in ((block.input_layernorm, (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)),
                               (block.post_attention_layernorm, (block.mlp.gate_proj, block.mlp.up_proj))):
                norm.weight[list(channels)] *= factor
                for each in maps:
                    each.weight[:, list(channels)] /= factor


