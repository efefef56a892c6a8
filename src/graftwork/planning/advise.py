"""The nearest fit: the smallest change of a recipe with which its planned peak fits a budget.

Changes come in classes, mildest first, and each class builds on the strongest form of the ones before it:

    schedule   the same learning, other memory: activation checkpointing, batch / n with accumulation * n
    storage    frozen weights as NF4 (recipes with an adapter)
    method     full tuning: GaLore for AdamW, then LoRA; an adapter: half and quarter rank
    length     max_length / 2, / 4

Within a class candidates are simulated one after another, and the first that fits is the answer. A class is left out without
a walk when its strongest form does not fit; the schedule is left out without a simulation when the weights, adapters and
optimizer state of the plan at hand, which it cannot change, already exceed the budget. Candidates that the rules of
combination refuse are passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..errors import GraftworkError
from ..recipe import Recipe, load_recipe
from ..registry import lookup
from .simulate import Plan, plan


@dataclass
class Advice:
    """overrides: what to add to the recipe; plan: the plan with them (fits is True); None for both when nothing fits.
    tried: (overrides, expected device bytes) of every simulation."""

    overrides: list[str] | None
    plan: Plan | None
    tried: list[tuple[list[str], int]] = field(default_factory=list)

    @property
    def smallest(self) -> tuple[list[str], int] | None:
        return min(self.tried, key=lambda each: each[1], default=None)

    def to_json(self) -> dict[str, Any]:
        made = self.plan
        return {"overrides": self.overrides, "peak_bytes": made and made.peak_bytes,
                "device_bytes": made and made.device["total_bytes"],
                "tried": [{"overrides": o, "device_bytes": n} for o, n in self.tried]}


def nearest_fit(recipe: Recipe, budget: int, first: Plan, *, device: str | None = None, say: Callable[[str], None] | None = None,
                simulate: Callable[..., Plan] = partial(plan, every_block=False)) -> Advice:
    """Search from `first`, the plan of `recipe`, which does not fit `budget` bytes."""
    return _Search(recipe, budget, device, say or (lambda text: None), simulate).run(first)


class _Search:
    def __init__(self, recipe: Recipe, budget: int, device: str | None, say: Callable[[str], None], simulate: Callable[..., Plan]):
        self.recipe, self.budget, self.device, self.say, self.simulate = recipe, budget, device, say, simulate
        self.made: dict[tuple[str, ...], Plan | None] = {}
        self.advice = Advice(None, None)

    def run(self, first: Plan) -> Advice:
        base: list[str] = []  # the changes that are kept while stronger ones are added
        here: Plan | None = first
        for change in [[], *self.stronger()]:
            base_now = merged(base, change)
            if change:
                here = self.try_out(base_now)
                if here is None:
                    continue
                base = base_now
                if here.fits:
                    return self.found(base)
            if fixed_bytes(here) > self.budget:
                continue
            steps = list(self.schedules())
            if steps:
                strongest = self.try_out(merged(base, steps[-1]))
                if strongest is not None and not strongest.fits:
                    continue
                for each in steps:
                    made = self.try_out(merged(base, each))
                    if made is not None and made.fits:
                        return self.found(merged(base, each))
        return self.advice

    def found(self, overrides: list[str]) -> Advice:
        self.advice.overrides, self.advice.plan = overrides, self.made[tuple(overrides)]
        return self.advice

    def try_out(self, overrides: list[str]) -> Plan | None:
        """The plan with these overrides; None for a combination that is refused."""
        key = tuple(overrides)
        if key not in self.made:
            try:
                changed = load_recipe(self.recipe.document(), overrides)
                self.made[key] = self.simulate(changed, budget=self.budget, device=self.device, estimate_time=False)
                total = self.made[key].device["total_bytes"]
                self.advice.tried.append((overrides, total))
                self.say(f"tried {' '.join(overrides)}: {total / 2**20:.0f} MiB")
            except GraftworkError:
                self.made[key] = None
        return self.made[key]

    def schedules(self) -> Iterator[list[str]]:
        """Changes of the schedule, mildest first; the last is the strongest."""
        train = self.recipe.train
        gradients = lookup("estimator", self.recipe.estimator.method).traits.get("gradients", True)
        checkpoints = [] if train.gradient_checkpointing or not gradients else ["train.gradient_checkpointing=true"]
        if checkpoints:
            yield checkpoints
        for n in divisors(train.batch_size):
            smaller = [f"train.batch_size={train.batch_size // n}", f"train.grad_accumulation={train.grad_accumulation * n}"]
            yield smaller
            if checkpoints:
                yield [*checkpoints, *smaller]

    def stronger(self) -> Iterator[list[str]]:
        """Changes beyond the schedule, mildest first; each is added to the ones before it."""
        recipe = self.recipe
        if recipe.adapter is not None and recipe.storage.method == "dense":
            yield ["storage=nf4"]
        if recipe.adapter is None:
            if recipe.optimizer is not None and not lookup("optimizer", recipe.optimizer.method).traits.get("projects"):
                yield ["optimizer=galore", f"optimizer.lr={recipe.optimizer.lr}"]
            tuned = ["optimizer=adamw", "optimizer.lr=0.0002"] if recipe.optimizer is not None else []
            yield ["adapter=lora", "storage=nf4", *(["selection=[]"] if recipe.selection else []), *tuned]
        elif (rank := getattr(recipe.adapter, "r", 1)) > 1 and not recipe.adapter_from:
            for smaller in dict.fromkeys((max(rank // 2, 1), max(rank // 4, 1))):
                yield [f"adapter.r={smaller}"]
        for n in (2, 4):
            if recipe.data.max_length // n >= 16:
                yield [f"data.max_length={recipe.data.max_length // n}"]


def divisors(n: int) -> list[int]:
    """Divisors of n above 1, smallest first, each a multiple of the one before (prime factors taken one by one)."""
    found, product, factor = [], 1, 2
    while n > 1:
        while n % factor == 0:
            n //= factor
            product *= factor
            found.append(product)
        factor += 1
    return found


def merged(base: list[str], change: list[str]) -> list[str]:
    """Both lists; where they name the same key, or a section and a key below it, the change wins."""
    keys = [each.partition("=")[0] for each in change]
    kept = [each for each in base if not any((k := each.partition("=")[0]) == key or k.startswith(f"{key}.") for key in keys)]
    return [*kept, *change]


def fixed_bytes(made: Plan) -> int:
    """Bytes that no change of the schedule moves: weights, adapters, optimizer state, and what the device needs for itself."""
    here = made.categories
    return here["weights"] + here["adapters"] + here["optimizer_state"] + made.device["context_bytes"]


__all__ = ["Advice", "divisors", "fixed_bytes", "merged", "nearest_fit"]
