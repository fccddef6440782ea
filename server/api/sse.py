"""A job's events as a stream (server-sent events, WHATWG HTML section 9.2), for browsers and whoever speaks it.

Each event carries its number as `id`, so a client that lost its connection says `Last-Event-ID` and misses nothing. A
comment every `HEARTBEAT_S` keeps proxies from closing a quiet stream. When the job has ended the stream ends; a client
that comes back after that gets 204, which tells an EventSource not to come again. It ends, too, when the key that asked
for it is revoked (who comes back then gets 401), and when the server leaves.
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
WAIT_S: Final = 5.0  # one look at the store's events; shorter than the heartbeat, so that one is never late by much

# (after, wait_s); raises Unauthenticated or Forbidden once the key is no longer good for it
Page = Callable[[int, float], Awaitable[wire.JobEvents]]


def wanted(request: Request) -> bool:
    return MEDIA_TYPE in request.headers.get("accept", "")


def last_seen(request: Request, after: int) -> int:
    """`Last-Event-ID` where the client sends one, for it knows better than the address it reconnects to."""
    text = request.headers.get("last-event-id")
    if text is None:
        return after
    if not text.isdecimal() or len(text) > 18:
        raise BadRequest(f"Last-Event-ID: expected the number of an event, got {text[:40]!r}")
    return int(text)


async def respond(page: Page, after: int, leaving: Callable[[], bool]) -> Response:
    """The first page is read before the answer begins: an unknown job is a 404, not a broken stream."""
    first = await page(after, 0.0)
    if first.finished and not first.events:
        return Response(status_code=204)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_frames(first, page, leaving), media_type=MEDIA_TYPE, headers=headers)


async def _frames(found: wire.JobEvents, page: Page, leaving: Callable[[], bool]) -> AsyncIterator[str]:
    said = time.monotonic()
    while True:
        for event in found.events:
            yield frame(event)
            said = time.monotonic()
        if found.finished or leaving():
            return
        if time.monotonic() - said >= HEARTBEAT_S:
            yield ": still here\n\n"
            said = time.monotonic()
        try:
            found = await page(found.next, WAIT_S)
        except (Unauthenticated, Forbidden):
            return


def frame(event: wire.JobEvent) -> str:
    """One event. JSON has no raw line breaks, so `data` is always one line."""
    body = json.dumps({"at": event.at, **event.data}, ensure_ascii=False)
    return f"id: {event.seq}\nevent: {event.type}\ndata: {body}\n\n"
