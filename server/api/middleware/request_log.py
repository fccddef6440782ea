"""The request log: an id on every response, a line in the log, count and duration by route, a trace."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api import problems
from server.errors import Unavailable
from server.observability import logs, metrics, tracing

log = logging.getLogger(logs.REQUESTS)

HEADER: Final = "X-Request-Id"
CLIENT_GONE: Final = 499  # nginx's status for a client that left before the response
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})
SANE: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")


def level_of(status: int) -> int:
    """Return the level of a request's line: failures of the server are seen without LENSRACK_LOG_REQUESTS."""
    return logging.WARNING if status >= 500 else logging.DEBUG


class RequestLog:
    """The outermost middleware, so that every response and every failure passes it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = _LoggedRequest(scope, receive, send)
        context = logs.REQUEST_ID.set(request.id)
        try:
            with request.span():
                await self._answer(request)
        finally:
            logs.REQUEST_ID.reset(context)

    async def _answer(self, request: _LoggedRequest) -> None:
        scope = request.scope
        try:
            await self.app(scope, request.receive, request.send)
        except ClientDisconnect:
            request.status = request.status or CLIENT_GONE
        except asyncio.CancelledError:
            if request.status or not scope["app"].state.leaving:
                raise
            # the request outlasts the shutdown: uvicorn cancels it, and would answer 500
            late = Unavailable("the server is shutting down", code="shutting_down")
            await problems.answer(late, scope)(scope, request.receive, request.send)
        except Exception as error:
            log.exception("request %s failed", request.id)
            if request.status:
                raise  # half a response is out: the connection must break, or the client would take it for whole
            await problems.answer(problems.service_error(error), scope)(scope, request.receive, request.send)
        finally:
            request.record()


class _LoggedRequest:
    """A request: its id, start, bytes received and status."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        id_ = Headers(scope=scope).get(HEADER, "")
        self.id = id_ if SANE.fullmatch(id_) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = self.id
        self.scope, self._receive, self._send = scope, receive, send
        self._started, self._got_bytes = time.perf_counter(), 0
        self._span: Any = None
        self.status = 0

    def span(self) -> AbstractContextManager[None]:
        return self._traced() if tracing.enabled() else nullcontext()

    @contextmanager
    def _traced(self) -> Iterator[None]:
        attributes = {"lensrack.request_id": self.id}
        with tracing.request_span(self.scope["method"], self.scope["headers"], attributes) as self._span:
            yield

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._got_bytes += len(message.get("body", b""))
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)[HEADER] = self.id
        await self._send(message)

    def record(self) -> None:
        took_s = time.perf_counter() - self._started
        route = getattr(self.scope.get("route"), "path", "unmatched")
        method = self.scope["method"] if self.scope["method"] in _METHODS else "other"  # a closed set of labels
        status = self.status or 500
        metrics.REQUESTS.labels(route, method, str(status)).inc()
        metrics.REQUEST_S.labels(route).observe(took_s)
        metrics.REQUEST_BYTES.labels(route).inc(self._got_bytes)
        attributes: dict[str, str | int] = {"http.request.method": method, "http.route": route}
        attributes["http.response.status_code"] = status
        tracing.finish_request(self._span, f"{method} {route}", attributes, failed=status >= 500)
        self._log(took_s, route)

    def _log(self, took_s: float, route: str) -> None:
        level = level_of(self.status or 500)
        if not log.isEnabledFor(level):
            return
        path = self.scope.get("raw_path", b"").decode("ascii", "backslashreplace")[:200]
        fields = logs.fields(
            method=self.scope["method"], path=path, route=route, status=self.status, took_ms=round(1000 * took_s, 3)
        )
        line = "%s %s %d %.1f ms %s"
        log.log(level, line, self.scope["method"], path, self.status, 1000 * took_s, self.id, extra=fields)
