"""The members of a tar archive, plain or compressed, in one pass forward."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import tarfile
from collections.abc import Iterator
from typing import IO, BinaryIO, Final, Self, cast

from backports import zstd

from .member_names import Names, is_litter, parts_of, printable
from .metering import (
    MAX_READ_BYTES,
    Limits,
    Member,
    Meter,
    MeteredReader,
    Readable,
    bad_archive,
    refuse_damage,
    too_many_bytes,
)

BLOCK: Final = 512
MAX_HEADER_BYTES: Final = 64 * 1024  # of one extended header; tarfile reads all of it into memory
MAX_XZ_MEMORY: Final = 160 * 2**20  # `xz -9` needs 65 MiB; a dictionary as large as a zstd window fits
MAX_WINDOW_LOG: Final = 27  # 128 MiB, the zstd tool's default; a frame may demand 2 GiB
PLAIN: Final = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.DIRTYPE)
EXTENDED: Final = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


class _TarHeader(tarfile.TarInfo):
    """A header that is checked before tarfile acts on it; tarfile takes a damaged header for the archive's end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        if len(buf) < BLOCK:
            raise bad_archive("the tar archive is truncated: it has no end mark")
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if not any(buf):
                raise  # the end mark
            raise bad_archive("the tar archive is damaged: it has a header with a wrong checksum") from error
        header.check()
        return header

    def check(self) -> None:
        name = printable(self.name)
        if self.type in EXTENDED and self.size > MAX_HEADER_BYTES:
            raise bad_archive(f"a tar header has {self.size:,} bytes; at most {MAX_HEADER_BYTES:,} are allowed")
        if self.islnk() or self.issym():
            raise bad_archive(f"the archive's member {name!r} is a link; only files and folders are accepted")
        if self.type not in PLAIN and self.type not in EXTENDED:
            kinds = "a device, a pipe or a sparse file"
            raise bad_archive(f"the archive's member {name!r} is {kinds}; only files and folders are accepted")
        if self.size < 0:
            raise bad_archive(f"the archive's member {name!r} claims {self.size} bytes")


def tar_members(file: BinaryIO, limits: Limits, names: Names, kind: str) -> Iterator[Member]:
    """The files of a tar archive in their order. Raises `BadRequest` bad_archive."""
    packed_bytes = file.seek(0, os.SEEK_END)
    file.seek(0)
    stream = MeteredReader(_unpacked(file, kind), Meter("the archive", packed_bytes, limits))
    with refuse_damage():
        archive = tarfile.open(  # noqa: SIM115  # closed by the `with` outside of `refuse_damage`
            fileobj=cast(IO[bytes], stream), mode="r|", tarinfo=_TarHeader, encoding="utf-8", errors="surrogateescape"
        )
    with archive:
        for info in _tar_headers(archive):
            names.count()
            path = parts_of(info.name)
            if info.issparse():
                raise bad_archive(f"the archive's member {printable(info.name)!r} is a sparse file")
            if info.size > limits.max_unpacked_bytes:
                raise too_many_bytes(limits)
            if info.isdir() or is_litter(path):
                continue
            names.add(path)
            content = archive.extractfile(info)
            if content is not None:
                yield Member(path, info.size, content)
    _drain(stream)


def _unpacked(file: BinaryIO, kind: str) -> Readable:
    if kind == "tar.gz":
        return gzip.GzipFile(fileobj=file, mode="rb")
    if kind == "tar.zst":
        return zstd.ZstdFile(file, options={zstd.DecompressionParameter.window_log_max: MAX_WINDOW_LOG})
    if kind == "tar.bz2":
        return bz2.BZ2File(file)
    if kind == "tar.xz":
        return _XzReader(file)
    return file


class _XzReader:
    """Reads the streams of an xz file with bounded memory, which `lzma.LZMAFile` cannot: a header may demand 4 GiB."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._packed = file, b""
        self._stream = self._new_stream()

    def read(self, size: int, /) -> bytes:
        while True:
            if self._stream.eof and not self._next_stream():
                return b""
            if self._stream.needs_input and not self._packed:
                self._packed = self._file.read(MAX_READ_BYTES)
                if not self._packed:
                    raise EOFError("an xz stream without its end")
            data = self._stream.decompress(self._packed, size)
            self._packed = b""
            if data:
                return data

    def _next_stream(self) -> bool:
        """Whether another stream follows, after zeros of padding (xz file format 1.2.1, 2.2)."""
        self._packed = self._stream.unused_data.lstrip(b"\0")
        while not self._packed and (more := self._file.read(MAX_READ_BYTES)):
            self._packed = more.lstrip(b"\0")
        self._stream = self._new_stream() if self._packed else self._stream
        return bool(self._packed)

    @staticmethod
    def _new_stream() -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MAX_XZ_MEMORY)


def _tar_headers(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The headers, by `next` instead of iteration, which would keep all of them in memory."""
    while True:
        with refuse_damage():
            info = archive.next()
        if info is None:
            return
        yield info
        archive.members = []  # type: ignore[attr-defined]  # typeshed lacks this list


def _drain(stream: MeteredReader) -> None:
    """Read to the end, so that the compressions verify their checksums."""
    with refuse_damage():
        while stream.read(MAX_READ_BYTES):
            pass
