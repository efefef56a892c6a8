"""Tables as HTML. Every text is escaped here."""

from __future__ import annotations

import math
from html import escape
from typing import Any


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as an HTML table in a box that scrolls by itself; numbers to the right. Columns are the keys in order of appearance."""
    if not rows:
        return "<p>nothing to show</p>"
    keys = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f"<th scope=col><div>{escape(str(key))}</div></th>" for key in keys)
    body = "".join("<tr>" + "".join(_cell(row.get(key, "")) for key in keys) + "</tr>" for row in rows)
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def shown(value: Any) -> str:
    """A value as text: numbers with four digits, whole ones in full."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if math.isfinite(value) else str(value)


def _cell(value: Any) -> str:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    text = escape(shown(value))
    return f"<td class=n>{text}</td>" if number else f"<td><div>{text}</div></td>"
