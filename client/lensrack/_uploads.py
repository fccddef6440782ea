"""A dataset on its way to the server: where it stands, what to send next, how long to bear with a bad line. Pure.

small, or a pipe    POST /datasets, in one go
larger              POST /uploads ─► PATCH, PATCH, … ─► POST /datasets?upload=ID      (tus 1.0)
                                      ▲       │ the line breaks
                                      └─ HEAD ┘ where does it stand?
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from typing import Any, TypeAlias

from . import wire
from ._archive import Archive, FileBody, Progress
from ._calls import UPLOAD_WAIT_S, segment, upload_dataset
from ._core import Call, Reply, read_as
from ._retry import RETRIED_STATUSES
from .errors import ApiError, ConnectError, InvalidInput, LensrackError, ProtocolError, RequestTimeout

PIECE_BYTES = 16 * 2**20  # what is larger goes in pieces of this size: proxies on the way may hold a body back whole
OUTAGE_S = 120.0  # of failures without a byte that got through; then a line is given up
STORING_S = 7200.0  # the server may look at a million pictures before it answers
PAUSE_S = 1.0

OnUpload: TypeAlias = Callable[[str], None]
"""Called with the id of a resumable upload as soon as there is one."""

_TUS = {"Tus-Resumable": "1.0.0"}
_FORGIVEN = frozenset({"upload_busy", "upload_offset_conflict"})  # an earlier piece got further than its answer


class Uploading:
    """One archive from its first byte to its dataset; `resume` goes on with an upload that was begun before."""

    def __init__(
        self,
        archive: Archive,
        *,
        name: str | None,
        parent: str | None = None,
        progress: Progress | None = None,
        resume: str | None = None,
        on_upload: OnUpload | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if resume is not None and archive.size is None:
            raise InvalidInput("resume: expected a file or a folder, for a pipe cannot start in its middle")
        self._archive, self._parent = archive, parent
        self._name = archive.name if name is None and parent is None else name
        self._progress, self._on_upload, self._clock = progress, on_upload, clock
        self._in_pieces = resume is not None or (archive.size or 0) > PIECE_BYTES
        self._id, self._offset = resume, (None if resume else 0)
        self._furthest = -1
        self._failing_since: float | None = None  # the first failure after the last byte that got through
        self.dataset: wire.Dataset | None = None

    def call(self) -> Call[Any]:
        """The next request."""
        if not self._in_pieces:
            return upload_dataset(self._archive, name=self._name, parent=self._parent, progress=self._progress)
        if self._id is None:
            return begin(self._size, self._archive.fingerprint)
        if self._offset is None:
            return where(self._id)
        if self._offset < self._size:
            return piece(self._id, self._offset, *self._body(self._offset))
        return store(self._id, self._archive, name=self._name, parent=self._parent)

    def take(self, told: wire.Dataset | wire.Upload | Reply | int) -> None:
        """What the last request came to. Raises InvalidInput where `resume` is another file's upload."""
        if isinstance(told, wire.Dataset):
            self.dataset = told
        elif isinstance(told, wire.Upload):
            self._id = told.id
            self._stand_at(told.offset)
            if self._on_upload:
                self._on_upload(told.id)
        elif isinstance(told, Reply):
            self._check_same(told)
            self._stand_at(_offset_of(told))
        else:
            self._stand_at(told)

    def lost(self, error: LensrackError) -> float:
        """The pause before the next request after one that failed. Raises the error where nothing more can be done."""
        if not self._in_pieces or self._id is None or not _is_of_the_line(error):
            raise error
        if self._failing_since is None:
            self._failing_since = self._clock()
        patience_s = STORING_S if isinstance(error, RequestTimeout) and self._offset == self._size else OUTAGE_S
        if self._clock() - self._failing_since > patience_s:
            raise error
        if self._offset != self._size:
            self._offset = None
        return PAUSE_S

    @property
    def _size(self) -> int:
        return self._archive.size or 0

    def _stand_at(self, offset: int) -> None:
        if not 0 <= offset <= self._size:
            raise ProtocolError(f"the upload stands at {offset}: expected 0 to {self._size}")
        self._offset = offset
        if offset > self._furthest:
            self._furthest, self._failing_since = offset, None
        if self._progress:
            self._progress(offset, self._size)

    def _check_same(self, told: Reply) -> None:
        length, metadata = told.headers.get("upload-length"), told.headers.get("upload-metadata", "")
        if length != str(self._size) or metadata != metadata_of(self._archive.fingerprint):
            raise InvalidInput(
                f"upload {self._id} is of another file: expected {length} bytes and the same beginning and end, "
                f"got {self._size} bytes"
            )

    def _body(self, offset: int) -> tuple[FileBody, int]:
        def report(sent: int, _: int | None) -> None:
            if self._progress:
                self._progress(offset + sent, self._size)

        count = min(PIECE_BYTES, self._size - offset)
        start = self._archive.start + offset
        return FileBody(self._archive.file, size=count, start=start, progress=report), count


def _is_of_the_line(error: LensrackError) -> bool:
    """Not of the request: it may go well the next time."""
    if isinstance(error, ApiError):
        return error.status in RETRIED_STATUSES or error.status == 408 or error.code in _FORGIVEN
    return isinstance(error, ConnectError | RequestTimeout)


# --- the requests -----------------------------------------------------------------------------------------------------


def begin(length: int, fingerprint: bytes) -> Call[wire.Upload]:
    headers = {**_TUS, "Upload-Length": str(length), "Upload-Metadata": metadata_of(fingerprint)}
    return Call("POST", "/uploads", read_as(wire.Upload), headers=headers)


def where(upload: str) -> Call[Reply]:
    return Call("HEAD", _upload(upload), lambda reply: reply, headers=_TUS)


def piece(upload: str, offset: int, body: FileBody, count: int) -> Call[int]:
    """Sent once: after a failure the server has to be asked first how much of it came."""
    headers = {**_TUS, "Content-Type": "application/offset+octet-stream", "Content-Length": str(count)}
    headers["Upload-Offset"] = str(offset)
    payload = {"stream": body}
    path = _upload(upload)
    return Call("PATCH", path, _offset_of, (), headers, payload, repeatable=False, max_retries=0, transfer=True)


def store(upload: str, archive: Archive, *, name: str | None, parent: str | None) -> Call[wire.Dataset]:
    given = {"upload": upload, "name": name, "parent": parent}
    params = [(key, value) for key, value in given.items() if value is not None]

    def read(reply: Reply) -> wire.Dataset:
        return archive.complete(read_as(wire.Dataset)(reply))

    return Call("POST", "/datasets", read, params, wait_s=UPLOAD_WAIT_S, transfer=True)


def metadata_of(fingerprint: bytes) -> str:
    return f"fingerprint {base64.b64encode(fingerprint).decode('ascii')}"


def _upload(upload: str) -> str:
    return f"/uploads/{segment(upload, 'upload')}"


def _offset_of(reply: Reply) -> int:
    text = reply.headers.get("upload-offset", "")
    if not (text.isascii() and text.isdecimal()):
        raise ProtocolError(f"Upload-Offset: expected a number of bytes, got {text[:40]!r}")
    return int(text)
