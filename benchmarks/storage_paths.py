"""The rows of benchmarks/storage_tuning.py: every way to train beside quantised weights, or the weights themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

RANKS = (1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 32, 36, 40, 48, 56, 64, 72, 80, 88, 96, 112, 128)
GROUPS = (128, 96, 64, 48, 32, 24, 16, 12, 8)  # from few numbers that train to many
LORA, SCALES, POOLED = (3e-4, 1e-3, 3e-3), (1e-4, 3e-4, 1e-3), (1e-3, 3e-3, 1e-2)
#: the row whose planned peak all others are brought to
TARGET = "lora, nf4"
#: the row that the others are compared with
BASELINE = "lora, int3"
UNSIZED = ("lora, dense",)


@dataclass(frozen=True)
class Path:
    """made: recipe sections of a size. sizes: from small to large, of which `first` is tried first. rates: of the search.
    result: what is there in the end, without loss."""

    made: Callable[[int], dict[str, Any]]
    sizes: tuple[int, ...]
    first: int
    rates: tuple[float, float, float]
    result: str


def _lora(storage: Any, result: str, first: int = 24, **more: Any) -> Path:
    return Path(lambda r: {"storage": storage, "adapter": {"method": "lora", "r": r}, **more}, RANKS, first, LORA, result)


def _fast(method: str, **more: Any) -> dict[str, Any]:
    return {"method": method, "svd": "fast", **more}


PATHS: dict[str, Path] = {
    "lora, dense": _lora("dense", "dense"),
    "lora, nf4": _lora("nf4", "nf4 + LoRA"),
    **{f"lora, int{bits}": _lora(f"int{bits}", f"int{bits} + LoRA", first) for bits, first in ((4, 24), (3, 26), (2, 28))},
    "loftq, int3": _lora("int3", "int3 + LoRA", initializer=_fast("loftq")),
    "lq_lora, int3": _lora("int3", "int3 + LoRA", 18, initializer=_fast("lq_lora", iterations=4)),
    "qa_lora, int3": Path(lambda r: {"storage": {"method": "int3", "zero_point": "float"}, "adapter": {"method": "qa_lora", "r": r}},
                          RANKS, 88, POOLED, "int3, float zeros"),
    "peqa, int3": Path(lambda g: {"storage": {"method": "int3", "group_size": g}, "adapter": {"method": "peqa"}}, GROUPS, 16, SCALES,
                       "int3"),
    "pv_tuning, int3": Path(lambda g: {"storage": {"method": "int3", "group_size": g}, "adapter": {"method": "pv_tuning"},
                                       "selection": [{"method": "pv_tuning"}]}, GROUPS, 24, SCALES, "int3"),
    "l4q, 3 bits": Path(lambda r: {"storage": "int8", "adapter": {"method": "l4q", "bits": 3, "r": r}}, RANKS, 6, SCALES,
                        "int3, float zeros"),
    "edkm, 3 bits": Path(lambda r: {"storage": "int8", "adapter": {"method": "edkm", "bits": 3, "r": r}}, RANKS, 4, LORA, "codebook3"),
}
