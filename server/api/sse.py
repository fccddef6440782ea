"""A job's events as a stream of server-sent events (WHATWG HTML, section 9.2).

Each event carries its number as `id`, so that a client which lost its connection sends `Last-Event-ID` and misses
nothing. Between them, `progress` without an `id` has the job's progress where it has changed. A comment every
`HEARTBEAT_S` keeps proxies from closing a quiet stream. The stream ends with the job, with the key that opened it (a
client that reconnects then gets 401), and when the server shuts down. A client that reconnects after the job's last
event gets 204, which tells an EventSource to stop.

FastAPI's own (`fastapi.sse`) serves a route that always streams: it decides by the route's response class, not by the
request's Accept, and the 200 is sent before the first event is known, so no 204; its interval is private.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final

from fastapi import Request
from starlette.responses import Response, StreamingResponse

from lensrack import wire
from server.errors import BadRequest, Forbidden, Unauthenticated

MEDIA_TYPE: Final = "text/event-stream"
HEARTBEAT_S: Final = 15.0
WAIT_S: Final = 1.0  # of one wait for events, and so between two reports of progress

# (after, wait_s); raises Unauthenticated or Forbidden once the key no longer allows it
Page = Callable[[int, float], Awaitable[wire.JobEvents]]


def accepted(request: Request) -> bool:
    """Whether the client accepts a stream."""
    return MEDIA_TYPE in request.headers.get("accept", "")


def last_seen(request: Request, after: int) -> int:
    """Return `Last-Event-ID` where it is sent, which is newer than the `after` of a reconnecting client's URL."""
    text = request.headers.get("last-event-id")
    if text is None:
        return after
    if not text.isdecimal() or len(text) > 18:
        raise BadRequest(f"Last-Event-ID: expected the number of an event, got {text[:40]!r}")
    return int(text)


async def respond(page: Page, after: int, leaving: Callable[[], bool]) -> Response:
    """Return the stream. Its first page is read before the response begins: an unknown job is a 404."""
    first = await page(after, 0.0)
    if first.finished and not first.events:
        return Response(status_code=204)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_frames(first, page, leaving), media_type=MEDIA_TYPE, headers=headers)


async def _frames(events: wire.JobEvents, page: Page, leaving: Callable[[], bool]) -> AsyncIterator[str]:
    sent_at, shown = time.monotonic(), events.progress
    while True:
        for event in events.events:
            yield frame(event)
            sent_at = time.monotonic()
        if events.progress != shown and not events.finished:
            yield f"event: progress\ndata: {events.progress.model_dump_json() if events.progress else '{}'}\n\n"
            sent_at, shown = time.monotonic(), events.progress
        if events.finished or leaving():
            return
        if time.monotonic() - sent_at >= HEARTBEAT_S:
            yield ": still here\n\n"
            sent_at = time.monotonic()
        try:
            events = await page(events.next, WAIT_S)
        except (Unauthenticated, Forbidden):
            return


def frame(event: wire.JobEvent) -> str:
    """Return an event as text. JSON has no raw line breaks, so `data` is always one line."""
    body = json.dumps({"at": event.at, **event.data}, ensure_ascii=False)
    return f"id: {event.seq}\nevent: {event.type}\ndata: {body}\n\n"
