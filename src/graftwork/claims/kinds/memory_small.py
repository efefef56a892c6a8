"""Bytes of a real step on a small model, counted by PyTorch's own allocator events (planning/measure.py), not by the planner.

Figures of an arm: `peak` (bytes at the highest moment of the second step), `resting` (alive between steps), `step` (their difference),
`saved` (distinct memory that the graph keeps for the backward pass, parameters aside) and `trained`.
"""

from __future__ import annotations

from typing import Any

from ..cells import Cells
from ._real import RealOptions, real_step
from .base import Figures, merged
from .base import Kind as Base


class Kind(Base):
    options = RealOptions
    about = "bytes of a real step on a small model, by the allocator's events"

    def of_arms(self, cells: Cells) -> Figures:
        cells.expect(len(self.claim.arms))
        return {name: cells.get(f"{self.claim.name}/{name}", self.claim.to_json(), lambda arm=arm: self._measure(cells, arm))
                for name, arm in self.claim.arms.items()}

    def _measure(self, cells: Cells, arm: dict[str, Any]) -> dict[str, Any]:
        from ...planning.measure import PeakMeter

        step, batch = real_step(self.check, merged(self.claim.common, arm), cells.folder / "models")
        saved = saved_bytes(step, batch)
        with PeakMeter("cpu") as meter:
            step.run([batch], 1)
        peak = meter.peak
        return {"peak": peak.peak_bytes, "resting": peak.baseline_bytes, "step": peak.peak_bytes - peak.baseline_bytes, "saved": saved,
                "trained": sum(p.numel() for _, p in step.parameters)}


def saved_bytes(step: Any, batch: dict[str, Any]) -> int:
    """Runs the first step and counts what its graph keeps."""
    import torch

    parameters = {p.untyped_storage().data_ptr() for p in step.model.parameters()}
    seen: dict[int, int] = {}
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in parameters:
            seen[memory.data_ptr()] = max(seen.get(memory.data_ptr(), 0), memory.nbytes())
            kept.append(memory)  # so that no address is used twice while we count
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step.run([batch], 0)
    return sum(seen.values())
