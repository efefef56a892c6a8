"""Writes docs/methods/AXIS.md from the registry: one page an axis, one section a method. Run: make docs."""

from __future__ import annotations

import importlib
from pathlib import Path

from graftwork.registry import AXES, methods

HERE = Path(__file__).parent / "methods"
INTRO = {
    "storage": "How the frozen weight of a site is kept and multiplied.",
    "calibration": "Which codes a weight gets in a format of groups: `storage: {method: int4, calibration: gptq}`.",
    "adapter": "The learned change of a site. Composes with every storage unless a trait below says otherwise.",
    "initializer": "Where an adapter starts.",
    "optimizer": "Gradient to update, and with what state.",
    "estimator": "Where gradients come from.",
    "selection": "What trains when.",
    "objective": "Batch to loss.",
}


def page(axis: str) -> str:
    """The Markdown of one axis."""
    known = methods(axis)
    lines = [f"# {axis.capitalize()} methods", "", INTRO[axis], "", "Generated from the registry by `make docs`; do not edit.", "",
             "| name | what it is | paper | traits |", "|---|---|---|---|"]
    for m in known:
        traits = ", ".join(f"{k}: {v}" for k, v in m.traits.items() if v not in (None, False, ""))
        paper = f"[{m.paper}](https://arxiv.org/abs/{m.paper})" if m.paper else ""
        lines.append(f"| [`{m.name}`](#{m.name}) | {m.summary} | {paper} | {traits} |")
    for m in known:
        module = importlib.import_module(m.cls.__module__)
        lines += ["", f"## {m.name}", "", f"{m.title}." + (f" Also called: {', '.join(m.aliases)}." if m.aliases else ""), "",
                  "```text", (module.__doc__ or "").strip(), "```", "", "| option | default | meaning |", "|---|---|---|"]
        for key, field in m.config.model_fields.items():
            default = field.get_default(call_default_factory=True)
            lines.append(f"| `{key}` | `{default!r}` | {field.description or ''} |")
        lines += ["", f"Source: `src/{m.cls.__module__.replace('.', '/')}.py`"]
        if m.bibtex:
            lines += ["", "```bibtex", m.bibtex, "```"]
    return "\n".join(lines) + "\n"


def main() -> None:
    HERE.mkdir(exist_ok=True)
    for axis in AXES:
        (HERE / f"{axis}.md").write_text(page(axis), encoding="utf-8")


if __name__ == "__main__":
    main()
