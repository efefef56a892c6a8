"""The choices that advice looks at, drawn from the registry: how the weights are kept, what learns and by which rule, and the schedule.

Nothing here names a method; methods are told apart by their traits and by what was measured of them:

    storage     lossless ones; those measured; of the others those that code groups or blocks without reading data, of formats with
                the same whole number of bits the smallest
    arms        every adapter under every optimizer that does not project; full tuning under every optimizer, also fused, and under
                every selection that is made for it; every other estimator on full tuning and on the baseline adapter. A selection
                that an adapter needs comes with it; others are arms where they were measured
    schedule    activation checkpointing on and off, rows a micro-batch from all to one with accumulation (the batch that is learned
                from stays), precision

Options are those that a method was measured with, else its defaults; where the user's recipe has the method, the recipe's.
Which combinations are possible is left to the rules of recipes: `load_recipe` refuses the others when it meets them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..registry import MethodInfo, lookup, make_config, methods
from .evidence import Evidence

Section = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """What learns, and how: the sections of a recipe. fused: full gradients never exist together."""

    adapter: Section | None
    optimizer: Section | None
    estimator: Section = field(default_factory=lambda: {"method": "backprop"})
    selection: tuple[Section, ...] = ()

    @property
    def fused(self) -> bool:
        return bool(self.optimizer and lookup("optimizer", self.optimizer["method"]).config(**_options(self.optimizer)).fused)


@dataclass(frozen=True)
class Candidate:
    """One recipe: an arm on a storage under a schedule. rows: of a micro-batch."""

    storage: Section
    arm: Arm
    rows: int
    accumulation: int
    checkpointing: bool
    precision: str

    def names(self) -> dict[str, str]:
        """{axis: method} in words of the registry; what is absent is absent."""
        arm = self.arm
        found = {"storage": self.storage["method"], "adapter": arm.adapter and arm.adapter["method"],
                 "optimizer": arm.optimizer and arm.optimizer["method"], "estimator": arm.estimator["method"],
                 "selection": "+".join(s["method"] for s in arm.selection)}
        return {axis: name for axis, name in found.items() if name}

    def document(self, base: dict[str, Any]) -> dict[str, Any]:
        """A recipe document: the user's, with this candidate's sections."""
        train = {**base.get("train", {}), "batch_size": self.rows, "grad_accumulation": self.accumulation,
                 "gradient_checkpointing": self.checkpointing, "precision": self.precision}
        gradients = lookup("estimator", self.arm.estimator["method"]).traits["gradients"]
        if not gradients:
            train.pop("max_grad_norm", None)
        elif self.arm.fused:
            train["max_grad_norm"] = 0
        made = {**base, "storage": self.storage, "adapter": self.arm.adapter, "optimizer": self.arm.optimizer,
                "estimator": self.arm.estimator, "selection": list(self.arm.selection), "train": train}
        if self.arm.adapter is None or (base.get("adapter") or {}).get("method") != self.arm.adapter["method"]:
            made.pop("initializer", None)  # the method's own
        return copy.deepcopy(made)


def _options(section: Section) -> Section:
    return {k: v for k, v in section.items() if k != "method"}


class Space:
    """The choices for one recipe document. kind: task of its objective; wide: the learned batch in rows; among: {axis: names} that the
    user restricts the search to ("full" stands for no adapter)."""

    def __init__(self, base: dict[str, Any], evidence: Evidence, kind: str, wide: int, precisions: tuple[str, ...],
                 among: dict[str, list[str]] | None = None):
        self.base, self.evidence, self.kind, self.wide, self.precisions = base, evidence, kind, wide, precisions
        self.among = among or {}

    def wanted(self, axis: str, name: str) -> bool:
        return axis not in self.among or name in self.among[axis]

    def section(self, info: MethodInfo) -> Section:
        """A method with the recipe's options, with those it was measured with, or with its defaults."""
        own = self.base.get(info.axis)
        if isinstance(own, dict) and own.get("method") == info.name:
            return dict(own)
        known = info.config.model_fields
        measured = {k: v for k, v in (self.evidence.section(info.axis, info.name, (self.kind, "adapter")) or {}).items() if k in known}
        sites = {"target_modules": "all-linear"} if "target_modules" in known else {}
        return {"method": info.name, **sites, **measured}

    # -- storage -------------------------------------------------------------------------------------------------------
    def storages(self) -> list[Section]:
        found, smallest = [], {}
        for info in methods("storage"):
            measured = [r["section"] for r in self.evidence.rows.get(("storage", info.name), [])]
            if "storage" in self.among:
                found += [self.section(info)] if info.name in self.among["storage"] else []
            elif info.traits["lossless"] or measured:
                found += [{"method": info.name, **options} for options in measured or [{}]]
            elif (self.base.get("storage") or {}).get("method") == info.name:
                found.append(self.section(info))
            elif {"group_size", "block_size"} & set(info.config.model_fields) and not info.cls.needs(info.config()):
                bits = bits_of({"method": info.name})
                if bits < smallest.get(int(bits), ({}, 99.0))[1]:
                    smallest[int(bits)] = ({"method": info.name}, bits)
        return found + [section for section, _ in smallest.values() if section["method"] not in {f["method"] for f in found}]

    # -- arms ----------------------------------------------------------------------------------------------------------
    def arms(self) -> Iterator[Arm]:
        every = [o for o in methods("optimizer") if self.wanted("optimizer", o.name)]
        plain = [self.section(o) for o in every if not o.traits["projects"]]
        baseline = self.evidence.baselines
        rule = self.section(lookup("optimizer", baseline["optimizer"]))
        usual = self.wanted("estimator", baseline_estimator()) and "selection" not in self.among
        for info in methods("adapter"):
            if not self.wanted("adapter", info.name) or (info.traits["scope"] == "model" and self.kind != "causal_lm"):
                continue
            partner = info.traits.get("selection")
            with_it = ({"method": partner},) if partner else ()
            section = self.section(info)
            yield from (Arm(section, dict(o), selection=with_it) for o in plain if usual or (partner and self.wanted("selection", partner)))
            for s in methods("selection"):
                if info.name in s.traits["adapters"] and s.name != partner and self.wanted("selection", s.name) and (
                        ("selection", s.name) in self.evidence.rows or "selection" in self.among):
                    yield Arm(section, rule, selection=({"method": s.name},))
        full = self.wanted("adapter", "full")
        for info in every if full and usual else []:
            section = self.section(info)
            yield Arm(None, section)
            if info.traits["fused_capable"] and not info.config().fused:
                yield Arm(None, {**section, "fused": True})
        for info in methods("selection") if full else []:
            if not info.traits["adapters"] and self.wanted("selection", info.name) and self.wanted("optimizer", rule["method"]):
                yield Arm(None, rule, selection=(self.section(info),))
        for info in methods("estimator"):
            if info.name == baseline_estimator() or not self.wanted("estimator", info.name) or "selection" in self.among:
                continue
            optimizer = rule if info.traits["gradients"] else None
            for adapter in ([None] if full else []) + [self.section(a) for a in methods("adapter") if a.name == baseline["adapter"]
                                                      and self.wanted("adapter", a.name)]:
                yield Arm(adapter, optimizer, self.section(info))

    # -- schedule ------------------------------------------------------------------------------------------------------
    def schedules(self, arm: Arm) -> Iterator[tuple[int, int, bool, str]]:
        """(rows, accumulation, checkpointing, precision) of an arm."""
        traits = lookup("estimator", arm.estimator["method"]).traits
        backward = traits["gradients"] and traits["differentiates"]
        parts = [1] if arm.fused else [n for n in range(1, self.wide + 1) if self.wide % n == 0]
        for precision in self.precisions:
            for n in parts:
                for checkpointing in (False, True) if backward else (False,):
                    yield self.wide // n, n, checkpointing, precision

    def candidates(self) -> Iterator[Candidate]:
        storages, arms = self.storages(), list(self.arms())
        for arm in arms:
            for storage in storages:
                traits = lookup("storage", storage["method"]).traits
                if arm.adapter is None and not (traits["lossless"] or traits.get("trainable")):
                    continue  # the rules refuse it anyway; said here because it is most of the product
                for schedule in self.schedules(arm):
                    yield Candidate(storage, arm, *schedule)


def baseline_estimator() -> str:
    return "backprop"


def bits_of(section: Section, size: int = 1024) -> float:
    """Bits a weight of a storage, its metadata included, from a matrix without memory; of a lossless one 0 (the precision tells)."""
    import torch

    info = lookup("storage", section["method"])
    if info.traits["lossless"]:
        return 0.0
    with torch.device("meta"):
        weight = torch.empty(size, size, dtype=torch.bfloat16)
        return info.cls.from_weight(weight, make_config("storage", section["method"], **_options(section))).bits_per_weight




__all__ = ["Arm", "Candidate", "Section", "Space", "bits_of"]
