"""Who comes in. One place for all routes, before any of them reads a byte of the body.

    Host known? ─► Origin ours? ─► whose key? ─► does it have the scope that the route asks for? ─► crowded? ─► route
        421            403             401              403                                          503

`request.state.key` is then the key; None on a route that is open to nobody in particular. `state.admitted(scope)` asks
anew, for answers that take so long that the key may be revoked meanwhile. As long as there are no keys
everybody is `NOBODY`, who may do everything; Host and Origin then keep out the web pages that visitors of this machine
happen to look at, which could otherwise send requests (CSRF) or pretend to be this server (DNS rebinding).
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from functools import lru_cache, partial
from http.cookies import CookieError, SimpleCookie
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api import binding, problems, scopes
from server.errors import Forbidden, Misdirected, ServiceError, Unavailable
from server.keys.authenticator import Authenticator
from server.keys.key import NOBODY, Key
from server.settings import Settings

from . import connections

COOKIE: Final = "lensrack_session"
SAFE: Final = frozenset({"GET", "HEAD", "OPTIONS"})
TEMPLATE: Final = "template"  # in a request's state: the listed route that will probably answer


@dataclass(frozen=True)
class RefusedRoute:
    """The route that would have answered, for who counts."""

    path: str


class AuthMiddleware:
    """Middleware in front of the application's routes, which ask once more for what they need: `scopes.require`."""

    def __init__(self, app: ASGIApp, ring: Authenticator, settings: Settings) -> None:
        self.app, self._ring = app, ring
        self._named = frozenset(name.strip().lower() for name in settings.allowed_hosts.split(",") if name.strip())
        self._local = binding.is_loopback(settings.host)  # who binds such an address wants local callers only
        self._open_metrics = settings.open_metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope["state"][TEMPLATE] = scopes.template(scope["method"], scope["path"])
        try:
            await self._admit(scope)
        except ServiceError as error:
            scope["route"] = RefusedRoute(scope["state"][TEMPLATE] or "unmatched")
            await problems.answer(error, scope)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    async def _admit(self, scope: Scope) -> None:
        headers, method = Headers(scope=scope), scope["method"]
        self._require_host(headers)
        bearer, cookie = _bearer(headers), None
        if bearer is None:
            cookie = _cookie(headers)
            if method not in SAFE:
                require_origin(headers, self._named, required=cookie is not None)
        scope["state"]["open_metrics"] = self._open_metrics
        token = bearer or cookie
        scope["state"]["key"] = await self._whose(token)
        scope["state"]["admitted"] = partial(self._still_admit, token)  # and no cycle with the scope
        scopes.check(scope, scope["state"][TEMPLATE], given=bool(token))
        if connections.crowded(scope["state"], scope["state"][TEMPLATE]):
            raise Unavailable(
                "too many connections are open", code="too_many_connections", retry_after_s=connections.RETRY_S
            )

    async def _still_admit(self, token: str | None, scope: Scope) -> None:
        """Whether the one who came in would come in now, to the same tasks. Raises Unauthenticated, Forbidden."""
        before, now = scope["state"]["key"], await self._whose(token)
        same = before is not None and now is not None and before.tasks == now.tasks
        scope["state"]["key"] = now if same else None
        scopes.check(scope, scope["state"][TEMPLATE], given=bool(token))

    async def _whose(self, token: str | None) -> Key | None:
        await self._ring.refresh()
        if not self._ring.locked:
            return NOBODY
        return await self._ring.owner(token) if token else None

    def _require_host(self, headers: Headers) -> None:
        if "host" not in headers or "*" in self._named or not (self._named or self._local):
            return
        host, local = _name(headers["host"])
        if host not in self._named and not local and not self._by_address(host):
            known = " or ".join(sorted(self._named) or ["localhost"])
            raise Misdirected(f"Host: expected {known} (LENSRACK_ALLOWED_HOSTS can name others), got {host[:100]!r}")

    def _by_address(self, host: str) -> bool:
        """Probes and Prometheus call by address, and no page of a foreign name can; to loopback nobody comes so."""
        return not self._local and binding.is_address(host)


# --- Host and Origin --------------------------------------------------------------------------------------------------


def require_origin(headers: Headers, named: frozenset[str], *, required: bool) -> None:
    """What changes something must not come from another site's page. Programs send no Origin, browsers always do.

    Raises Forbidden foreign_origin.
    """
    origin = headers.get("origin")
    if origin is None:
        if not required or headers.get("sec-fetch-site") == "same-origin":
            return
        raise Forbidden("Origin: expected this server's, as the session is a cookie, got none", code="foreign_origin")
    place = origin.partition("://")[2].lower()
    if place and place in {headers.get("host", "").lower(), *named}:
        return
    raise Forbidden(f"Origin: expected this server's own pages, got {origin[:100]!r}", code="foreign_origin")


@lru_cache(maxsize=256)
def _name(host: str) -> tuple[str, bool]:
    """A Host header without its port, and whether it is a local name, which no foreign page can have."""
    bare = host.strip().lower()
    bare = bare[1:].partition("]")[0] if bare.startswith("[") else bare.partition(":")[0].rstrip(".")
    return bare, binding.is_loopback(bare)


# --- tokens -----------------------------------------------------------------------------------------------------------


def _bearer(headers: Headers) -> str | None:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return (token.strip() or None) if scheme.lower() == "bearer" else None


def _cookie(headers: Headers) -> str | None:
    """The token of a session. A page of another site does not get to use it, whatever its browser thinks."""
    sent = headers.get("cookie")
    if sent is None or headers.get("sec-fetch-site") == "cross-site":
        return None
    try:
        morsel = SimpleCookie(sent).get(COOKIE)
    except CookieError:
        return None
    return unpacked(morsel.value) if morsel else None


def packed(token: str) -> str:
    """A token as a cookie's value, where not every character is allowed."""
    return base64.urlsafe_b64encode(token.encode()).decode().rstrip("=")


def unpacked(value: str) -> str | None:
    try:
        return base64.urlsafe_b64decode(value + "=" * (-len(value) % 4)).decode() or None
    except (binascii.Error, ValueError):
        return None
