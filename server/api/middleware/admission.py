"""Admission before anything is done: predictions that a full queue could not hold get 429 before their body is read.

    the key is known (AuthMiddleware) ─► no room ─► 429 queue_full, before the body, the route and its dependencies
                                          └ room ─► route ─► `Queue.reserve`, which refuses where no place is left

A refusal must cost far less than an answer: asked for three times what the engine can do, a server would spend its time
on refusals. A request is in flight from the end of its body to its answer: a slow sender takes no place. A tenant or a
task with less than its share of the queue passes even then (`server.batching.fair_share`). The task is read from the
path; a request that names its tasks elsewhere is admitted by its tenant, and checked again when places are reserved.
"""

from __future__ import annotations

from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api import problems
from server.batching.admission import Queue
from server.batching.scheduler import FlowKey
from server.errors import QueueFull
from server.keys.key import Key

from .auth import TASK, TEMPLATE, RefusedRoute

ROWS_COME_BY: Final = frozenset(
    {
        "/predict",
        "/predict/{task}",
        "/embed",
        "/tasks/{task}/attention",
        "/v1/embeddings",
        "/v2/models/{task}/infer",
        "/v2/models/{task}/versions/{version}/infer",
    }
)


class AdmissionMiddleware:
    """Middleware between the limits of a body and the routes."""

    def __init__(self, app: ASGIApp, queue: Queue) -> None:
        self.app, self._queue = app, queue
        self.in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["state"][TEMPLATE] not in ROWS_COME_BY:
            await self.app(scope, receive, send)
            return
        try:
            self._queue.require_room(self.in_flight, _flow(scope))
        except QueueFull as error:
            scope["route"] = RefusedRoute(scope["state"][TEMPLATE])
            await problems.answer(error, scope)(scope, receive, send)
            return
        in_flight = _InFlight(self, receive)
        try:
            await in_flight.begin()
            await self.app(scope, in_flight.receive, send)
        finally:
            in_flight.leave()


def _flow(scope: Scope) -> FlowKey:
    key: Key | None = scope["state"].get("key")
    return "" if key is None else key.tasks, scope["state"][TASK]


class _InFlight:
    """One request on its way through."""

    def __init__(self, middleware: AdmissionMiddleware, receive: Receive) -> None:
        self._middleware, self._receive = middleware, receive
        self._first: Message | None = None
        self._counted = False

    async def begin(self) -> None:
        """A small body is there already, when its head is: it is counted before the next request is looked at."""
        self._first = await self.receive()

    async def receive(self) -> Message:
        if self._first is not None:
            first, self._first = self._first, None
            return first
        message = await self._receive()
        if not self._counted and message["type"] == "http.request" and not message.get("more_body", False):
            self._counted = True
            self._middleware.in_flight += 1
        return message

    def leave(self) -> None:
        self._middleware.in_flight -= self._counted
        self._counted = False
