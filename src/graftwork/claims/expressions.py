"""The little language of a claim's bar: `paca.peak <= 0.90 * lora.peak and paca.trained < lora.trained`.

Names are arms, their attributes the figures that the check measured. Numbers, + - * /, comparisons, and/or, min, max, abs
(of means), and the units KiB MiB GiB kB MB GB. Everything is evaluated (nothing is cut short), so that
every comparison can be printed with both of its sides.
"""

from __future__ import annotations

import ast
import operator
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError, nearest
from .samples import Samples, compare, finite

UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "kB": 10**3, "MB": 10**6, "GB": 10**9}
_ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
_SIGNS = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "=="}
FUNCTIONS = {"min": min, "max": max, "abs": abs}


@dataclass(frozen=True)
class Evidence:
    """One comparison: its text, both sides, the interval of their difference (None: exact numbers), whether it is met."""

    text: str
    left: float
    right: float
    interval: tuple[float, float] | None
    met: bool

    def to_json(self) -> dict[str, Any]:
        return {"text": self.text, "left": finite(self.left), "right": finite(self.right),
                "interval": self.interval and [finite(v) for v in self.interval], "met": self.met}


def parse(text: str) -> ast.expr:
    """The tree of a bar. Raises UsageError where it is none."""
    try:
        tree = ast.parse(" ".join(text.split()), mode="eval").body
    except SyntaxError as error:
        raise UsageError(f"'{text}' is no comparison: {error.msg}", remedy="for example: method.peak <= 0.9 * baseline.peak") from None
    if not isinstance(tree, ast.Compare | ast.BoolOp):
        raise UsageError(f"'{text}' compares nothing", remedy="for example: method.peak <= 0.9 * baseline.peak")
    return tree


def names_in(text: str) -> set[str]:
    """Arms that a bar speaks of."""
    return {node.value.id for node in ast.walk(parse(text)) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)}


def judge(text: str, figures: dict[str, dict[str, Any]]) -> tuple[bool, list[Evidence]]:
    """Whether the bar is met by the figures of the arms, and every comparison in it."""
    evidence: list[Evidence] = []
    return _truth(parse(text), figures, evidence), evidence


def _truth(node: ast.expr, figures: dict[str, dict[str, Any]], evidence: list[Evidence]) -> bool:
    if isinstance(node, ast.BoolOp):
        parts = [_truth(each, figures, evidence) for each in node.values]
        return all(parts) if isinstance(node.op, ast.And) else any(parts)
    if not isinstance(node, ast.Compare):
        raise UsageError(f"'{ast.unparse(node)}' is no comparison", remedy="join comparisons with and, or")
    met, left = True, node.left
    for sign, right in zip(node.ops, node.comparators):
        if type(sign) not in _SIGNS:
            raise UsageError(f"'{ast.unparse(node)}': a bar knows < <= > >= ==")
        a, b = _value(left, figures), _value(right, figures)
        yes, interval = compare(a, _SIGNS[type(sign)], b)
        text = f"{ast.unparse(left)} {_SIGNS[type(sign)]} {ast.unparse(right)}"
        evidence.append(Evidence(text, _point(a), _point(b), interval, bool(yes)))
        met, left = met and yes, right
    return met


def _point(value: Any) -> float:
    return value.point if isinstance(value, Samples) else float(value)


def _value(node: ast.expr, figures: dict[str, dict[str, Any]]) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.Name) and node.id in UNITS:
        return UNITS[node.id]
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return _figure(node.value.id, node.attr, figures)
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        return _ARITHMETIC[type(node.op)](_value(node.left, figures), _value(node.right, figures))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, figures)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS and not node.keywords:
        values = [_value(each, figures) for each in node.args]
        return FUNCTIONS[node.func.id](*[_point(v) for v in values])
    raise UsageError(f"'{ast.unparse(node)}' has no meaning in a bar", remedy="arm.figure, numbers, + - * /, min, max, abs, "
                     + ", ".join(UNITS))


def _figure(arm: str, name: str, figures: dict[str, dict[str, Any]]) -> Any:
    if arm not in figures:
        raise UsageError(f"the check has no arm '{arm}'{nearest(arm, figures)}", remedy=f"arms: {', '.join(figures)}")
    if name not in figures[arm]:
        raise UsageError(f"arm '{arm}' has no figure '{name}'{nearest(name, figures[arm])}", remedy=f"figures: {', '.join(figures[arm])}")
    return figures[arm][name]
