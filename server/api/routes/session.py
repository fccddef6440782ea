"""The dashboard's sign-in: a key is given once and travels on as a cookie that no script and no other site can use."""

from __future__ import annotations

from typing import Final

from fastapi import APIRouter, Request
from starlette.responses import Response

from lensrack import wire
from server.api.middleware import auth
from server.errors import Unauthenticated
from server.keys.authenticator import Authenticator
from server.keys.key import NOBODY, SCOPES, Key

router = APIRouter(tags=["session"])

LASTS_S: Final = 12 * 3600


@router.get("/session")
async def who(request: Request) -> wire.Session:
    """Whether a key is needed here, and what the one that came with this request may do."""
    ring: Authenticator = request.app.state.ring
    return _told(request.state.key, ring.locked)


@router.post("/session")
async def sign_in(request: Request, response: Response, asked: wire.SignIn) -> wire.Session:
    """Exchange a key for a session cookie."""
    ring: Authenticator = request.app.state.ring
    if not ring.locked:
        return _told(NOBODY, False)
    key = await ring.owner(asked.key.strip())
    if key is None:
        raise Unauthenticated("expected an API key, got one that is wrong, revoked or unknown")
    _set(request, response, auth.packed(asked.key.strip()), LASTS_S)
    return _told(key, True)


@router.delete("/session", status_code=204)
async def sign_out(request: Request) -> Response:
    """Forget the session cookie."""
    response = Response(status_code=204)
    _set(request, response, "", 0)
    return response


def _set(request: Request, response: Response, value: str, lasts_s: int) -> None:
    encrypted = "https" in (request.url.scheme, request.headers.get("x-forwarded-proto", ""))
    response.set_cookie(auth.COOKIE, value, max_age=lasts_s, secure=encrypted, httponly=True, samesite="strict")
    response.headers["Cache-Control"] = "no-store"


def _told(key: Key | None, locked: bool) -> wire.Session:
    known = key if locked else None
    return wire.Session(
        keys=locked,
        key=known.id if known else None,
        name=known.name if known else "",
        scopes=[scope for scope in SCOPES if key is not None and key.may(scope)],
        tasks=known.tasks if known else "",
    )
