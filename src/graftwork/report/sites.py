"""Numbers by site and step (`sites` in metrics.jsonl) as lines and columns of a map."""

from __future__ import annotations

import re
from typing import Any

from .spectra import role_of

#: lines of a map; of more sites the mean of each layer is shown
LINES = 48
LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.")


def over_steps(steps: dict[int, dict[str, float]]) -> tuple[list[str], list[int], list[list[float | None]], str]:
    """(lines, steps, values, note). A site that is gone at a step has no value there."""
    columns = sorted(steps)
    names = list(dict.fromkeys(name for step in columns for name in steps[step]))
    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(layer_of(name), []).append(name)
    if len(names) <= LINES or len(layers) < 2:
        return names, columns, [[steps[s].get(name) for s in columns] for name in names], ""
    values = [[mean([steps[s][name] for name in own if name in steps[s]]) for s in columns] for own in layers.values()]
    return list(layers), columns, values, f"The mean of each layer's sites ({len(names)} sites)."


def short_names(names: list[str]) -> list[str]:
    """`3 q_proj` for a site of layer 3, where that tells the sites apart; else the names as they are."""
    found = [f"{match[1]} {role_of(name)}" if (match := LAYER.search(name)) else name for name in names]
    return found if len(set(found)) == len(names) else names


def layer_of(name: str) -> str:
    found = LAYER.search(name)
    return f"layer {found[1]}" if found else name


def final_grid(steps: dict[int, dict[str, float]]) -> tuple[list[str], list[str], list[list[float | None]]] | None:
    """(layers, kinds of map, values) at the last step; None where the names are not of sites in layers."""
    last = steps[max(steps)]
    cells: dict[tuple[str, str], list[float]] = {}
    for name, value in last.items():
        if LAYER.search(name):
            cells.setdefault((layer_of(name), role_of(name)), []).append(value)
    lines, roles = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    if not cells or len(roles) < 2:
        return None
    return lines, roles, [[mean(cells.get((line, role), [])) for role in roles] for line in lines]


def mean(values: list[float]) -> Any:
    return sum(values) / len(values) if values else None
