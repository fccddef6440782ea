"""Makes a request body of a local dataset: a folder is packed into a temporary zip, an archive is sent unchanged.

source ── open_archive ──> Archive(file, bytes, content type, skipped) ── FileBody ──> the connection
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeAlias

import anyio.to_thread
import httpx

from .errors import InvalidInput
from .wire import Dataset, SkippedFile

Progress: TypeAlias = Callable[[int, int | None], None]
"""Called with (bytes sent, total bytes); the total is None where the source has no known size."""

Source: TypeAlias = str | os.PathLike[str] | IO[bytes]

CHUNK_BYTES = 256 * 1024
_HEAD_BYTES = 512  # one tar header
_SUFFIXES = (
    ".gz", ".zst", ".bz2", ".xz", ".tgz", ".tzst", ".tbz2", ".tbz", ".txz", ".tar", ".zip", ".npz", ".parquet"
)  # fmt: skip


class FileBody(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body read from a file in chunks; every attempt starts again at `start`.

    A pipe has no size and cannot start again: `head` holds the bytes already read from it.
    """

    def __init__(
        self, file: IO[bytes], *, size: int | None, start: int = 0, head: bytes = b"", progress: Progress | None = None
    ) -> None:
        self._file, self._size, self._start, self._head, self._progress = file, size, start, head, progress

    def __iter__(self) -> Iterator[bytes]:
        sent = self._begin()
        while chunk := self._read(sent):
            yield chunk
            sent = self._report(sent + len(chunk))
        self._check_end(sent)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        sent = self._begin()
        while chunk := await anyio.to_thread.run_sync(self._read, sent):
            yield chunk
            sent = self._report(sent + len(chunk))
        self._check_end(sent)

    def _begin(self) -> int:
        if self._size is not None:
            self._file.seek(self._start)
        return self._report(0)

    def _read(self, sent: int) -> bytes:
        """Read at most a chunk, and no more in total than the announced size, should the file grow."""
        if self._size is not None:
            return self._file.read(min(CHUNK_BYTES, self._size - sent))
        head, self._head = self._head, b""
        return head or self._file.read(CHUNK_BYTES)

    def _report(self, sent: int) -> int:
        if self._progress:
            self._progress(sent, self._size)
        return sent

    def _check_end(self, sent: int) -> None:
        if self._size is not None and sent < self._size:
            raise InvalidInput(f"the file shrank while it was sent: expected {self._size} bytes, got {sent}")


@dataclass(frozen=True)
class Archive:
    """An open archive. `size` in bytes is None for a pipe, which can be sent only once.

    `fingerprint` distinguishes it from another file of the same size.
    """

    file: IO[bytes]
    size: int | None
    name: str
    content_type: str
    start: int = 0
    head: bytes = b""
    owned: bool = True
    skipped: tuple[SkippedFile, ...] = ()
    fingerprint: bytes = b""

    def body(self, progress: Progress | None) -> FileBody:
        return FileBody(self.file, size=self.size, start=self.start, head=self.head, progress=progress)

    def complete(self, dataset: Dataset) -> Dataset:
        """Return the server's dataset, with the files that were not sent added to `skipped`."""
        return dataset.model_copy(update={"skipped": [*self.skipped, *dataset.skipped]})

    def close(self) -> None:
        if self.owned:
            self.file.close()


def open_archive(source: Source) -> Archive:
    """Open a folder of class folders, a file (zip, tar, tar.gz, …, parquet, npz) or a binary file object.

    Raises InvalidInput.
    """
    if not isinstance(source, str | os.PathLike):
        return _from_file(source, owned=False)
    path = Path(source)
    if path.is_dir():
        return _from_folder(path)
    try:
        file = path.open("rb")
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror or error}") from error
    with _closed_on_error(file):
        return _from_file(file, owned=True)


def _from_folder(folder: Path) -> Archive:
    file = tempfile.TemporaryFile(prefix="lensrack-")  # noqa: SIM115 - the Archive owns and closes it
    with _closed_on_error(file):
        skipped = pack(folder, file)
        size, name, kind = file.tell(), folder.resolve().name, "application/zip"
        fingerprint = _fingerprint(file, 0, size)
        return Archive(file, size, name, kind, skipped=tuple(skipped), fingerprint=fingerprint)


