"""The page at ``/``: files of this package, with headers that let no script run but the page's own.

Owns which files are served, and how. They are named one by one: no path of a request ever becomes a path of a file.
"""

from __future__ import annotations

import hashlib
import json
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ggufmoe.options.limits import MAX_EXPERTS
from ggufmoe.routing.palette import expert_colour

_SCRIPT, _STYLE = "text/javascript; charset=utf-8", "text/css; charset=utf-8"
_MODULES = ("app", "api", "store", "tree", "markdown", "messages", "routing", "experts", "placement")
_SOURCES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page/style.css": ("style.css", _STYLE),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
    "/page/marked.js": ("vendor/marked.esm.js", _SCRIPT),
    "/page/marked.LICENSE": ("vendor/marked.LICENSE", "text/plain; charset=utf-8"),
    **{f"/page/{name}.js": (f"{name}.js", _SCRIPT) for name in _MODULES},
}
_PALETTE = "/page/palette.js"
PAGE_PATHS = frozenset({*_SOURCES, _PALETTE})
"""Paths that are served without a key: they hold nothing but what is in the package."""
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def page_routes() -> list[Route]:
    """A route for each file of the page; reads the files."""
    folder = files("ggufmoe.server") / "page"
    found = [(path, (folder / name).read_bytes(), media_type) for path, (name, media_type) in _SOURCES.items()]
    return [
        _route(path, content, media_type) for path, content, media_type in [*found, (_PALETTE, _palette(), _SCRIPT)]
    ]


def _palette() -> bytes:
    """The colours of experts for the page's scripts: red, green and blue of each."""
    colours = [expert_colour(expert) for expert in range(MAX_EXPERTS)]
    return f"export const colours = {json.dumps(colours, separators=(',', ':'))};\n".encode()


def _route(path: str, content: bytes, media_type: str) -> Route:
    tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    headers = {**_HEADERS, "ETag": tag}

    async def serve(request: Request) -> Response:
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=media_type, headers=headers)

    return Route(path, serve)
