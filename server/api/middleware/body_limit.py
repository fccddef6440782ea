"""Middleware that unpacks a request's body, and bounds its size and duration."""

from __future__ import annotations

import asyncio
import re
import zlib
from collections.abc import Callable
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api import problems
from server.errors import BadRequest, ServiceError, Silent, TooLarge, UnsupportedMedia
from server.settings import Settings

_IMAGE_PATHS: Final = re.compile(
    r"/predict(/.*)?|/embed|/v1/embeddings|/tasks/[^/]+/(feedback|attention)|/v2/models/[^/]+(/versions/[^/]+)?/infer"
)
_UPLOAD_PATHS: Final = re.compile(r"/uploads/[^/]+")
_ARCHIVE_PATHS: Final = ("/datasets", "/v1/files")
_BUNDLE_PATHS: Final = re.compile(r"/tasks/[^/]+/versions")

# content codings by the header that zlib expects of them
ENCODINGS: Final = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
_OF_PACKED: Final = frozenset({b"content-encoding", b"content-length"})

Cap = Callable[[str, str], tuple[int, str]]
Patience = Callable[[str, str], float | None]


def caps(settings: Settings) -> Cap:
    """Return the most bytes that a body may have, and the setting that says so, by method and path."""

    def cap(method: str, path: str) -> tuple[int, str]:
        name = "max_json_bytes"
        if _IMAGE_PATHS.fullmatch(path):
            name = "max_body_bytes"
        elif (method == "POST" and path in _ARCHIVE_PATHS) or (method == "PATCH" and _UPLOAD_PATHS.fullmatch(path)):
            name = "max_dataset_bytes"
        elif method == "PUT" and _BUNDLE_PATHS.fullmatch(path):
            name = "max_bundle_bytes"
        return getattr(settings, name), f"LENSRACK_{name.upper()}"

    return cap


def patience(settings: Settings) -> Patience:
    """Return the most seconds that a body may take, by method and path; None for archives, whose silence is limited."""

    def most_s(method: str, path: str) -> float | None:
        archive = (method == "POST" and path in _ARCHIVE_PATHS) or _UPLOAD_PATHS.fullmatch(path)
        return None if archive else settings.body_timeout_s

    return most_s


class BodyLimit:
    """Unpacks a body with a Content-Encoding, and refuses one above its cap, packed or unpacked: at once where
    Content-Length says so, otherwise while it is read; and a body that takes too long."""

    def __init__(self, app: ASGIApp, cap: Cap, patience: Patience) -> None:
        self.app, self.cap, self.patience = app, cap, patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        asked = scope["method"], scope["path"]
        reading = _BoundedBody(self.cap(*asked), self.patience(*asked), Headers(scope=scope), receive, send)
        if reading.packed:  # what follows sees the body as if it had been sent unpacked
            scope["headers"] = [header for header in scope["headers"] if header[0] not in _OF_PACKED]
        try:
            if not reading.cut:
                await self.app(scope, reading.receive, reading.send)
        except (TooLarge, Silent, BadRequest):
            if not reading.cut:
                raise
        if reading.cut and reading.error is not None:
            await problems.answer(reading.error, scope)(scope, receive, send)


class _BoundedBody:
    """A request's body while it is read. `cut`: it was refused, and no response has begun."""

    def __init__(
        self, cap: tuple[int, str], most_s: float | None, headers: Headers, receive: Receive, send: Send
    ) -> None:
        (self._cap, self._setting), self._most_s, self._receive, self._send = cap, most_s, receive, send
        self._got, self._answered, self._whole = 0, False, False
        self._until = None if most_s is None else asyncio.get_running_loop().time() + most_s
        self.error: ServiceError | None = None
        encoding = headers.get("content-encoding", "").strip().lower()
        self.packed = encoding not in ("", "identity")
        self._unpacked = Unpacker(encoding) if encoding in ENCODINGS else None
        length = headers.get("content-length", "")
        if length.isascii() and length.isdecimal() and (len(length) > 18 or int(length) > self._cap):
            self.error = self._too_large(length[:30])
        elif self.packed and self._unpacked is None:
            detail = f"Content-Encoding: expected {' or '.join(ENCODINGS)}, got {encoding[:40]!r}"
            self.error = UnsupportedMedia(detail, accepted=list(ENCODINGS))
        self.cut = self.error is not None

    async def receive(self) -> Message:
        if self._whole:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            detail = f"expected the whole body within {self._most_s:g} s, got {self._got} bytes of it"
            raise self._refused(Silent(detail, code="body_timeout")) from None
        if message["type"] != "http.request":
            return message
        self._whole = not message.get("more_body", False)
        if self._unpacked is not None:
            message = await self._unpack(message, self._unpacked)
        self._got += len(message.get("body", b""))
        if self._got > self._cap:
            raise self._refused(self._too_large("more"))
        return message

    async def _unpack(self, message: Message, unpacked: Unpacker) -> Message:
        try:
            most = self._cap - self._got + 1
            body = await asyncio.to_thread(unpacked.feed, message.get("body", b""), most)
            if self._whole and len(body) < most:
                unpacked.finish()
        except BadRequest as error:
            raise self._refused(error) from error
        return {**message, "body": body}

    def _refused(self, error: ServiceError) -> ServiceError:
        self.cut, self.error = not self._answered, error
        return error

    def _too_large(self, got: str) -> TooLarge:
        unpacked = " once it is unpacked" if self.packed else ""
        return TooLarge(f"expected a body of at most {self._cap} bytes{unpacked} ({self._setting}), got {got}")

    async def send(self, message: Message) -> None:
        """Send, unless the body was cut off: then the application's response is dropped for the error's."""
        if not self.cut:
            self._answered = True
            await self._send(message)


class Unpacker:
    """A body of one content coding, unpacked as it arrives; no more of it than is asked for, so that a few bytes
    cannot fill the memory."""

    def __init__(self, encoding: str) -> None:
        self._encoding, self._stream = encoding, zlib.decompressobj(ENCODINGS[encoding])
        self._begun = False

    def feed(self, data: bytes, most: int) -> bytes:
        """Return at most `most` bytes more; so many mean that there may be still more. Raises BadRequest."""
        if data and self._stream.eof:
            raise self._error("one body, got more behind it")
        self._begun = self._begun or bool(data)
        try:
            return self._stream.decompress(data, most)
        except zlib.error as error:
            raise self._error("a body of that encoding, got something else") from error

    def finish(self) -> None:
        """Raises BadRequest for a body that ended too early, or late. An empty body is one of any encoding."""
        if self._begun and (not self._stream.eof or self._stream.unused_data):
            raise self._error("one whole body, got a part or more")

    def _error(self, expected: str) -> BadRequest:
        return BadRequest(f"Content-Encoding: {self._encoding}: expected {expected}")
