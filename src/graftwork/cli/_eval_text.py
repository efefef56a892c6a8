"""How `graft eval` shows its scores on a terminal."""

from __future__ import annotations

from typing import Any


def shown(value: Any) -> str:
    """A number, a list of numbers or a text, short."""
    if isinstance(value, list):
        return " ".join(shown(v) for v in value)
    return f"{value:.4f}" if isinstance(value, float) else "undefined" if value is None else str(value)


def print_scores(scores: dict[str, Any]) -> None:
    """One line a score, its interval beside it."""
    for key, value in scores.items():
        if key.endswith("_interval") and key.removesuffix("_interval") in scores:
            continue
        beside = scores.get(f"{key}_interval")
        print(f"{key:<22} {shown(value)}" + (f"   [{beside[0]:.4f}, {beside[1]:.4f}]" if beside else ""))


def print_comparison(targets: dict[str, dict[str, Any]], differences: list[dict[str, Any]]) -> None:
    """A table of the targets, then the paired differences to the first."""
    for name, scores in targets.items():
        print(f"{name}:")
        for key, value in scores.items():
            if not key.endswith("_interval"):
                beside = scores.get(f"{key}_interval")
                print(f"  {key:<22} {shown(value)}" + (f"   [{beside[0]:.4f}, {beside[1]:.4f}]" if beside else ""))
    for one in differences:
        beside = one["interval"]
        print(f"{one['a']} - {one['b']}  {one['metric']:<20} {shown(one['difference'])}"
              + (f"   [{beside[0]:.4f}, {beside[1]:.4f}] over {one['n']} rows" if beside else f"   over {one['n']} rows"))


def print_wrong(rows: list[dict[str, Any]]) -> None:
    """The first row with a wrong answer, or the one whose number is farthest off."""
    errors = [row for row in rows if row.get("squared_error") is not None]
    if errors:
        far = max(errors, key=lambda row: row["squared_error"])
        print(f"the worst row: {far['source']}\n  gave   {far['prediction']:.4g}\n  wanted {far['label']:.4g}")
    wrong = next((row for row in rows if row.get("correct") is False), None)
    if wrong:
        print(f"a wrong row: {wrong['source']}\n  wrote  {wrong['prediction']!r}\n  wanted {(wrong['references'] or [''])[0]!r}")


def by_member(rows: list[dict], routes) -> dict[str, dict]:
    """{adapter: {score, n}} of a fleet: exact match, or the mean squared error of rows with real labels."""
    members: dict[str, dict[str, list[float]]] = {}
    for row in rows if routes else []:
        for field, score in (("correct", "exact_match"), ("squared_error", "mse")):
            if row.get(field) is not None:
                members.setdefault(row["adapter"] or "base", {}).setdefault(score, []).append(row[field])
    return {name: {**{score: sum(values) / len(values) for score, values in own.items()}, "n": len(next(iter(own.values())))}
            for name, own in sorted(members.items())}
