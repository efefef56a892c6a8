"""The page: sections of text, tables and figures in one HTML file (no script, no network; light and dark; phone width)."""

from __future__ import annotations

from html import escape
from pathlib import Path

from ..files import atomic_write_text

STYLE = """
:root{color-scheme:light dark;--line:#8884;--soft:#8881;--quiet:#57606a}
@media(prefers-color-scheme:dark){:root{--quiet:#9da7b3}html{background:#0f1318}}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;overflow-wrap:anywhere}
h1{font-size:1.5rem;line-height:1.25}h2{font-size:1.15rem;margin-top:2.2rem;border-bottom:1px solid var(--line)}h3{font-size:1rem}
nav a{display:inline-block;margin:0 .9rem .3rem 0}
.scroll{overflow-x:auto;max-height:30rem}table{border-collapse:collapse;font-size:.88rem}
th,td{padding:.3rem .6rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
th div,td div{width:max-content;max-width:18rem;white-space:pre-line}
td.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
figure{margin:1.2rem 0}figcaption{color:var(--quiet);font-size:.88rem}
svg{display:block;width:100%;height:auto}svg text{font-family:system-ui,sans-serif!important}
.narrow{display:none;max-width:26rem}
@media(max-width:700px){body{margin:1rem auto}.wide{display:none}.narrow{display:block}.sample dl{grid-template-columns:1fr}}
details{margin:.4rem 0}summary{cursor:pointer;color:var(--quiet);font-size:.88rem}
pre{background:var(--soft);padding:.8rem;overflow-x:auto;font-size:.85rem;white-space:pre-wrap}
code{background:var(--soft);padding:0 .2rem}.note{color:var(--quiet);font-size:.9rem}
.sample{border-left:3px solid var(--line);padding-left:.8rem;margin:1.1rem 0}
.sample dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(11rem,1fr));gap:.2rem 1rem;margin:0}
.sample dt{color:var(--quiet);font-size:.85rem}.sample dd{margin:0;white-space:pre-wrap;max-height:20rem;overflow-y:auto}
"""


def write_page(path: str | Path, title: str, sections: list[tuple[str, str]], *, contents: bool = False) -> Path:
    """Write the page atomically. sections: (heading, HTML). contents: with links to them."""
    ids = [f"section-{i}" for i in range(len(sections))]
    body = "".join(f'<section aria-labelledby="{key}"><h2 id="{key}">{escape(heading)}</h2>\n{html}</section>\n'
                   for key, (heading, html) in zip(ids, sections))
    links = "".join(f'<a href="#{key}">{escape(heading)}</a>' for key, (heading, _) in zip(ids, sections)) if contents else ""
    nav = f'<nav aria-label="Contents">{links}</nav>' if links else ""
    atomic_write_text(path, "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport "
                            'content="width=device-width,initial-scale=1"><meta http-equiv="Content-Security-Policy" '
                            "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\"><link rel=icon href=\"data:,\">"
                            f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
                            f"<body><main><h1>{escape(title)}</h1>{nav}\n{body}</main></body></html>\n")
    return Path(path)


def notes(lines: list[str]) -> str:
    """One line each, in small print."""
    return "".join(f'<p class="note">{escape(line)}</p>\n' for line in lines)
