"""Resolved recipes side by side: which options differ, and how."""

from __future__ import annotations

from typing import Any

#: where a run lives is no difference between recipes
PLACES = ("output_dir",)
ABSENT = "(not there)"


def flatten(document: Any, path: str = "") -> dict[str, Any]:
    """{dotted path: value} of a document; lists of plain values stay whole, empty mappings too."""
    if isinstance(document, dict) and document:
        items = [(str(key), value) for key, value in document.items()]
    elif isinstance(document, list) and any(isinstance(value, (dict, list)) for value in document):
        items = [(str(i), value) for i, value in enumerate(document)]
    else:
        return {path: document}
    found: dict[str, Any] = {}
    for key, value in items:
        found.update(flatten(value, f"{path}.{key}" if path else key))
    return found


def differences(documents: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row an option that is not the same in all recipes: {"option": path, run: value, ...}, in the order of the recipes."""
    flat = {name: flatten(document) for name, document in documents.items()}
    paths = dict.fromkeys(path for each in flat.values() for path in each if path not in PLACES)
    rows = []
    for path in paths:
        values = [each.get(path, ABSENT) for each in flat.values()]
        if any(value != values[0] or type(value) is not type(values[0]) for value in values):
            rows.append({"option": path, **{name: _text(value) for name, value in zip(flat, values)}})
    return rows


def _text(value: Any) -> str:
    import yaml

    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6).removesuffix("...\n").strip()
