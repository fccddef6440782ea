"""The dashboard: static files over the same API that all clients use.

They are read once, at the start, so that no request can name another file. The content security policy loads nothing
from other servers, runs no script but these files, and keeps users' input from becoming markup.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.errors import NotFound

router = APIRouter(include_in_schema=False)

FOLDER: Final = Path(__file__).resolve().parents[2] / "ui"
INDEX: Final = "index.html"
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


@dataclass(frozen=True)
class Page:
    body: bytes
    media_type: str
    etag: str

    @classmethod
    def read(cls, path: Path) -> Page:
        body = path.read_bytes()
        return cls(body, TYPES[path.suffix], f'"{hashlib.sha256(body).hexdigest()[:32]}"')


def pages(folder: Path) -> Iterator[tuple[str, Page]]:
    """Yield every file below `folder` with its path; other types than TYPES are left out."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in TYPES:
            yield path.relative_to(folder).as_posix(), Page.read(path)


_PAGES: Final = dict(pages(FOLDER))


@router.api_route("/", methods=["GET", "HEAD"])
async def index(request: Request) -> Response:
    return _answer(request, INDEX)


@router.api_route("/ui/{path:path}", methods=["GET", "HEAD"])
async def file(request: Request, path: str) -> Response:
    return _answer(request, path)


def _answer(request: Request, path: str) -> Response:
    if path not in _PAGES:
        raise NotFound(f"nothing is served at {request.url.path[:200]!r}")
    page = _PAGES[path]
    headers = {**HEADERS, "ETag": page.etag}
    known = {tag.strip().removeprefix("W/") for tag in request.headers.get("If-None-Match", "").split(",")}
    if page.etag in known:
        return Response(status_code=304, headers=headers)
    return Response(page.body, media_type=page.media_type, headers=headers)
