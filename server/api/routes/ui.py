"""The dashboard and the API's documentation: static files over the same API that all clients use.

They are read once, at the start, so that no request can name another file. The content security policy loads nothing
from other servers, runs no script but these files, and keeps users' input from becoming markup.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.errors import NotFound

router = APIRouter(include_in_schema=False)

FOLDER: Final = Path(__file__).resolve().parents[2] / "ui"
INDEX: Final = "index.html"
DOCS: Final = "docs.html"
TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
# `blob:` are pictures that the visitor has chosen and that have not left the browser
POLICY: Final = "; ".join(
    (
        "default-src 'self'",
        "img-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'none'",
        "form-action 'self'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)
HEADERS: Final = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # cached, and revalidated by ETag: an upgrade is seen at once
}


# Swagger UI draws its icons from `data:` URLs
DOCS_HEADERS: Final = {**HEADERS, "Content-Security-Policy": POLICY.replace("blob:", "data:")}


@dataclass(frozen=True)
class Page:
    body: bytes
    media_type: str
    etag: str

    @classmethod
    def of(cls, body: bytes, media_type: str) -> Page:
        return cls(body, media_type, f'"{hashlib.sha256(body).hexdigest()[:32]}"')


def pages(folder: Path) -> Iterator[tuple[str, Page]]:
    """Yield every file below `folder` with its path; other types than TYPES are left out."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in TYPES:
            yield path.relative_to(folder).as_posix(), Page.of(path.read_bytes(), TYPES[path.suffix])


_PAGES: Final = dict(pages(FOLDER))


@router.get("/")
async def index(request: Request) -> Response:
    return _answer(request, _linked(INDEX, request.app.state.root_path))


@router.get("/docs")
async def docs(request: Request) -> Response:
    """Swagger UI over this server's own /openapi.json."""
    return _answer(request, _linked(DOCS, request.app.state.root_path), DOCS_HEADERS)


@router.get("/ui/{path:path}")
async def file(request: Request, path: str) -> Response:
    if path not in _PAGES:
        raise NotFound(f"nothing is served at {request.url.path[:200]!r}")
    return _answer(request, _PAGES[path])


@lru_cache
def _linked(path: str, root: str) -> Page:
    """A page whose relative links are absolute: a proxy may serve it under an address without the last slash."""
    body = (
        _PAGES[path]
        .body.replace(b'="ui/', f'="{root}/ui/'.encode())
        .replace(b'href="docs"', f'href="{root}/docs"'.encode())
    )
    return Page.of(body, _PAGES[path].media_type)


def _answer(request: Request, page: Page, headers: Mapping[str, str] = HEADERS) -> Response:
    headers = {**headers, "ETag": page.etag}
    known = {tag.strip().removeprefix("W/") for tag in request.headers.get("If-None-Match", "").split(",")}
    if page.etag in known:
        return Response(status_code=304, headers=headers)
    return Response(page.body, media_type=page.media_type, headers=headers)
