"""Authentication and authorisation of every request, before a byte of its body is read.

    Host known? ─► Origin ours? ─► a valid key? ─► with the scope that the route needs? ─► connections left? ─► route
        421            403             401              403                                    503

`request.state.key` is then the key; None on an open route without one. `state.reauthorize(scope)` checks again, for
responses that last so long that the key may be revoked meanwhile. While there are no keys, every request has the key
`NOBODY`, which may do everything; Host and Origin then keep out web pages open in a browser on this machine, which
could otherwise send requests (CSRF) or pretend to be this server (DNS rebinding).
"""

from __future__ import annotations

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
TEMPLATE: Final = "template"  # in a request's state: the listed route that its path looks like, see `scopes.match`
TASK: Final = "task"  # and the task that the path names


@dataclass(frozen=True)
class RefusedRoute:
    """The route that would have answered, for the request log and its metrics."""

    path: str


class AuthMiddleware:
    """Checks a request by the route that its path looks like, so that nothing is read of one that will be refused.

    The route that really answers is checked by its own dependency, `scopes.require`.
    """

    def __init__(self, app: ASGIApp, authenticator: Authenticator, settings: Settings) -> None:
        self.app, self._authenticator = app, authenticator
        self._allowed_hosts = frozenset(
            name.strip().lower() for name in settings.allowed_hosts.split(",") if name.strip()
        )
        self._local = binding.is_loopback(settings.host)  # a server on such an address is for local callers only
        self._open_metrics = settings.open_metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope["state"][TEMPLATE], scope["state"][TASK] = scopes.match(scope["method"], scope["path"])
        try:
            await self._authorize(scope)
        except ServiceError as error:
            scope["route"] = RefusedRoute(scope["state"][TEMPLATE] or "unmatched")
            await problems.answer(error, scope)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    async def _authorize(self, scope: Scope) -> None:
        headers, method = Headers(scope=scope), scope["method"]
        self._require_host(headers)
        bearer, session = _bearer(headers), None
        if bearer is None:
            session = session_secret(headers)
            if method not in SAFE:
                require_origin(headers, scope["scheme"], self._allowed_hosts, required=session is not None)
        scope["state"]["open_metrics"] = self._open_metrics
        scope["state"]["key"] = await self._key_of(bearer, session, scope)
        scope["state"]["reauthorize"] = partial(self._reauthorize, bearer, session)  # without the scope: no cycle
        scopes.check(scope, scope["state"][TEMPLATE], token_sent=bool(bearer or session))
        if connections.crowded(scope["state"], scope["state"][TEMPLATE]):
            raise Unavailable(
                "too many connections are open", code="too_many_connections", retry_after_s=connections.RETRY_S
            )

    async def _reauthorize(self, bearer: str | None, session: str | None, scope: Scope) -> None:
        """Check that the token still allows the request, to the same tasks. Raises Unauthenticated, Forbidden."""
        before, now = scope["state"]["key"], await self._key_of(bearer, session, scope)
        same = before is not None and now is not None and before.tasks == now.tasks
        scope["state"]["key"] = now if same else None
        scopes.check(scope, scope["state"][TEMPLATE], token_sent=bool(bearer or session))

    async def _key_of(self, bearer: str | None, session: str | None, scope: Scope) -> Key | None:
        await self._authenticator.refresh()
        if not self._authenticator.locked:
            return NOBODY
        if bearer is None:
            return await self._authenticator.session_owner(session) if session else None
        return await self._authenticator.owner(bearer, scope["client"][0] if scope.get("client") else "")

    def _require_host(self, headers: Headers) -> None:
        if "host" not in headers or "*" in self._allowed_hosts or not (self._allowed_hosts or self._local):
            return
        host, local = _name(headers["host"])
        if host not in self._allowed_hosts and not local and not self._is_address(host):
            known = " or ".join(sorted(self._allowed_hosts) or ["localhost"])
            raise Misdirected(f"Host: expected {known} (LENSRACK_ALLOWED_HOSTS can name others), got {host[:100]!r}")

    def _is_address(self, host: str) -> bool:
        """Probes and Prometheus call by address, as no foreign page can; where only loopback is bound, nothing does."""
        return not self._local and binding.is_address(host)


# --- Host and Origin --------------------------------------------------------------------------------------------------


def require_origin(headers: Headers, scheme: str, allowed: frozenset[str], *, required: bool) -> None:
    """A request that changes something must not come from another site's page. Browsers send Origin, programs do not.

    Raises Forbidden foreign_origin.
    """
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    if origin is None:
        if site == "same-origin" or (site in (None, "none") and not required):
            return
        got = "none" if site is None else f"a request from a page of a {site[:20]} origin"
        raise Forbidden(f"Origin: expected this server's, got {got}", code="foreign_origin")
    kind, _, host = origin.lower().partition("://")
    encrypted_enough = kind == "https" or scheme != "https"  # without TLS anybody on the way can write a page
    if encrypted_enough and host and host in {headers.get("host", "").lower(), *allowed}:
        return
    raise Forbidden(f"Origin: expected this server's own pages, got {origin[:100]!r}", code="foreign_origin")


@lru_cache(maxsize=256)
def _name(host: str) -> tuple[str, bool]:
    """Return a Host header without its port, and whether it is a local name, which no foreign page can have."""
    bare = host.strip().lower()
    bare = bare[1:].partition("]")[0] if bare.startswith("[") else bare.partition(":")[0].rstrip(".")
    return bare, binding.is_loopback(bare)


# --- tokens -----------------------------------------------------------------------------------------------------------


def _bearer(headers: Headers) -> str | None:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return (token.strip() or None) if scheme.lower() == "bearer" else None


def session_secret(headers: Headers) -> str | None:
    """Return the secret of the session's cookie. It is ignored on a request from another site's page, even if the
    browser sent it."""
    sent = headers.get("cookie")
    if sent is None or headers.get("sec-fetch-site") == "cross-site":
        return None
    try:
        morsel = SimpleCookie(sent).get(COOKIE)
    except CookieError:
        return None
    return (morsel.value or None) if morsel else None
