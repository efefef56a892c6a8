"""`graft methods`: what is registered, and one method in detail."""

from __future__ import annotations

import json

import typer

EPILOG = "Examples: graft methods --axis adapter | graft methods lora | graft methods --json"


def run(
    name: str = typer.Argument(None, help="Show one method: equations, options, cost, paper, BibTeX."),
    axis: str = typer.Option(None, "--axis", help="storage, adapter, initializer, optimizer, estimator, selection or objective."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """List the methods of every axis, or show one."""
    from ..errors import UsageError, nearest
    from ..registry import methods

    known = methods(axis)
    if name is None:
        if as_json:
            print(json.dumps([m.to_json() for m in known], indent=1))
            return
        width = max(len(m.name) for m in known)
        last = None
        for method in known:
            if method.axis != last:
                print(f"{'' if last is None else chr(10)}{method.axis}")
                last = method.axis
            print(f"  {method.name:<{width}}  {method.summary}" + (f"  [arXiv {method.paper}]" if method.paper else ""))
        return
    found = [m for m in known if m.name == name or name in m.aliases]
    if not found:
        names = [n for m in known for n in (m.name, *m.aliases)]
        raise UsageError(f"there is no method '{name}'{nearest(name, names)}", remedy="graft methods lists them")
    if as_json:
        print(json.dumps([{**m.to_json(), "equations": _doc(m), "cost": cost(m), "bibtex": m.bibtex} for m in found], indent=1))
        return
    for method in found:
        print(f"{method.axis} '{method.name}': {method.title}" + (f" (arXiv {method.paper})" if method.paper else ""))
        if method.aliases:
            print(f"also called: {', '.join(method.aliases)}")
        print(f"\n{_doc(method)}\n\noptions:")
        for key, field in method.config.model_fields.items():
            default = field.get_default(call_default_factory=True)
            print(f"  {key} = {default!r}" + (f"   {field.description}" if field.description else ""))
        print("\ncost: " + "; ".join(f"{what}: {amount}" for what, amount in cost(method).items()))
        print("traits: " + ", ".join(f"{k}={v}" for k, v in method.traits.items()))
        if method.bibtex:
            print(f"\n{method.bibtex}")


def cost(method) -> dict[str, str]:
    """What a method costs, computed by its own code where that is a number of a matrix of 4096 x 4096 at default options."""
    import torch

    size, traits = 4096, method.traits
    where = f"for one matrix {size} x {size}"
    if method.axis == "storage":
        with torch.device("meta"):
            stored = method.cls.from_weight(torch.empty(size, size, dtype=torch.bfloat16), method.config()) if (
                method.name != "dense") else None
        return {"bits a weight": "those of the compute dtype" if stored is None else f"{stored.bits_per_weight:.4g}"}
    if method.axis == "optimizer":
        kept = method.cls.state_bytes((size, size), torch.float32, config=method.config())
        return {f"state bytes {where}": f"{kept:,} ({kept / (8 * size * size):.2%} of Adam's)"}
    if method.axis == "adapter":
        site = type("Square", (), {"in_features": size, "out_features": size, "name": "square"})()
        if traits.get("scope") == "block":
            site.maps, where = dict.fromkeys(("gate", "up", "down"), site), f"for one feed-forward net of three matrices {size} x {size}"
        elif traits.get("scope") != "site":
            return {"parameters": "set by its options, not by the matrices"}
        return {f"parameters {where}": f"{method.cls.parameter_count(site, method.config()):,}"}
    told = {"initializer": {"before training": f"one pass over the {traits.get('needs') or 'weights'}"},
            "estimator": {"backward pass": "yes" if traits["gradients"] and traits["differentiates"] else "none: forward passes only"},
            "selection": {"reads gradients": "yes" if traits.get("reads_gradients") else "no"},
            "objective": {"logits alive": "a chunk" if "chunk_tokens" in method.config.model_fields else "one row of classes"}}
    return told.get(method.axis, {})


def _doc(method) -> str:
    import importlib

    return (importlib.import_module(method.cls.__module__).__doc__ or "").strip()
