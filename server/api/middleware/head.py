"""HEAD wherever GET is: the same request in everything, of whose answer only status and headers are sent.

A route that takes HEAD itself, such as an upload's, keeps it. An answer is ended once its headers are known: a stream
of events would otherwise go on for as long as its job.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api import scopes


class _Answered(Exception):
    """The headers are sent; nothing more of the answer is needed."""


class HeadAsGet:
    """Middleware between the request log, which tells HEAD as what it is, and all that decides by the method."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD" or _has_head(scope["path"]):
            await self.app(scope, receive, send)
            return

        async def headers_alone(message: Message) -> None:
            if message["type"] == "http.response.start":
                await send(message)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                raise _Answered

        as_get = {**scope, "method": "GET"}  # a copy: the HTTP server must not expect a body
        try:
            await self.app(as_get, receive, headers_alone)
        except* _Answered:
            pass
        finally:
            scope.update({"route": as_get["route"]} if "route" in as_get else {})  # for the request log


def _has_head(path: str) -> bool:
    return ("HEAD", scopes.match("HEAD", path)[0]) in scopes.NEEDS
