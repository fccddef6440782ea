"""Predictions are sent away before anything is done for them while the queue could not hold them anyway.

    who asks is known (Door) ─► no room ─► 429 queue_full, before the body, the route and what the route depends on
                                  └ room ─► route ─► `Batcher.promise`, which says no to who finds the last place taken

A refusal that costs as much as an answer is no refusal: asked for three times what the engine can do, a server would
spend its time on saying no. A request is inside from the end of its body to its answer: a slow sender takes no place.
Whose tenant, or whose task, has less than its share in the queue passes even then (`server.batching.fair_share`). The
task is read off the path: what names tasks elsewhere is let in as its tenant is, and asked again where places are
promised.
"""

from __future__ import annotations

from typing import Final, Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api import problems
from server.batching.fair_share import NO_FLOW
from server.batching.scheduler import FlowKey
from server.errors import QueueFull
from server.keys.key import Key

from .auth import TEMPLATE, RefusedRoute

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
_TASK_AT: Final = {
    template: template.split("/").index("{task}") for template in ROWS_COME_BY if "{task}" in template
}  # in which part of the path


class Queue(Protocol):
    """What is asked for room: `server.batching.batcher.Batcher`."""

    def require_room(self, inside: int, flow: FlowKey = NO_FLOW) -> None: ...


class AdmissionMiddleware:
    """Middleware between the limits of a body and the routes."""

    def __init__(self, app: ASGIApp, queue: Queue) -> None:
        self.app, self._queue = app, queue
        self.inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["state"][TEMPLATE] not in ROWS_COME_BY:
            await self.app(scope, receive, send)
            return
        try:
            self._queue.require_room(self.inside, _flow(scope))
        except QueueFull as error:
            scope["route"] = RefusedRoute(scope["state"][TEMPLATE])
            await problems.answer(error, scope)(scope, receive, send)
            return
        passage = _InFlight(self, receive)
        try:
            await passage.begin()
            await self.app(scope, passage.receive, send)
        finally:
            passage.leave()


def _flow(scope: Scope) -> FlowKey:
    key: Key | None = scope["state"].get("key")
    at = _TASK_AT.get(scope["state"][TEMPLATE])
    task = "" if at is None else scope["path"].split("/")[at].partition("@")[0]
    return "" if key is None else key.tasks, task


class _InFlight:
    """One request on its way through."""

    def __init__(self, turnstile: AdmissionMiddleware, receive: Receive) -> None:
        self._turnstile, self._receive = turnstile, receive
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
            self._turnstile.inside += 1
        return message

    def leave(self) -> None:
        self._turnstile.inside -= self._counted
        self._counted = False
