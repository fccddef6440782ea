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

_IMAGE_PATHS: Final = re.compile(
    r"/predict(/.*)?|/embed|/v1/embeddings|/tasks/[^/]+/(feedback|attention)|/v2/models/[^/]+(/versions/[^/]+)?/infer"
)
_UPLOAD_PATHS: Final = re.compile(r"/uploads/[^/]+")
_ARCHIVE_PATHS: Final = ("/datasets", "/v1/files")
_BUNDLE_PATHS: Final = re.compile(r"/tasks/[^/]+/versions")

Cap = Callable[[str, str], int]
Patience = Callable[[str, str], float | None]


def caps(settings: Settings) -> Cap:
    """Return the most bytes that a body may have, by method and path."""

    def cap(method: str, path: str) -> int:
        if _IMAGE_PATHS.fullmatch(path):
            return settings.max_body_bytes
        whole = method == "POST" and path in _ARCHIVE_PATHS
        if whole or (method == "PATCH" and _UPLOAD_PATHS.fullmatch(path)):
            return settings.max_dataset_bytes
        if method == "PUT" and _BUNDLE_PATHS.fullmatch(path):
            return settings.max_bundle_bytes
        return settings.max_json_bytes

    return cap


def patience(settings: Settings) -> Patience:
    """Return the most seconds that a body may take, by method and path; None for archives, whose silence is limited."""

    def most_s(method: str, path: str) -> float | None:
        archive = (method == "POST" and path in _ARCHIVE_PATHS) or _UPLOAD_PATHS.fullmatch(path)
        return None if archive else settings.body_timeout_s

    return most_s


class BodyLimit:
    """Refuses a body above its cap: at once where Content-Length says so, otherwise (chunked) while it is read; and a
    body that takes too long."""

    def __init__(self, app: ASGIApp, cap: Cap, patience: Patience) -> None:
        self.app, self.cap, self.patience = app, cap, patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        method, path = scope["method"], scope["path"]
        reading = _BoundedBody(self.cap(method, path), self.patience(method, path), Headers(scope=scope), receive, send)
        try:
            if not reading.cut:
                await self.app(scope, reading.receive, reading.send)
        except (TooLarge, Silent):
            if not reading.cut:
                raise
        if reading.cut and reading.error is not None:
            await problems.answer(reading.error, scope)(scope, receive, send)


class _BoundedBody:
    """A request's body while it is read. `cut`: it was too large or too slow, and no response has begun."""

    def __init__(self, cap: int, most_s: float | None, headers: Headers, receive: Receive, send: Send) -> None:
        self._cap, self._most_s, self._receive, self._send = cap, most_s, receive, send
        self._got, self._answered, self._whole = 0, False, False
        self._until = None if most_s is None else asyncio.get_running_loop().time() + most_s
        length = headers.get("content-length", "")
        self.cut = length.isascii() and length.isdecimal() and (len(length) > 18 or int(length) > cap)
        self.error: TooLarge | Silent | None = self._too_large(length[:30]) if self.cut else None

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
        """Send, unless the body was cut off: then the application's response is dropped for the error's."""
        if not self.cut:
            self._answered = True
            await self._send(message)
