"""The dashboard's sign-in: a key is exchanged for a cookie that no script and no other site can use."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from lensrack import wire
from server.api.middleware import auth
from server.api.middleware.root_path import located
from server.errors import Unauthenticated
from server.keys.authenticator import Authenticator
from server.keys.key import NOBODY, SCOPES, Key
from server.keys.session import SESSION_S

router = APIRouter(tags=["session"])


@router.get("/session")
async def get_session(request: Request) -> wire.Session:
    """Whether this server needs a key, and what the key of this request may do."""
    authenticator: Authenticator = request.app.state.authenticator
    return _session(request.state.key, authenticator.locked)


@router.post("/session")
async def sign_in(request: Request, response: Response, credentials: wire.SignIn) -> wire.Session:
    """Exchange a key for a session cookie."""
    authenticator: Authenticator = request.app.state.authenticator
    if not authenticator.locked:
        return _session(NOBODY, False)
    signed_in = await authenticator.sign_in(credentials.key.strip(), request.client.host if request.client else "")
    if signed_in is None:
        raise Unauthenticated("expected an API key, got one that is wrong, revoked or unknown")
    key, secret = signed_in
    _set(request, response, secret, round(SESSION_S))
    return _session(key, True)


@router.delete("/session", status_code=204)
async def sign_out(request: Request) -> Response:
    """End the session, and forget its cookie."""
    authenticator: Authenticator = request.app.state.authenticator
    if secret := auth.session_secret(request.headers):
        await authenticator.sign_out(secret)
    response = Response(status_code=204)
    _set(request, response, "", 0)
    return response


def _set(request: Request, response: Response, value: str, max_age_s: int) -> None:
    encrypted = request.url.scheme == "https"
    options: dict[str, Any] = {"secure": encrypted, "httponly": True, "samesite": "strict"}
    response.set_cookie(auth.COOKIE, value, max_age=max_age_s, path=located(request, "") or "/", **options)
    response.headers["Cache-Control"] = "no-store"


def _session(key: Key | None, locked: bool) -> wire.Session:
    session_key = key if locked else None
    return wire.Session(
        keys=locked,
        key=session_key.id if session_key else None,
        name=session_key.name if session_key else "",
        scopes=[scope for scope in SCOPES if key is not None and key.may(scope)],
        tasks=session_key.tasks if session_key else "",
    )
