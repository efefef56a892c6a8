"""Memory at the published configuration: each arm's own training step, simulated operation by operation on fake tensors.

Figures of an arm, in bytes: `peak` (all tensors at the highest moment of the step), `device` (with the planner's allocator, reserve and
context on CUDA), the categories at the peak (weights, adapters, gradients, optimizer_state, activations, logits, other), `beside` (peak
without weights), and `trained` (parameters). An arm with

    largest: {of: data.max_length, within: 80 GiB, step: 256}

is planned at several values of that key; `largest` is the greatest multiple of the step whose `device` bytes are within. Nothing is
taken from a formula: an arm that cannot be simulated has no figure.
"""

from __future__ import annotations

import gc
from typing import Any

from ..cells import Cells, digest
from .base import Figures, Options, merged
from .base import Kind as Base

#: one device, one micro-batch of one sequence, unless the claim says otherwise
STEP = {"train": {"batch_size": 1, "max_steps": 100}, "data": {"train": "from-the-shape.jsonl", "max_length": 512}}


class MemoryOptions(Options):
    """tries: plans by the line, before the middle is taken."""

    tries: int = 8


class Kind(Base):
    full_scale = True
    options = MemoryOptions
    about = "the planner runs the arm's own step on fake tensors of the true config; bytes at the peak"

    def of_arms(self, cells: Cells) -> Figures:
        cells.expect(len(self.claim.arms))
        return {name: self._arm(cells, name, arm) for name, arm in self.claim.arms.items()}

    def _arm(self, cells: Cells, name: str, arm: dict[str, Any]) -> dict[str, Any]:
        sections = {k: v for k, v in arm.items() if k != "largest"}
        recipe = merged(STEP, self.claim.common, sections)
        if "largest" not in arm:
            return planned(cells, recipe, name)
        return self._largest(cells, name, recipe, arm["largest"])

    def _largest(self, cells: Cells, name: str, recipe: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
        """The greatest value that fits. Bytes rise nearly as a line, so the line through the two nearest plans says where to look next;
        where it creeps, the middle of what is left."""
        from ...planning.measure import parse_bytes

        within, step = parse_bytes(wanted["within"]), int(wanted["step"])
        known: dict[int, dict[str, Any]] = {}

        def fits(value: int) -> bool:
            if known:
                cells.expect(1)
            known[value] = planned(cells, with_value(recipe, wanted["of"], value), f"{name} at {value}")
            return known[value]["device"] <= within

        if not fits(step):
            return {**known[step], "largest": 0}
        low, high, guess = step, None, 2 * step
        while high is None or high > low + step:
            if fits(guess):
                low = guess
            else:
                high = guess
            near = min((v for v in known if v != low), key=lambda v: abs(v - low))
            slope = (known[near]["device"] - known[low]["device"]) / (near - low)
            guess = int((low + (within - known[low]["device"]) / slope) // step * step) if slope > 0 else 2 * low
            # Where activations are not at the peak yet bytes hardly rise, and the line leads anywhere.
            if high is None and abs(known[near]["device"] - known[low]["device"]) < 2e-3 * known[low]["device"]:
                guess = 4 * low
            if high is not None and (guess >= high or len(known) > self.check.tries):
                guess = (low + high) // 2 // step * step
            guess = max(low + step, guess if high is None else min(guess, high - step))
        return {**known[low], "largest": low}


def with_value(recipe: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """The recipe with one dotted key set."""
    section, _, key = path.partition(".")
    return merged(recipe, {section: {key: value}})


def planned(cells: Cells, recipe: dict[str, Any], label: str) -> dict[str, Any]:
    """Figures of one recipe. The same plan is kept once for all claims."""
    return cells.get(f"plans/{digest(recipe)}", recipe, lambda: simulate(recipe), label)


def simulate(recipe: dict[str, Any]) -> dict[str, Any]:
    from ...planning.simulate import plan
    from ...recipe import load_recipe

    made = plan(load_recipe(recipe), use_data=False, device="cuda", estimate_time=False)
    gc.collect()
    return {"peak": made.peak_bytes, "device": made.device["total_bytes"], **made.categories,
            "beside": made.peak_bytes - made.categories["weights"], "trained": made.trained}
