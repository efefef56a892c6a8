"""Advice: the recipes for one model, budget and set of wishes that nobody would refuse (`graft plan --advise`).

    1. space     all candidates of the registry for this recipe (space.py)
    2. screen    a guess at each from the plan of an anchor on two blocks (screen.py); what is far over the budget, or beaten in the
                 guesses by another, drops out
    3. plans     the best of the rest, one after another, are planned as `graft plan` does: the real step on fake tensors
    4. result    of the planned ones that fit, the Pareto set in peak, time, evidence, file size, merging and serving

Every finished plan is kept in the cache under the recipe, the device and the versions, so an interrupted search goes on where it
was and a second one is quick. Which recipes are possible is decided by the rules of recipes and by the planner itself; a refused
candidate is passed over and counted.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from ..cache import file_stamp, remember
from ..errors import GraftworkError, UsageError, nearest
from ..recipe import Recipe, load_recipe
from ..registry import lookup
from .ahead import Ahead, Planner
from .evidence import Evidence, packaged
from .judging import WISHES, Row, order, quality, reasons
from .measure import expected_device_bytes, format_bytes
from .pareto import coarse, front, pick
from .roofline import Roofline
from .screen import Guess, Screen, extrapolated, shallow, shapes_of
from .simulate import plan
from .space import Arm, Candidate, Space

#: a guess may be so far over the budget and still be planned
SLACK = 1.15
#: learning rates of an adapter under AdamW at widths up to 1024 and beyond, and the share of them for full weights
RATES, FULL_SHARE = (1e-3, 2e-4), 0.05


@dataclass
class Found:
    """rows: the Pareto set in the order of the wishes. candidates: looked at; planned: (names, device bytes) of every plan;
    refused: why candidates were passed over; smallest: the planned one with the least memory, fits or not."""

    rows: list[Row]
    candidates: int
    planned: list[Row]
    refused: list[str]
    smallest: Row | None
    roofline: Roofline
    budget: int | None
    device: str
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {"rows": [row.to_json() for row in self.rows], "candidates": self.candidates, "planned": len(self.planned),
                "refused": self.refused, "budget": self.budget, "device": self.device, "roofline": self.roofline.to_json(),
                "smallest": self.smallest and self.smallest.to_json(), "notes": self.notes}


def planned(document: dict[str, Any], device: str) -> dict[str, Any]:
    """What a row needs of the plan of a recipe, from the cache where it was planned before. {"refused": why} for a recipe that
    cannot be built."""
    stamp = file_stamp(document["model"]) if Path(document["model"]).exists() else document["model"]
    told = {k: v for k, v in document.items() if k != "output_dir"}
    key = ["advice 2", told, device, stamp, [version(p) for p in ("graftwork", "torch", "transformers")]]

    def compute() -> dict[str, Any]:
        try:
            made = plan(load_recipe(document), use_data=False, estimate_time=False, device=device, every_block=False)
        except GraftworkError as error:
            return {"refused": error.message}
        return {**{k: getattr(made, k) for k in ("peak_bytes", "categories", "device", "trained", "batch", "flops", "saved_bytes", "work",
                                                 "notes", "simulated_in")}}

    return remember("advice", json.dumps(key, sort_keys=True), compute)


def advise(recipe: Recipe, *, budget: int | None, device: str, roofline: Roofline, wishes: Sequence[str] = (), plans: int = 8,
           among: dict[str, list[str]] | None = None, tokens: int | None = None, say: Callable[[str], None] = lambda text: None,
           evidence: Evidence | None = None, planner: Planner = planned, jobs: int = 1) -> Found:
    """Search from `recipe`: its model, data, objective and the rows that a step learns from stay. tokens: of the longest row, where
    the data tell. plans: how many candidates are planned at most. jobs: processes that plan side by side; the result does not depend on
    it, and a script that asks for more than one has to guard its main module, as for every pool of processes. Raises UsageError for
    wishes and recipes that it cannot serve."""
    for wish in wishes:
        if wish not in WISHES:
            raise UsageError(f"nothing can be sought for '{wish}'{nearest(wish, WISHES)}", remedy=f"--for: {', '.join(WISHES)}")
    if recipe.is_fleet or recipe.adapter_from:
        raise UsageError("advice is for one new run: the recipe " + ("trains a fleet" if recipe.is_fleet else "continues a saved adapter"),
                         remedy="name one file in data.train, and no adapter.from")
    with Ahead(planner, jobs) as ahead:
        search = _Search(recipe, budget, device, roofline, list(wishes) or ["quality"], evidence or packaged(), tokens, say, ahead)
        return search.run(plans, among)


class _Search:
    def __init__(self, recipe: Recipe, budget: int | None, device: str, roofline: Roofline, wishes: list[str], evidence: Evidence,
                 tokens: int | None, say: Callable[[str], None], planner: Ahead):
        self.recipe, self.budget, self.device, self.roofline, self.wishes = recipe, budget, device, roofline, wishes
        self.evidence, self.say, self.planner = evidence, say, planner
        self.base = recipe.document()
        self.tokens = min(tokens or recipe.data.max_length, recipe.data.max_length)
        self.kind = lookup("objective", recipe.objective.method).traits["task"]
        self.refused: list[str] = []
        self.rows: list[Row] = []
        self.compared: list[tuple[Row, float]] = []  # plans with what was guessed
        low, high = (expected_device_bytes(n, device)["total_bytes"] for n in (0, 2**40))
        self.beside, self.share = low, (high - low) / 2**40  # device bytes of tensor bytes

    def run(self, plans: int, among: dict[str, list[str]] | None) -> Found:
        own = self.recipe.train.precision
        other = {"cpu": ("fp32", "bf16"), "cuda": ("bf16",)}[self.device]
        wide = self.recipe.train.batch_size * self.recipe.train.grad_accumulation
        space = Space(self.base, self.evidence, self.kind, wide, tuple(dict.fromkeys((own, *other))), among)
        anchor, shapes = self.anchor(space), shapes_of(self.recipe)
        self.say("planning the anchor: " + describe(anchor))
        screen = Screen(shapes, self.evidence, self.kind, anchor, self.figures(anchor, shapes.layers), self.roofline, self.tokens)
        pool, looked = self.screened(space, screen)
        fitting = [each for each in pool if self.budget is None or each.total <= SLACK * self.budget]
        self.say(f"{looked:,} candidates, {len(fitting):,} of the Pareto set of the guesses are near the budget")
        keys = [order([w, *self.wishes]) for w in dict.fromkeys([*self.wishes, *WISHES])] + [lambda g: g.total, lambda g: g.seconds]
        picked = pick(fitting or pool, keys, lambda g: (str(g.candidate.arm.adapter), str(g.candidate.storage)), 4 * plans)
        tried, plans = 0, plans if fitting else min(plans, 3)
        line = [*picked, *sorted(pool, key=lambda g: g.total)]  # where nothing fits, the smallest are looked at last
        for place, guess in enumerate(line):
            if tried == plans or (guess not in picked and self.fits_some()):
                break
            if self.open(guess, fitting):
                coming = (g for g in line[place:] if self.open(g, fitting))
                for each in islice(coming, min(self.planner.jobs, plans - tried)):
                    self.planner.expect(self.planning_document(each.candidate), self.device)
                tried += self.look(guess, tried, plans)
        return self.result(looked, shapes)

    def open(self, guess: _Guessed, fitting: list[_Guessed]) -> bool:
        """Whether it would be looked at, as far as is known now."""
        return (not fitting or self.corrected(guess)) and not any(row.candidate is guess.candidate for row in self.rows)

    def anchor(self, space: Space) -> Candidate:
        """LoRA (the adapters' baseline) with AdamW on the first lossless storage, as many rows as a step learns from."""
        base = self.evidence.baselines
        arm = Arm(space.section(lookup("adapter", base["adapter"])), space.section(lookup("optimizer", base["optimizer"])))
        return Candidate({"method": base["storage"]}, arm, space.wide, 1, False, space.precisions[0])

    def figures(self, anchor: Candidate, layers: int) -> dict[str, float]:
        """What the screen takes from the anchor: from the plans of one and of two blocks, or of the whole model where it is not cut."""
        found = []
        for model in [shallow(self.recipe.model, 1), shallow(self.recipe.model, 2)] if layers > 2 else [None]:
            document = self.planning_document(anchor)
            made = self.planner({**document, "model": model or document["model"]}, self.device)
            if "refused" in made:
                raise UsageError(f"the model cannot be planned: {made['refused']}", remedy="graft plan RECIPE tells more")
            found.append({**{k: made["categories"][k] for k in ("activations", "logits", "other")},
                          "seconds": self.roofline.seconds(made["work"])})
            if model is None:
                return found[-1]
        return extrapolated(*found, layers)

    def screened(self, space: Space, screen: Screen) -> tuple[list[_Guessed], int]:
        """(candidates whose guesses no other's dominate, how many there were). Of one arm on one storage the schedules are compared
        first, in peak and time alone: nothing else depends on them."""
        kept: list[_Guessed] = []
        looked, group, last = 0, [], None
        for candidate in [*space.candidates(), None]:
            key = candidate and (id(candidate.arm), id(candidate.storage), candidate.precision)
            if key != last and group:
                kept += front(group, lambda g: (coarse(g.total), coarse(g.seconds)))
                group = []
            last = key
            if candidate is not None:
                looked += 1
                group.append(self.guessed(candidate, screen))
        near = [g for g in kept if self.budget is None or g.total <= SLACK * self.budget] or kept
        return front(near, lambda g: g.vector()), looked

    def guessed(self, candidate: Candidate, screen: Screen) -> _Guessed:
        guess = screen.guess(candidate)
        return _Guessed(candidate, guess, self.beside + self.share * guess.peak,
                        lambda: quality(candidate, self.evidence, self.kind, screen.bits(candidate.storage)))

    def fits_some(self) -> bool:
        return any(self.budget is None or row.total <= self.budget for row in self.rows)

    def corrected(self, guess: _Guessed) -> bool:
        """Whether a guess is near the budget still, by how far the guesses at like schedules were off until now."""
        off = [row.total / total for row, total in self.compared if row.candidate.checkpointing == guess.candidate.checkpointing]
        return self.budget is None or not off or guess.total * statistics.median(off) <= SLACK * self.budget

    def look(self, guess: _Guessed, done: int, plans: int) -> int:
        """Plan a candidate; 1 if it was planned, 0 if it was refused."""
        document = self.planning_document(guess.candidate)
        try:
            load_recipe(document)
            made = self.planner(document, self.device)
            why = made.get("refused")
        except GraftworkError as error:
            why = error.message
        except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
            why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"  # one method does not end the search
        if why:
            self.refused.append(f"{describe(guess.candidate)}: {why}")
            return 0
        row = Row(guess.candidate, made, self.roofline.seconds(made["work"]), guess.quality)
        row.document = self.document(guess.candidate)
        self.rows.append(row)
        self.compared.append((row, guess.total))
        fits = "" if self.budget is None else ", fits" if row.total <= self.budget else ", does not fit"
        self.say(f"[{done + 1}/{plans}] {describe(guess.candidate)}: {format_bytes(row.total)}{fits}")
        return 1

    def result(self, looked: int, shapes: Any) -> Found:
        fitting = [row for row in self.rows if self.budget is None or row.total <= self.budget]
        best = sorted(front(fitting, lambda row: row.vector()), key=order(self.wishes))
        for row in best:
            self.give_rates(row, shapes.hidden)
        reasons(best)
        smallest = min(self.rows, key=lambda row: row.total, default=None)
        return Found(best, looked, self.rows, self.refused, smallest, self.roofline, self.budget, self.device)

    # -- documents -----------------------------------------------------------------------------------------------------
    def document(self, candidate: Candidate) -> dict[str, Any]:
        return candidate.document(self.base)

    def planning_document(self, candidate: Candidate) -> dict[str, Any]:
        """With rows of the longest length, so that the data need not be read again."""
        made = candidate.document(self.base)
        made["data"] = {**made["data"], "max_length": self.tokens}
        return made

    def give_rates(self, row: Row, hidden: int) -> None:
        """A learning rate to begin a search at: the recipe's, or the usual one of the width, times what the benchmarks found best for the
        methods over what they found for the baselines."""
        arm = row.candidate.arm
        if arm.optimizer is None:
            return

        def rate(axis: str, method: str) -> float:
            return self.evidence.rate(axis, method, (self.kind, "adapter" if arm.adapter else "full"))

        had = self.recipe.optimizer
        usual = RATES[hidden > 1024]
        if had is not None and self.recipe.adapter is not None and "lr" in had.model_fields_set:
            usual = had.lr / (rate("adapter", self.recipe.adapter.method) * rate("optimizer", had.method))
        method = FULL_SHARE if arm.adapter is None else rate("adapter", arm.adapter["method"])
        lr = usual * method * rate("optimizer", arm.optimizer["method"])
        row.document["optimizer"] = {**row.document["optimizer"], "lr": float(f"{lr:.2g}")}


class _Guessed:
    """A candidate with its guess, comparable as a row is."""

    def __init__(self, candidate: Candidate, guess: Guess, total: float, judge: Callable[[], Any]):
        self.candidate, self.seconds, self.saved, self.total = candidate, guess.seconds, guess.saved, total
        self._judge, self._quality = judge, None

    @property
    def quality(self):
        if self._quality is None:
            self._quality = self._judge()
        return self._quality

    vector = Row.vector


def describe(candidate: Candidate) -> str:
    """`nf4 + lora, adamw, 2 x 4 rows, checkpointing, bf16`."""
    names = candidate.names()
    parts = [f"{names['storage']} + {names.get('adapter', 'full tuning')}", *(names[a] for a in ("optimizer",) if a in names)]
    parts += ["fused"] * candidate.arm.fused + [names["estimator"]] * (names["estimator"] != "backprop")
    parts += [names["selection"]] if "selection" in names else []
    parts.append(f"{candidate.accumulation} x {candidate.rows} rows")
    return ", ".join([*parts, *["checkpointing"] * candidate.checkpointing, candidate.precision])


__all__ = ["Found", "advise", "describe", "planned"]
