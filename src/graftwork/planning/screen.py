"""A guess at peak and time of a candidate, by arithmetic from one plan: which of thousands are worth a plan of their own.

From the anchor, one recipe planned on the model's first block and on its first two, come activations and logits per row and the time
of a step, extrapolated to all blocks; from the model its shapes. Then, with N_s values in the matrices that a storage keeps, N_r in the
rest, e bytes a value, b bits a weight, n trained values,

    weights      N_s b / 8 + N_r e                                      (lossless: N_s e)
    state        sum over shapes of the optimizer's own `state_bytes`
    gradients    n (4 or e) bytes; those of one tensor where updates are fused into backward; none without a backward pass
    activations  those of the anchor x rows x the method's measured peak over LoRA's; with checkpointing the inputs of L blocks and one
                 block's activations; a forward alone keeps those of about one block
    time         the anchor's x the method's measured step; x 4/3 with checkpointing; x 3/2 where full weights have gradients; x 2/3
                 where only forwards run; and the traffic of decoding codes, 3 passes a micro-batch, at the roofline's bandwidth

Peaks are right to about a quarter, which is enough to leave out what is far from the Pareto set or the budget. No figure of this
module is ever printed as a plan.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..registry import lookup, make_config
from .evidence import Evidence
from .roofline import Roofline
from .space import Arm, Candidate, Section, bits_of

BYTES = {"bf16": 2, "fp32": 4}
#: of the trained values whose gradient and state live at once, where a selection chooses among the model's own
SELECTED = 0.25
#: traffic of decoding a weight, in bytes of the dense one
DECODED = 4


@dataclass(frozen=True)
class Shapes:
    """What the model is made of. sites: {(out, in): how many} linear maps of its blocks; rest: values outside; layers, hidden, vocab."""

    sites: Counter
    rest: int
    layers: int
    hidden: int

    @property
    def kept(self) -> int:
        return sum(out * into * n for (out, into), n in self.sites.items())


def shapes_of(recipe: Any) -> Shapes:
    """From the config alone."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from ..modeling.models import load_model
    from ..modeling.sites import find_sites
    from ..training.build import task_of

    with FakeTensorMode(allow_non_fake_inputs=True):
        task = task_of(recipe)
        model, _ = load_model(recipe.model, task=task, num_labels=2 if task == "classification" else None, fake=True,
                              trust_remote_code=recipe.trust_remote_code)
        sites = Counter((s.out_features, s.in_features) for s in find_sites(model, "all-linear"))
        total = sum(p.numel() for p in model.parameters())
    text = model.config.get_text_config()
    kept = sum(out * into * n for (out, into), n in sites.items())
    return Shapes(sites, max(0, total - kept), max(1, getattr(text, "num_hidden_layers", 1)), getattr(text, "hidden_size", 1))


