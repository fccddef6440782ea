"""Resumable uploads, below one folder:

    <id>/about        length and the client's metadata: present means that the upload exists
    <id>/data         the bytes received so far; locked while it is written, ingested or deleted
    <id>/dataset      the id of the dataset made of it; kept so that a lost answer can be given again

The length of `data` is the offset. It is reported only after the file has been flushed to the disk, so nothing that was
acknowledged is lost, however the process ends. Uploads that do not change for `expiry_s` are swept.
"""

from __future__ import annotations

import copy
import fcntl
import json
import logging
import os
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from server.clock import WallClock
from server.errors import BadRequest, Conflict, DiskFull, NotFound, QueueFull, TooLarge

from .disk import disk_errors, flock, sync, write
from .formats.member_names import printable

log = logging.getLogger(__name__)

FLUSH_BYTES: Final = 16 * 2**20  # flushed along the way, so that the last flush of a large body is short
MAX_UPLOADS: Final = 1000  # unfinished and not expired: even an empty one costs a folder
MAX_OF_OWNER: Final = 100  # of these, one owner's

_ID: Final = re.compile("[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Upload:
    """`offset` of `length` bytes are on the disk; `expires_at` is in seconds since the epoch."""

    id: str
    length: int
    offset: int
    metadata: str
    expires_at: float


class UploadBusy(Conflict):
    """Another request is writing, ingesting or deleting the upload."""

    code, retry_after_s = "upload_busy", 1.0


class Part:
    """The only writer of an upload. `append` and `close` may be called from different threads."""

    def __init__(self, file: int, length: int) -> None:
        self._file, self._length = file, length
        self.offset = self._flushed = os.fstat(file).st_size
        self._mutex, self._closed = threading.Lock(), False

    def require(self, offset: int, count: int) -> None:
        """Raise Conflict unless the client continues at the upload's offset, TooLarge if beyond its end."""
        if offset != self.offset:
            detail = f"Upload-Offset: expected {self.offset}, the bytes stored so far, got {offset}"
            raise Conflict(detail, code="upload_offset_conflict", expected=self.offset, actual=offset)
        if count > self._length - offset:
            raise self._too_much(count)

    def append(self, data: bytes) -> None:
        """Append to the upload. Raises TooLarge, DiskFull, after writing what fits."""
        with self._mutex, disk_errors():
            if self._closed:
                return  # closed by another thread meanwhile
            fitting = memoryview(data)[: self._length - self.offset]
            over = len(data) - len(fitting)
            while fitting:
                count = os.write(self._file, fitting)
                self.offset, fitting = self.offset + count, fitting[count:]
            if self.offset - self._flushed >= FLUSH_BYTES:
                self._flush()
        if over:
            raise self._too_much(over)

    def close(self) -> int:
        """Flush and release the upload; returns how many bytes are on the disk."""
        with self._mutex:
            self._closed = True
            try:
                with disk_errors():
                    self._flush()
            finally:
                os.close(self._file)
        return self._flushed

    def _flush(self) -> None:
        os.fdatasync(self._file)
        self._flushed = self.offset

    def _too_much(self, count: int) -> TooLarge:
        left = self._length - self.offset
        return TooLarge(f"expected at most the {left} bytes that the upload still lacks, got {count}")


class UploadStore:
    """The uploads below `root`, which is made when absent. Safe for threads and processes."""

    def __init__(self, root: Path, *, max_bytes: int, expiry_s: float, clock: WallClock | None = None) -> None:
        self._root, self._max_bytes, self._expiry_s = root, max_bytes, expiry_s
        self._now = (clock or WallClock()).earliest  # a clock set forward must not expire uploads in progress
        self._owner = ""
        self._storing: set[str] = set()  # uploads that are becoming datasets, in this process
        with disk_errors():
            root.mkdir(parents=True, exist_ok=True)
        self.sweep()

    def scoped(self, owner: str) -> UploadStore:
        """A view of the uploads whose owner begins with `owner`."""
        view = copy.copy(self)
        view._owner = owner
        return view

    def create(self, length: int, metadata: str = "") -> Upload:
        """Begin an upload of `length` bytes. Raises TooLarge, DiskFull, QueueFull too_many_uploads."""
        if length > self._max_bytes:
            raise TooLarge(f"Upload-Length: expected at most {self._max_bytes} bytes, got {length}")
        self.sweep()
        with disk_errors():
            self._require_space(length)
            folder = self._root / secrets.token_hex(16)
            folder.mkdir()
            write(folder / "data", b"")
            write(folder / "about.new", self._about(length, metadata))
            os.replace(folder / "about.new", folder / "about")
            sync(folder)
            sync(self._root)
            return self._read(folder)

    def reserved(self) -> int:
        """The bytes of the unfinished uploads whose owner begins with the view's, as declared when they began."""
        unfinished = (upload for upload in self._unfinished() if upload["owner"].startswith(self._owner))
        return sum(upload["length"] for upload in unfinished)

    def get(self, upload_id: str) -> Upload:
        """The upload's present state. Raises NotFound upload_not_found."""
        with disk_errors():
            return self._read(self._folder(upload_id))

    def open(self, upload_id: str) -> Part:
        """A writer that continues the upload, to be closed. Raises UploadBusy, NotFound, Conflict upload_finished."""
        folder = self._folder(upload_id)
        with disk_errors():
            file = self._lock(folder, os.O_WRONLY | os.O_APPEND)
            try:
                upload = self._read(folder)
                if _is_stored(folder):
                    raise Conflict("the upload has become a dataset already", code="upload_finished")
                return Part(file, upload.length)
            except BaseException:
                os.close(file)
                raise

    def finish(self, upload_id: str, ingest: Callable[[Path], str]) -> str:
        """Pass a complete upload to `ingest`; returns the dataset's id, also when it was finished before.

        Raises Conflict upload_incomplete, UploadBusy, NotFound, and what `ingest` raises. An upload that cannot become
        a dataset is deleted; after any other failure it can be tried again.
        """
        folder = self._folder(upload_id)
        with disk_errors(), self._locked(folder):
            upload = self._read(folder)
            if _is_stored(folder):
                return (folder / "dataset").read_text()
            if upload.offset != upload.length:
                detail = f"the upload has {upload.offset} of its {upload.length} bytes; send the rest first"
                raise Conflict(detail, code="upload_incomplete", expected=upload.length, actual=upload.offset)
            self._storing.add(upload_id)  # the dataset takes its place in `reserved`
            try:
                dataset = ingest(folder / "data")
            except BadRequest:
                _remove(folder)
                raise
            finally:
                self._storing.discard(upload_id)
            self._become(folder, dataset)
            return dataset

    def delete(self, upload_id: str) -> None:
        """Delete the upload. Raises UploadBusy, NotFound."""
        folder = self._folder(upload_id)
        with disk_errors(), self._locked(folder):
            self._read(folder)
            _remove(folder)

    def sweep(self) -> None:
        """Delete expired uploads, and what a dead process left of one that it was creating or deleting."""
        swept = 0
        with disk_errors():
            for folder in self._root.iterdir():
                with suppress(FileNotFoundError, UploadBusy, NotFound):
                    if self._expires_at(folder) <= self._now():
                        self._delete_expired(folder)
                        swept += 1
        if swept:
            log.info("deleted %d expired uploads", swept)

    # --- one upload -------------------------------------------------------------------------------------------------

    def _folder(self, upload_id: str) -> Path:
        """Another owner's upload looks as if it did not exist; not even that it is busy shows."""
        if not _ID.fullmatch(upload_id):
            raise _no_upload(upload_id)
        folder = self._root / upload_id
        if self._owner:
            with disk_errors():
                self._read(folder)
        return folder

    def _about(self, length: int, metadata: str) -> bytes:
        return json.dumps({"length": length, "metadata": metadata, "owner": self._owner}).encode()

    def _read(self, folder: Path) -> Upload:
        """The upload's state; the offset counts flushed bytes only, also while a request writes."""
        try:
            about: dict[str, Any] = json.loads((folder / "about").read_text())
            if not about.get("owner", "").startswith(self._owner):
                raise _no_upload(folder.name)
            expires_at = self._expires_at(folder)
            offset = about["length"] if _is_stored(folder) else _flushed_size(folder / "data")
        except FileNotFoundError:
            raise _no_upload(folder.name) from None
        if expires_at <= self._now():
            raise _no_upload(folder.name)
        return Upload(folder.name, about["length"], offset, about["metadata"], expires_at)

    def _expires_at(self, folder: Path) -> float:
        """When the upload expires: `expiry_s` after its last byte, or after its folder changed where it has no data."""
        try:
            touched = os.stat(folder / "data").st_mtime
        except FileNotFoundError:
            touched = os.stat(folder).st_mtime
        return touched + self._expiry_s

    @contextmanager
    def _locked(self, folder: Path) -> Iterator[None]:
        file = self._lock(folder, os.O_RDONLY)
        try:
            yield
        finally:
            os.close(file)

    def _lock(self, folder: Path, flags: int) -> int:
        try:
            return flock(folder / "data", flags, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            raise _no_upload(folder.name) from None
        except BlockingIOError:
            raise UploadBusy("the upload is being written or stored by another request") from None

    def _become(self, folder: Path, dataset: str) -> None:
        """Record the dataset. The data file stays, empty, since it carries the lock."""
        write(folder / "dataset", dataset.encode())
        sync(folder)
        os.truncate(folder / "data", 0)

    def _delete_expired(self, folder: Path) -> None:
        if not (folder / "data").exists():
            _remove(folder)
            return
        with self._locked(folder):
            if self._expires_at(folder) <= self._now():  # no request wrote between looking and locking
                _remove(folder)

    def _require_space(self, length: int) -> None:
        if length > shutil.disk_usage(self._root).free:
            raise DiskFull(f"an upload of {length} bytes does not fit on the datasets' disk")
        owners = [upload["owner"] for upload in self._unfinished()]
        for count, most in ((owners.count(self._owner), MAX_OF_OWNER), (len(owners), MAX_UPLOADS)):
            if count >= most:
                detail = f"{most} uploads are in progress; finish or delete some of them"
                raise QueueFull(detail, code="too_many_uploads", retry_after_s=60.0)

    def _unfinished(self) -> Iterator[dict[str, Any]]:
        """The records of all owners' uploads that are not datasets yet."""
        with disk_errors():
            for folder in self._root.iterdir():
                with suppress(FileNotFoundError):  # deleted meanwhile
                    if not _is_stored(folder) and folder.name not in self._storing:
                        yield {"owner": "", **json.loads((folder / "about").read_text())}


def _is_stored(folder: Path) -> bool:
    return (folder / "dataset").exists()


def _flushed_size(path: Path) -> int:
    file = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(file).st_size
        os.fdatasync(file)
    finally:
        os.close(file)
    return size


def _remove(folder: Path) -> None:
    """Delete an upload; without `about` it no longer exists, even if the rest is interrupted."""
    (folder / "about").unlink(missing_ok=True)
    shutil.rmtree(folder)


def _no_upload(upload_id: str) -> NotFound:
    return NotFound(f"there is no upload {printable(upload_id, 40)!r}; it may have expired", code="upload_not_found")