def _from_file(file: IO[bytes], *, owned: bool) -> Archive:
    filename = _filename(file)
    name = _without_suffix(filename)
    if not file.seekable():
        head = file.read(_HEAD_BYTES)
        return Archive(file, None, name, _content_type(head, filename), head=head, owned=owned)
    start, end = file.tell(), file.seek(0, os.SEEK_END)
    file.seek(start)
    kind = _content_type(file.read(_HEAD_BYTES), filename)
    fingerprint = _fingerprint(file, start, end)
    return Archive(file, end - start, name, kind, start=start, owned=owned, fingerprint=fingerprint)


def _fingerprint(file: IO[bytes], start: int, end: int) -> bytes:
    """Hash both ends: a zip has the checksums of its members at its end, a tar.gz the checksum of the whole."""
    digest = hashlib.sha256(str(end - start).encode())
    for position in (start, max(start, end - CHUNK_BYTES)):
        file.seek(position)
        digest.update(file.read(CHUNK_BYTES))
    return digest.digest()


def _without_suffix(filename: str) -> str:
    for suffix in _SUFFIXES:
        filename = filename.removesuffix(suffix)
    return filename


def _filename(file: IO[bytes]) -> str:
    """Return a file's name, or an empty string: pipes are named by a number, stdin "<stdin>"."""
    name = getattr(file, "name", "")
    return Path(name).name if isinstance(name, str) and not name.startswith("<") else ""


@contextmanager
def _closed_on_error(file: IO[bytes]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        file.close()
        raise


def _content_type(head: bytes, name: str) -> str:
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "application/zip"
    if head.startswith(b"\x1f\x8b"):
        return "application/gzip"
    if head.startswith(b"\x28\xb5\x2f\xfd") or head[1:4] == b"\x2a\x4d\x18":
        return "application/zstd"
    if head.startswith(b"PAR1"):
        return "application/vnd.apache.parquet"
    if head.startswith((b"BZh", b"\xfd7zXZ\0")):
        return "application/octet-stream"  # bzip2 and xz have no registered type; the server looks at the content
    if head[257:262] == b"ustar" or name.endswith(".tar"):
        return "application/x-tar"
    raise InvalidInput(
        f"{name or 'the source'} is not an archive: expected a folder, zip, tar, tar.gz, tar.zst, tar.bz2, tar.xz, "
        "parquet or npz"
    )


def pack(folder: Path, out: IO[bytes]) -> list[SkippedFile]:
    """Write a folder's files into an uncompressed zip, for pictures are compressed already; return the skipped links.

    Hidden files are left out without mention. Equal content gives equal bytes, whatever the files' dates.
    """
    skipped: list[SkippedFile] = []
    packed = 0
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for entry, name in _entries(folder, ""):
            if entry.is_symlink():
                skipped.append(SkippedFile(name=name, reason="a link; links are not followed"))
            elif entry.is_file(follow_symlinks=False):
                _add(archive, entry.path, name)
                packed += 1
    if not packed:
        raise InvalidInput(f"{folder} holds no files: expected a folder of class folders with images")
    return skipped


def _entries(folder: str | Path, prefix: str) -> Iterator[tuple[os.DirEntry[str], str]]:
    with os.scandir(folder) as scan:
        entries = sorted((entry for entry in scan if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _entries(entry.path, f"{prefix}{entry.name}/")
        else:
            yield entry, prefix + entry.name


def _add(archive: zipfile.ZipFile, path: str, name: str) -> None:
    if "\\" in name:  # readers of zips take it for a folder, and a class would lose a part of its name
        raise InvalidInput(f"the file name {name!r} contains a backslash; rename the file or its folder")
    try:
        member = zipfile.ZipInfo(name)  # dated 1980, the format's first day
        member.file_size = os.path.getsize(path)  # tells the writer whether it needs zip64
        with open(path, "rb") as source, archive.open(member, "w") as target:
            while chunk := source.read(CHUNK_BYTES):
                target.write(chunk)
    except UnicodeEncodeError as error:
        raise InvalidInput(f"the file name {name!r} is not valid text; rename the file") from error
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror or error}") from error
