"""The page at `/`: files of the folder `page`, read once and served from memory, so that no path of a client ever meets the disk."""

from __future__ import annotations

import hashlib
from importlib.resources import files

from fastapi import FastAPI, Request
from starlette.responses import Response

from .errors import ApiError

TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
#: nothing but the server's own files: no inline code, no frames, no other hosts
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
                               "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff", "x-frame-options": "DENY", "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin", "cross-origin-resource-policy": "same-origin", "cache-control": "no-cache",
}
INDEX = "index.html"


def read_assets() -> dict[str, tuple[bytes, str]]:
    """{file name: (content, media type)}"""
    found = {}
    for file in (files(__package__) / "page").iterdir():
        kind = TYPES.get("." + file.name.rpartition(".")[2])
        if kind is not None:
            found[file.name] = file.read_bytes(), kind
    return found


def add_page(app: FastAPI) -> None:
    """Routes `/` and `/page/{file}`; they need no key, as the page holds nothing that is not in the package."""
    assets = read_assets()
    tags = {name: f'"{hashlib.sha256(content).hexdigest()[:32]}"' for name, (content, _) in assets.items()}

    def serve(request: Request, name: str) -> Response:
        if name not in assets:
            raise ApiError(404, "the page has no such file")
        content, kind = assets[name]
        headers = {**HEADERS, "etag": tags[name]}
        if request.headers.get("if-none-match") == tags[name]:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=kind, headers=headers)

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def index(request: Request) -> Response:
        return serve(request, INDEX)

    @app.api_route("/page/{name}", methods=["GET", "HEAD"], include_in_schema=False)
    async def asset(name: str, request: Request) -> Response:
        return serve(request, name)
