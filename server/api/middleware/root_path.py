"""Behind a proxy that serves this server under a path of its own, such as https://example.org/lensrack/.

the proxy sends /lensrack/tasks (as it came) or /tasks (prefix stripped) ──► all routes see /tasks
links that leave the server (Location, the session's cookie, the schema's `servers`) begin with /lensrack
"""

from __future__ import annotations

from fastapi import Request
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send


class RootPath:
    """The outermost middleware: takes the prefix off a request's path, where the proxy has left it there."""

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self.app, self._prefix = app, prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == self._prefix:  # the dashboard's links need the slash
            await RedirectResponse(f"{self._prefix}/", 308)(scope, receive, send)
            return
        if scope["type"] == "http" and scope["path"].startswith(f"{self._prefix}/"):
            scope["path"] = scope["path"].removeprefix(self._prefix)
            scope["raw_path"] = scope.get("raw_path", b"").removeprefix(self._prefix.encode())
        await self.app(scope, receive, send)


def located(request: Request, path: str) -> str:
    """Return a path of this server as its clients see it."""
    prefix: str = request.app.state.root_path
    return prefix + path
