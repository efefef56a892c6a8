"""Counts: what a method trains and stores, from the built model of the published config (fake tensors, no weights).

Figures of an arm (recipe sections): `trained` parameters, `base` parameters, `sites` with an adapter, `file` (bytes of the tensors that
its artifact holds), `share` (trained / base), `state` (bytes of the optimizer's state, where the arm names an optimizer), `bits` (stored
bits a weight of the linear maps), and `linears` (weights of these).
"""

from __future__ import annotations

from typing import Any

from ..cells import Cells, digest
from .base import Figures, merged
from .base import Kind as Base

STEP = {"train": {"max_steps": 100}, "data": {"train": "from-the-shape.jsonl", "max_length": 8}}


class Kind(Base):
    full_scale = True
    about = "trained and stored numbers of the built model against the published ones"

    def of_arms(self, cells: Cells) -> Figures:
        cells.expect(len(self.claim.arms))
        found = {}
        for name, arm in self.claim.arms.items():
            recipe = merged(STEP, self.claim.common, arm)
            found[name] = cells.get(f"counts/{digest(recipe)}", recipe, lambda recipe=recipe: count(recipe), name)
        return found


def count(document: dict[str, Any]) -> dict[str, Any]:
    """All figures of one arm."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from ...recipe import load_recipe
    from ...training.build import build_grafts, build_model, task_of, trained_parameters

    recipe = load_recipe(document).model_copy(update={"initializer": None})  # a start reads data, and changes no count
    labels = 2 if task_of(recipe, 2) == "classification" else None
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, _ = build_model(recipe, num_labels=labels, fake=True)
        linears, stored, codes = stored_linears(model)
        base = sum(p.numel() for p in model.parameters() if id(p) not in codes) + linears
        grafts = build_grafts(recipe, model)
        trained = trained_parameters(model, grafts)
        numbers = sum(p.numel() for _, p in trained)
        found = {"trained": numbers, "base": base, "sites": sum(len(g.adapters) for g in grafts), "share": numbers / base,
                 "file": sum(file_bytes(g) for g in grafts), "linears": linears, "bits": 8 * stored / max(1, linears)}
        if "optimizer" in document:
            found["state"] = state_bytes(recipe, trained, model)
    return found


def stored_linears(model: Any) -> tuple[int, int, set[int]]:
    """(weights of the linear maps of the blocks, bytes that their storage keeps, the tensors that do). A fused map is one module with
    several sites."""
    from ...modeling.sites import find_sites

    weights, modules = 0, {}
    for site in find_sites(model, "all-linear"):
        weights += site.in_features * site.out_features
        modules[id(site.module)] = site.module
    tensors = [t for m in modules.values() for t in (*m.parameters(), *m.buffers()) if t is not getattr(m, "bias", None)]
    return weights, sum(t.numel() * t.element_size() for t in tensors), {id(t) for t in tensors}


def file_bytes(graft: Any) -> int:
    """Bytes of the tensors in a graft's artifact."""
    return sum(tensor.numel() * tensor.element_size() for tensor in saved_tensors(graft))


def saved_tensors(graft: Any) -> list[Any]:
    found = []
    for _, module in graft.named_modules():
        state = module.artifact_state() if hasattr(module, "artifact_state") else dict(module.state_dict())
        found += list(state.values())
    return found


def state_bytes(recipe: Any, trained: list[tuple[str, Any]], model: Any) -> int:
    """Bytes of optimizer state after a first update of every trained tensor."""
    import torch

    from ...training.build import build_optimizer

    optimizer = build_optimizer(recipe, model, [])
    for _, parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    return sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor))
