"""What is known of every request: an id on every response, a line in the log, a count and a time by route."""

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

log = logging.getLogger("server.access")

HEADER: Final = "X-Request-Id"
CLIENT_GONE: Final = 499  # as nginx writes it: nobody was there to be answered
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})
SANE: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")


class RequestLog:
    """The outermost middleware, so that no response and no failure escapes it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        traced = _LoggedRequest(scope, receive, send)
        about = logs.REQUEST_ID.set(traced.id)
        try:
            with traced.span():
                await self._answer(traced)
        finally:
            logs.REQUEST_ID.reset(about)

    async def _answer(self, traced: _LoggedRequest) -> None:
        scope = traced.scope
        try:
            await self.app(scope, traced.receive, traced.send)
        except ClientDisconnect:
            traced.status = traced.status or CLIENT_GONE
        except asyncio.CancelledError:
            if traced.status or not scope["app"].state.leaving:
                raise
            # this request outlasts the shutdown: the HTTP front gives up on it, and would call that an error of ours
            late = Unavailable("the server is shutting down", code="shutting_down")
            await problems.answer(late, scope)(scope, traced.receive, traced.send)
        except Exception as error:
            log.exception("request %s failed", traced.id)
            if traced.status:
                raise  # half an answer is out: the connection must break, so that nobody takes it for a whole one
            await problems.answer(problems.service_error(error), scope)(scope, traced.receive, traced.send)
        finally:
            traced.record()


class _LoggedRequest:
    """One request: its id, when it came, how much came with it, how it was answered."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = Headers(scope=scope).get(HEADER, "")
        self.id = given if SANE.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = self.id
        self.scope, self._receive, self._send = scope, receive, send
        self._started, self._got_bytes = time.perf_counter(), 0
        self._span: Any = None
        self.status = 0

    def span(self) -> AbstractContextManager[None]:
        return self._traced() if tracing.enabled() else nullcontext()

    @contextmanager
    def _traced(self) -> Iterator[None]:
        about = {"lensrack.request_id": self.id}
        with tracing.request_span(self.scope["method"], self.scope["headers"], about) as self._span:
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
        method = self.scope["method"] if self.scope["method"] in _METHODS else "other"  # labels are few
        status = self.status or 500
        metrics.REQUESTS.labels(route, method, str(status)).inc()
        metrics.REQUEST_S.labels(route).observe(took_s)
        metrics.REQUEST_BYTES.labels(route).inc(self._got_bytes)
        known: dict[str, str | int] = {"http.request.method": method, "http.route": route}
        known["http.response.status_code"] = status
        tracing.finish_request(self._span, f"{method} {route}", known, failed=status >= 500)
        self._log(took_s, route)

    def _log(self, took_s: float, route: str) -> None:
        path = self.scope.get("raw_path", b"").decode("ascii", "backslashreplace")[:200]
        told = logs.fields(
            method=self.scope["method"], path=path, route=route, status=self.status, took_ms=round(1000 * took_s, 3)
        )
        line = "%s %s %d %.1f ms %s"
        log.info(line, self.scope["method"], path, self.status, 1000 * took_s, self.id, extra=told)