def shallow(model: str, blocks: int) -> str | None:
    """The path of a config like the model's with so few blocks; None where it has no more, or keeps codes or code of its own."""
    from ..cache import cache_folder
    from ..files import atomic_write_text
    from ..modeling.models import load_config

    config = load_config(model)
    text = config.get_text_config()
    layers = getattr(text, "num_hidden_layers", 0)
    if layers <= blocks or text is not config or getattr(config, "quantization_config", None) or getattr(config, "auto_map", None):
        return None
    made = {k: v[:blocks] if isinstance(v, list) and len(v) == layers else v for k, v in config.to_dict().items()}
    made[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = blocks
    content = json.dumps(made, sort_keys=True, default=str)
    path = cache_folder("advice") / f"config-{hashlib.sha256(content.encode()).hexdigest()[:16]}.json"
    if not path.exists():
        atomic_write_text(path, content)
    return str(path)


def extrapolated(one: dict[str, float], two: dict[str, float], layers: int) -> dict[str, float]:
    """Figures of a model of so many equal blocks from those of one and of two."""
    return {key: max(0.0, one[key] + (layers - 1) * (two[key] - one[key])) for key in one}


@dataclass(frozen=True)
class Guess:
    """Tensor bytes at the peak, seconds of a step, bytes of what is saved."""

    peak: float
    seconds: float
    saved: float


class Screen:
    """anchor: a candidate; at: bytes of activations, logits and other at its peak, and seconds of its step; tokens: of a row."""

    def __init__(self, shapes: Shapes, evidence: Evidence, kind: str, anchor: Candidate, at: dict[str, float], roofline: Roofline,
                 tokens: int):
        self.shapes, self.evidence, self.kind, self.roofline, self.tokens = shapes, evidence, kind, roofline, tokens
        self.anchor, self.seconds, self.at = anchor, at["seconds"], at
        self._bits: dict[str, float] = {}
        self._arms: dict[int, tuple[float, float]] = {}

    @cached_property
    def activations(self) -> tuple[float, float]:
        """(activations and the rest, logits) of a row at the anchor's precision without checkpointing."""
        at = self.at
        return (at["activations"] + at["other"]) / self.anchor.rows, at["logits"] / self.anchor.rows

    def bits(self, storage: Section) -> float:
        key = repr(storage)
        if key not in self._bits:
            self._bits[key] = bits_of(storage)
        return self._bits[key]

    def learned(self, arm: Arm) -> tuple[float, float]:
        """(trained values, bytes of optimizer state) of an arm."""
        if id(arm) not in self._arms:
            self._arms[id(arm)] = self._learned(arm)
        return self._arms[id(arm)]

    def _learned(self, arm: Arm) -> tuple[float, float]:
        state = lookup("optimizer", arm.optimizer["method"]).cls if arm.optimizer else None
        options = make_config("optimizer", **_named(arm.optimizer)) if arm.optimizer else None
        if arm.adapter is None:
            kept = sum(n * state.state_bytes(shape, config=options) for shape, n in self.shapes.sites.items()) if state else 0.0
            per_value = kept / max(1, self.shapes.kept)
            return self.shapes.kept + self.shapes.rest, kept + per_value * self.shapes.rest
        info, config = lookup("adapter", arm.adapter["method"]), make_config("adapter", **_named(arm.adapter))
        values = 0.0
        for (out, into), n in self.shapes.sites.items():
            site = type("Shape", (), {"in_features": into, "out_features": out, "name": "site"})()
            try:
                values += n * info.cls.parameter_count(site, config)
            except (AttributeError, NotImplementedError, TypeError, KeyError):  # its size is not that of single sites
                values += n * 8 * (out + into)
        return values, state.state_bytes((math.ceil(values),), role="other", config=options) if state else 0.0

    def guess(self, c: Candidate) -> Guess:
        size, s = BYTES[c.precision], self.shapes
        traits = lookup("estimator", c.arm.estimator["method"]).traits
        backward = traits["gradients"] and traits["differentiates"]
        bits, (n, state) = self.bits(c.storage), self.learned(c.arm)
        peak_ratio, step_ratio = self.evidence.cost(c.arm.adapter["method"], (self.kind, "adapter")) if c.arm.adapter else (1.0, 1.0)
        weights = s.kept * (bits / 8 if bits else size) + s.rest * size
        own = size if c.arm.adapter is None else 4
        share = SELECTED if c.arm.selection and c.arm.adapter is None else 1.0
        gradients = 0.0 if not backward else s.hidden * s.hidden * 4 * own if c.arm.fused else share * n * own
        per_row, logits = (a * size / BYTES[self.anchor.precision] for a in self.activations)
        moving = per_row / s.layers if not backward else per_row * peak_ratio if not c.checkpointing else (
            per_row / s.layers + s.layers * self.tokens * s.hidden * size)
        peak = weights + (n * 4 if c.arm.adapter else 0) + gradients + share * state + c.rows * (moving + logits)
        seconds = self.seconds * step_ratio * (1.0 if backward else 2 / 3) * (4 / 3 if c.checkpointing else 1.0)
        seconds *= 1.5 if c.arm.adapter is None and backward else 1.0
        seconds *= self._rate(self.anchor.precision) / self._rate(c.precision)
        if bits:
            seconds += 3 * c.accumulation * DECODED * s.kept * size / self.roofline.bandwidth
        return Guess(peak, seconds, n * 4 if c.arm.adapter else (s.kept + s.rest) * size)

    def _rate(self, precision: str) -> float:
        rates = self.roofline.rates
        return rates.get({"bf16": "bfloat16", "fp32": "float32"}[precision], min(rates.values()))


def _named(section: Section) -> dict[str, Any]:
    return {"name": section["method"], **{k: v for k, v in section.items() if k != "method"}}


__all__ = ["Guess", "Screen", "Shapes", "extrapolated", "shallow", "shapes_of"]
