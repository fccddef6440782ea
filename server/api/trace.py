"""What is known of every request: an id on every response, a line in the log, a count and a time by route."""

from __future__ import annotations

import logging
import re
import time
import uuid
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import metrics
from server.api import problems

log = logging.getLogger("server.access")

HEADER: Final = "X-Request-Id"
CLIENT_GONE: Final = 499  # as nginx writes it: nobody was there to be answered
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})
_SANE: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Trace:
    """The outermost middleware, so that no response and no failure escapes it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        traced = _Traced(scope, send)
        try:
            await self.app(scope, receive, traced.send)
        except ClientDisconnect:
            traced.status = traced.status or CLIENT_GONE
        except Exception as error:
            log.exception("request %s failed", traced.id)
            if traced.status:
                raise  # half an answer is out: the connection must break, so that nobody takes it for a whole one
            await problems.answer(problems.service_error(error), traced.id)(scope, receive, traced.send)
        finally:
            traced.record()


class _Traced:
    """One request: its id, when it came, how it was answered."""

    def __init__(self, scope: Scope, send: Send) -> None:
        given = Headers(scope=scope).get(HEADER, "")
        self.id = given if _SANE.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = self.id
        self._scope, self._send = scope, send
        self._started = time.perf_counter()
        self.status = 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)[HEADER] = self.id
        await self._send(message)

    def record(self) -> None:
        took_s = time.perf_counter() - self._started
        route = getattr(self._scope.get("route"), "path", "unmatched")
        method = self._scope["method"] if self._scope["method"] in _METHODS else "other"  # labels are few
        metrics.REQUESTS.labels(route, method, str(self.status or 500)).inc()
        metrics.REQUEST_S.labels(route).observe(took_s)
        path = self._scope.get("raw_path", b"").decode("ascii", "backslashreplace")[:200]
        log.info("%s %s %d %.1f ms %s", self._scope["method"], path, self.status, 1000 * took_s, self.id)
