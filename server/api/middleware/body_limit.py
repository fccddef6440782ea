"""Middleware that bounds a request body's size and duration."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api import problems
from server.errors import Silent, TooLarge
from server.settings import Settings

_IMAGES_COME_TO: Final = re.compile(
    r"/predict(/.*)?|/embed|/v1/embeddings|/tasks/[^/]+/(feedback|attention)|/v2/models/[^/]+(/versions/[^/]+)?/infer"
)
_UPLOADS_GO_ON_AT: Final = re.compile(r"/uploads/[^/]+")
_ARCHIVES_COME_TO: Final = ("/datasets", "/v1/files")
_BUNDLES_COME_TO: Final = re.compile(r"/tasks/[^/]+/versions")

Cap = Callable[[str, str], int]
Patience = Callable[[str, str], float | None]


def caps(settings: Settings) -> Cap:
    """The most bytes that a body may have, by method and path."""

    def cap(method: str, path: str) -> int:
        if _IMAGES_COME_TO.fullmatch(path):
            return settings.max_body_bytes
        whole = method == "POST" and path in _ARCHIVES_COME_TO
        if whole or (method == "PATCH" and _UPLOADS_GO_ON_AT.fullmatch(path)):
            return settings.max_dataset_bytes
        if method == "PUT" and _BUNDLES_COME_TO.fullmatch(path):
            return settings.max_bundle_bytes
        return settings.max_json_bytes

    return cap


def patience(settings: Settings) -> Patience:
    """How long a body may take in all, by method and path; None for archives, which may only not fall silent."""

    def most_s(method: str, path: str) -> float | None:
        archive = (method == "POST" and path in _ARCHIVES_COME_TO) or _UPLOADS_GO_ON_AT.fullmatch(path)
        return None if archive else settings.body_timeout_s

    return most_s


class BodyLimit:
    """Stops a body at its cap, at once where its length is told and otherwise (chunked) while it is read; and one that
    trickles, when its time is over."""

    def __init__(self, app: ASGIApp, cap: Cap, patience: Patience) -> None:
        self.app, self.cap, self.patience = app, cap, patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        asked = (scope["method"], scope["path"])
        reading = _BoundedBody(self.cap(*asked), self.patience(*asked), Headers(scope=scope), receive, send)
        try:
            if not reading.cut:
                await self.app(scope, reading.receive, reading.send)
        except (TooLarge, Silent):
            if not reading.cut:
                raise
        if reading.cut and reading.error is not None:
            await problems.answer(reading.error, scope)(scope, receive, send)


class _BoundedBody:
    """One request's body while it is read. `cut`: it was too large or too slow, and the answer to that has not been
    given."""

    def __init__(self, cap: int, most_s: float | None, headers: Headers, receive: Receive, send: Send) -> None:
        self._cap, self._most_s, self._receive, self._send = cap, most_s, receive, send
        self._got, self._answered, self._whole = 0, False, False
        self._until = None if most_s is None else asyncio.get_running_loop().time() + most_s
        told = headers.get("content-length", "")
        self.cut = told.isascii() and told.isdecimal() and (len(told) > 18 or int(told) > cap)
        self.error: TooLarge | Silent | None = self._too_large(told[:30]) if self.cut else None

    async def receive(self) -> Message:
        if self._whole:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            self.cut = not self._answered
            detail = f"expected the whole body within {self._most_s:g} s, got {self._got} bytes of it"
            self.error = Silent(detail, code="body_timeout")
            raise self.error from None
        if message["type"] == "http.request":
            self._got += len(message.get("body", b""))
            self._whole = not message.get("more_body", False)
            if self._got > self._cap:
                self.cut = not self._answered
                self.error = self._too_large("more")
                raise self.error
        return message

    def _too_large(self, got: str) -> TooLarge:
        return TooLarge(f"expected a body of at most {self._cap} bytes, got {got}")

    async def send(self, message: Message) -> None:
        """Whatever the application makes of a body that was cut off is dropped: the answer is that it was too large."""
        if not self.cut:
            self._answered = True
            await self._send(message)
