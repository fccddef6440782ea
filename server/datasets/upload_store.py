"""Uploads that outlive their connection, below one folder:

    <id>/about        length and what the client says of it: present means that the upload exists
    <id>/data         what has come so far; locked while it is written, ingested or deleted
    <id>/dataset      what it has become; kept so that an answer that was lost can be given again

The length of `data` is the offset. It is told only after the file has been flushed to the disk, so nothing that was
acknowledged is lost, whatever ends the process. What nobody has touched for `expiry_s` is swept.
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

from .disk import disk, flock, sync, write
from .formats.member_names import shown

log = logging.getLogger(__name__)

FLUSH_BYTES: Final = 16 * 2**20  # so that the last flush of a large body has little left to do
MAX_UPLOADS: Final = 1000  # begun and not expired: each costs a folder, even an empty one

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
    """Somebody else is writing, ingesting or deleting the upload."""

    code, retry_after_s = "upload_busy", 1.0


class Part:
    """The one writer of an upload. Appending and closing may come from different threads."""

    def __init__(self, file: int, length: int) -> None:
        self._file, self._length = file, length
        self.offset = self._flushed = os.fstat(file).st_size
        self._mutex, self._closed = threading.Lock(), False

    def require(self, offset: int, count: int) -> None:
        """The client must go on where the upload stands and not beyond its end. Raises Conflict, TooLarge."""
        if offset != self.offset:
            detail = f"Upload-Offset: expected {self.offset}, where the upload stands, got {offset}"
            raise Conflict(detail, code="upload_offset_conflict", expected=self.offset, actual=offset)
        if count > self._length - offset:
            raise self._too_much(count)

    def append(self, data: bytes) -> None:
        """Raises TooLarge, DiskFull; what fitted has been written by then."""
        with self._mutex, disk():
            if self._closed:
                return  # a writer that was given up while this thread was on its way
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
        """Let go; how many bytes are on the disk."""
        with self._mutex:
            self._closed = True
            try:
                with disk():
                    self._flush()
            finally:
                os.close(self._file)
        return self._flushed

    def _flush(self) -> None:
        os.fdatasync(self._file)
        self._flushed = self.offset

    def _too_much(self, count: int) -> TooLarge:
        left = self._length - self.offset
        return TooLarge(f"expected at most the {left} bytes that are left of the upload, got {count}")


class UploadStore:
    """The uploads below `root`, which is made when absent. Safe for threads and processes."""

    def __init__(self, root: Path, *, max_bytes: int, expiry_s: float, clock: WallClock | None = None) -> None:
        self._root, self._max_bytes, self._expiry_s = root, max_bytes, expiry_s
        self._now = (clock or WallClock()).earliest  # a clock set forward must not end what is under way
        self._owner = ""
        with disk():
            root.mkdir(parents=True, exist_ok=True)
        self.sweep()

    def of(self, owner: str) -> UploadStore:
        """The same uploads as who stores under this prefix is to have them: only those of owners that begin with it."""
        own = copy.copy(self)
        own._owner = owner
        return own

    def create(self, length: int, metadata: str = "") -> Upload:
        """Raises TooLarge, DiskFull, QueueFull too_many_uploads."""
        if length > self._max_bytes:
            raise TooLarge(f"Upload-Length: expected at most {self._max_bytes} bytes, got {length}")
        self.sweep()
        with disk():
            self._require_space(length)
            folder = self._root / secrets.token_hex(16)
            folder.mkdir()
            write(folder / "data", b"")
            write(folder / "about.new", self._about(length, metadata))
            os.replace(folder / "about.new", folder / "about")
            sync(folder)
            sync(self._root)
            return self._read(folder)

    def get(self, upload_id: str) -> Upload:
        """As it stands. Raises NotFound upload_not_found."""
        with disk():
            return self._read(self._folder(upload_id))

    def open(self, upload_id: str) -> Part:
        """To write more of it; to be closed. Raises UploadBusy, NotFound, Conflict upload_finished."""
        folder = self._folder(upload_id)
        with disk():
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
        """Hand a whole upload to `ingest`; the id of the dataset that it became, now or when this was asked before.

        Raises Conflict upload_incomplete, UploadBusy, NotFound, and what `ingest` raises. An upload that cannot become
        a dataset is deleted; after any other failure it can be tried again.
        """
        folder = self._folder(upload_id)
        with disk(), self._locked(folder):
            upload = self._read(folder)
            if _is_stored(folder):
                return (folder / "dataset").read_text()
            if upload.offset != upload.length:
                detail = f"the upload has {upload.offset} of its {upload.length} bytes; send the others first"
                raise Conflict(detail, code="upload_incomplete", expected=upload.length, actual=upload.offset)
            try:
                dataset = ingest(folder / "data")
            except BadRequest:
                _remove(folder)
                raise
            self._become(folder, dataset)
            return dataset

    def delete(self, upload_id: str) -> None:
        """Raises UploadBusy, NotFound."""
        folder = self._folder(upload_id)
        with disk(), self._locked(folder):
            self._read(folder)
            _remove(folder)

    def sweep(self) -> None:
        """Delete what nobody has touched for `expiry_s`, and what a process that died left of a beginning or an end."""
        swept = 0
        with disk():
            for folder in self._root.iterdir():
                with suppress(FileNotFoundError, UploadBusy, NotFound):
                    if self._expires_at(folder) <= self._now():
                        self._delete_expired(folder)
                        swept += 1
        if swept:
            log.info("swept %d uploads that nobody went on with", swept)

    # --- one upload -------------------------------------------------------------------------------------------------

    def _folder(self, upload_id: str) -> Path:
        """Somebody else's upload is not told of, not even that it is busy."""
        if not _ID.fullmatch(upload_id):
            raise _no_upload(upload_id)
        folder = self._root / upload_id
        if self._owner:
            with disk():
                self._read(folder)
        return folder

    def _about(self, length: int, metadata: str) -> bytes:
        return json.dumps({"length": length, "metadata": metadata, "owner": self._owner}).encode()

    def _read(self, folder: Path) -> Upload:
        """What is told of an upload is on the disk, also while somebody writes."""
        try:
            told: dict[str, Any] = json.loads((folder / "about").read_text())
            if not told.get("owner", "").startswith(self._owner):
                raise _no_upload(folder.name)
            expires_at = self._expires_at(folder)
            offset = told["length"] if _is_stored(folder) else _flushed_size(folder / "data")
        except FileNotFoundError:
            raise _no_upload(folder.name) from None
        if expires_at <= self._now():
            raise _no_upload(folder.name)
        return Upload(folder.name, told["length"], offset, told["metadata"], expires_at)

    def _expires_at(self, folder: Path) -> float:
        """From the last byte that came; from its beginning or end where there are none."""
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
        """The data stays as an empty file, since it is what is locked."""
        write(folder / "dataset", dataset.encode())
        sync(folder)
        os.truncate(folder / "data", 0)

    def _delete_expired(self, folder: Path) -> None:
        if not (folder / "data").exists():
            _remove(folder)
            return
        with self._locked(folder):
            if self._expires_at(folder) <= self._now():  # nobody came between looking and locking
                _remove(folder)

    def _require_space(self, length: int) -> None:
        if length > shutil.disk_usage(self._root).free:
            raise DiskFull(f"an upload of {length} bytes does not fit on the disk with the datasets")
        if sum(1 for _ in self._root.iterdir()) >= MAX_UPLOADS:
            detail = f"{MAX_UPLOADS} uploads have been begun; end or delete some of them"
            raise QueueFull(detail, code="too_many_uploads", retry_after_s=60.0)


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
    """Without `about` it is no upload any more, however far the rest gets."""
    (folder / "about").unlink(missing_ok=True)
    shutil.rmtree(folder)


def _no_upload(upload_id: str) -> NotFound:
    return NotFound(f"there is no upload {shown(upload_id, 40)!r}, or no longer", code="upload_not_found")
