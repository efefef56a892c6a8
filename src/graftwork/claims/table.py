"""Results of claims as text and as a Markdown table: verdict, both sides of every bar, interval, seeds."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .claim import claims
from .kinds import kind_of

_UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"))
_BYTES = ("peak", "device", "weights", "adapters", "gradients", "optimizer_state", "activations", "logits", "other", "beside", "file",
          "state", "saved", "resting", "step", "bytes")
_TITLES = {"memory_true_scale": "memory at true scale", "memory_small": "memory of real steps", "quality_scaled": "quality, scaled down",
           "speed_ratio": "speed", "parameter_count": "counts", "exactness": "identities", "serving": "serving", "absent": "absent"}


def results(folder: Path) -> list[dict[str, Any]]:
    """All results in a folder, one a claim: the full one where there is one. Raises UsageError where there are none."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(Path(folder).glob("*.json"), key=lambda p: p.name.endswith(".quick.json")):
        try:
            made = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(made, dict) and {"claim", "verdict", "evidence"} <= set(made):
            found.setdefault(made["claim"], made)
    if not found:
        raise UsageError(f"{folder} holds no results of claims", remedy="graft claims run --first15 -o FOLDER")
    return list(found.values())


def number(value: float | None, text: str) -> str:
    """A figure as people write it. text: the side of the bar, which tells bytes from counts."""
    if value is None or not math.isfinite(value):
        return "no number"
    figures = [word.rpartition(".")[2] for word in text.replace("(", " ").replace(")", " ").split() if "." in word]
    if "GiB" in text or "GB" in text.split() or (figures and all(f in _BYTES or f.isdigit() for f in figures) and "/" not in text):
        for size, unit in _UNITS:
            if abs(value) >= size:
                return f"{value / size:,.2f} {unit}"
        return f"{value:,.0f} B"
    return f"{value:,.0f}" if value == int(value) and abs(value) >= 1000 else f"{value:.4g}"


_NAME = re.compile(r"\b([A-Za-z_]\w*)\.([A-Za-z_]\w*)")


def evidence_line(each: dict[str, Any], figures: dict[str, Any] | None = None) -> str:
    """`paca.peak <= 0.9 * lora.peak` met: paca.peak 19.60 GiB, lora.peak 22.40 GiB (19.60 GiB against 20.16 GiB)."""
    sides = f"{number(each['left'], each['text'])} against {number(each['right'], each['text'])}"
    own = [f"{arm}.{name} {number(_value(figures[arm][name]), f'{arm}.{name}')}"
           for arm, name in dict.fromkeys(_NAME.findall(each["text"])) if name in (figures or {}).get(arm, {})]
    low, high = each["interval"] or (None, None)
    interval = f", difference [{low:+.4g}, {high:+.4g}]" if low is not None and high is not None else ""
    plain = re.fullmatch(r"[\w.]+ [<>=]+ [\w.]+", each["text"])
    return f"`{each['text']}` {_outcome(each)}: " + (
        sides if plain or not own else f"{', '.join(own)} ({sides})") + interval


def _outcome(each: dict[str, Any]) -> str:
    """A bar of "no worse than" is met while its interval allows it; where the mean alone would miss it, that is said."""
    sign, left, right = re.search(r" ([<>])= ", each["text"]), each["left"], each["right"]
    if each["met"] and sign and each["interval"] and None not in (left, right) and (left > right if sign[1] == "<" else left < right):
        return "met by its interval, not by its mean"
    return "met" if each["met"] else "not met"


def _value(figure: Any) -> float:
    return figure.get("mean", figure.get("median")) if isinstance(figure, dict) else figure


def verdict_of(made: dict[str, Any]) -> str:
    """The verdict with what belongs to it: of a portable part, of a quick run, of a bar that was missed but not refuted."""
    portable = f"; portable part: {made['portable']}" if made.get("portable") else ""
    missed = f"; missed, not refuted ({made['refuted_by']})" if made.get("refuted") is False else ""
    return made["verdict"] + portable + missed + (" (quick)" if made["quick"] else "")


def describe(made: dict[str, Any]) -> str:
    """One result as text."""
    lines = [f"{made['claim']}: {verdict_of(made)}", f"  {made['system']}: {made['statement']} ({made['source']})",
             f"  here: {made['setting']}"]
    if made["evidence"]:
        lines += [f"  {evidence_line(e, made['figures'])}" for e in made["evidence"]]
        lines.append(f"  baseline {made['baseline'] or 'in the same function'}; {_spread(made)}{_ends(made)}; {made['seconds']} s")
    return "\n".join(lines)


def _spread(made: dict[str, Any]) -> str:
    rows = f", {made['n']} rows" if made["n"] > 1 else ""
    return f"{made['seeds']} seed{'s' if made['seeds'] != 1 else ''}{rows}" if made["seeds"] > 1 or rows else "exact, no seeds"


def _ends(made: dict[str, Any]) -> str:
    """The arms that were best at the lowest or the highest rate that they tried, in every task: beyond it they may be better."""
    claim = claims().get(made["claim"])
    if claim is None or made["quick"] or made["kind"] != "quality_scaled":
        return ""
    tried = {arm: own.get("rates", kind_of(claim.kind)(claim, False).check.rates) for arm, own in claim.arms.items()}
    found = [arm for arm, rates in tried.items() if min(rates) < max(rates)
             and made["figures"].get(arm, {}).get("rate") in (min(rates), max(rates))]
    return f"; best at an end of the rates tried: {', '.join(found)}" if found else ""


def page(found: list[dict[str, Any]], command: str) -> str:
    """The Markdown of all results."""
    counts: dict[str, int] = {}
    for made in found:
        word = made["verdict"].split(" (")[0]
        counts[word] = counts.get(word, 0) + 1
    lines = ["# Claims, checked", "", "What the verdicts mean, and how a claim is added: [claims.md](claims.md).", "",
             f"Written by `{command}` from {len(found)} results: "
             + ", ".join(f"{n} x `{word}`" for word, n in sorted(counts.items(), key=lambda item: -item[1])) + ".", ""]
    for kind in dict.fromkeys(_TITLES):
        own = [made for made in found if made["kind"] == kind]
        if own:
            lines += [f"## {_TITLES[kind].capitalize()}", "", "| claim | as published | here | verdict | figures | spread |",
                      "|---|---|---|---|---|---|"]
            lines += [_row(made) for made in sorted(own, key=lambda m: (m["first"] or 99, m["group"], m["claim"]))] + [""]
    return "\n".join(lines)


def _row(made: dict[str, Any]) -> str:
    figures = "<br>".join(evidence_line(e, made["figures"]) for e in made["evidence"]) or "-"
    cells = [f"`{made['claim']}`", f"{made['system']}: {made['statement']} ({made['source']})", made["setting"],
             f"**{verdict_of(made)}**", figures, _spread(made) + _ends(made) if made["evidence"] else "-"]
    return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"
