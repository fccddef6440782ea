"""The upload of a dataset: its offset, the next request, and how long to retry a failing connection. Pure.

small, or a pipe    POST /datasets, in one request
larger              POST /uploads ─► PATCH, PATCH, … ─► POST /datasets?upload=ID      (tus 1.0)
                                      ▲       │ the connection breaks
                                      └─ HEAD ┘ asks for the offset
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from typing import Any, TypeAlias

from . import wire
from ._archive import Archive, FileBody, Progress
from ._core import Call, Reply, read_as
from ._endpoints import UPLOAD_WAIT_S, segment, upload_dataset
from ._retry import RETRIED_STATUSES
from .errors import ApiError, ConnectError, InvalidInput, LensrackError, ProtocolError, RequestTimeout

PIECE_BYTES = 16 * 2**20  # larger archives are sent in pieces of this size: proxies may buffer a whole body
OUTAGE_S = 120.0  # of failures without any progress, after which the upload fails
STORING_S = 7200.0  # the server may decode a million pictures before it answers
PAUSE_S = 1.0

OnUpload: TypeAlias = Callable[[str], None]
"""Called with the id of a resumable upload as soon as it exists."""

_TUS = {"Tus-Resumable": "1.0.0"}
_RETRIED_CODES = frozenset({"upload_busy", "upload_offset_conflict"})  # a piece arrived, its response did not


class DatasetUpload:
    """The upload of one archive until it is a dataset; `resume` is the id of an earlier upload to continue."""

    def __init__(
        self,
        archive: Archive,
        *,
        name: str | None,
        parent: str | None = None,
        label_column: str | None = None,
        progress: Progress | None = None,
        resume: str | None = None,
        on_upload: OnUpload | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if resume is not None and archive.size is None:
            raise InvalidInput("resume: expected a file or a folder, because a pipe cannot start in its middle")
        self._archive, self._parent, self._label_column = archive, parent, label_column
        self._name = archive.name if name is None and parent is None else name
        self._progress, self._on_upload, self._clock = progress, on_upload, clock
        self._in_pieces = resume is not None or (archive.size or 0) > PIECE_BYTES
        self._id, self._offset = resume, (None if resume else 0)
        self._furthest = -1
        self._failing_since: float | None = None  # time of the first failure since the last progress
        self.dataset: wire.Dataset | None = None

    def call(self) -> Call[Any]:
        """Return the next request."""
        chosen = {"name": self._name, "parent": self._parent, "label_column": self._label_column}
        if not self._in_pieces:
            return upload_dataset(self._archive, **chosen, progress=self._progress)
        if self._id is None:
            return begin(self._size, self._archive.fingerprint)
        if self._offset is None:
            return ask_offset(self._id)
        if self._offset < self._size:
            return piece(self._id, self._offset, *self._body(self._offset))
        return store(self._id, self._archive, **chosen)

    def take(self, result: wire.Dataset | wire.Upload | Reply | int) -> None:
        """Process the last request's result. Raises InvalidInput if `resume` is the upload of another file."""
        if isinstance(result, wire.Dataset):
            self.dataset = result
        elif isinstance(result, wire.Upload):
            self._id = result.id
            self._set_offset(result.offset)
            if self._on_upload:
                self._on_upload(result.id)
        elif isinstance(result, Reply):
            self._check_same(result)
            self._set_offset(_offset_of(result))
        else:
            self._set_offset(result)

    def lost(self, error: LensrackError) -> float:
        """Return the seconds before the next request after a failed one. Raises `error` if a retry cannot help."""
        if not self._in_pieces or self._id is None or not _is_transient(error):
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

    def _set_offset(self, offset: int) -> None:
        if not 0 <= offset <= self._size:
            raise ProtocolError(f"the upload's offset: expected 0 to {self._size}, got {offset}")
        self._offset = offset
        if offset > self._furthest:
            self._furthest, self._failing_since = offset, None
        if self._progress:
            self._progress(offset, self._size)

    def _check_same(self, reply: Reply) -> None:
        length, metadata = reply.headers.get("upload-length"), reply.headers.get("upload-metadata", "")
        if length != str(self._size) or metadata != metadata_of(self._archive.fingerprint):
            raise InvalidInput(
                f"upload {self._id} is of another file: expected {length} bytes with the same start and end, "
                f"got {self._size} bytes"
            )

    def _body(self, offset: int) -> tuple[FileBody, int]:
        def report(sent: int, _: int | None) -> None:
            if self._progress:
                self._progress(offset + sent, self._size)

        count = min(PIECE_BYTES, self._size - offset)
        start = self._archive.start + offset
        return FileBody(self._archive.file, size=count, start=start, progress=report), count


def _is_transient(error: LensrackError) -> bool:
    """Whether the same request may succeed later."""
    if isinstance(error, ApiError):
        return error.status in RETRIED_STATUSES or error.status == 408 or error.code in _RETRIED_CODES
    return isinstance(error, ConnectError | RequestTimeout)


# --- the requests -----------------------------------------------------------------------------------------------------


def begin(length: int, fingerprint: bytes) -> Call[wire.Upload]:
    headers = {**_TUS, "Upload-Length": str(length), "Upload-Metadata": metadata_of(fingerprint)}
    return Call("POST", "/uploads", read_as(wire.Upload), headers=headers)


def ask_offset(upload: str) -> Call[Reply]:
    return Call("HEAD", _upload(upload), lambda reply: reply, headers=_TUS)


def piece(upload: str, offset: int, body: FileBody, count: int) -> Call[int]:
    """Sent once: after a failure the client must first ask the server for its offset."""
    headers = {**_TUS, "Content-Type": "application/offset+octet-stream", "Content-Length": str(count)}
    headers["Upload-Offset"] = str(offset)
    payload = {"stream": body}
    path = _upload(upload)
    return Call("PATCH", path, _offset_of, (), headers, payload, repeatable=False, max_retries=0, transfer=True)


def store(
    upload: str, archive: Archive, *, name: str | None, parent: str | None, label_column: str | None
) -> Call[wire.Dataset]:
    query = {"upload": upload, "name": name, "parent": parent, "label_column": label_column}
    params = [(key, value) for key, value in query.items() if value is not None]

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
