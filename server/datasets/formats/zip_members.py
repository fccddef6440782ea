"""The members of a zip archive, as its central directory lists them."""

from __future__ import annotations

import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, BinaryIO, Final, cast

from .member_names import Names, is_litter, parts_of, printable
from .metering import (
    MIB,
    Limits,
    Member,
    Meter,
    MeteredReader,
    bad_archive,
    refuse_damage,
    too_many_bytes,
    too_many_members,
)

DIRECTORY_BYTES: Final = 512  # of the directory for each member: an entry is 46 bytes and a name
CENTRAL_ENTRY: Final = b"PK\x01\x02"  # begins every entry of the directory
LOCAL_HEADER_BYTES: Final = 30
UTF8_FLAG: Final = 0x800  # general purpose bit 11
UNICODE_PATH: Final = 0x7075

_FIELD: Final = struct.Struct("<HH")  # of the extra field: kind, bytes
_UNICODE_PATH: Final = struct.Struct("<BI")  # version, CRC-32 of the name that it replaces


class _Directory:
    """A file for zipfile, which reads the whole directory into memory: size checked before, entries after."""

    def __init__(self, file: BinaryIO, max_members: int) -> None:
        self._file, self._max_members = file, max_members
        self._allowed = MIB + max_members * DIRECTORY_BYTES
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable
        self.opening = True

    def read(self, size: int = -1, /) -> bytes:
        if self.opening and size > self._allowed:
            raise bad_archive(f"the zip's directory claims {size:,} bytes; at most {self._allowed:,} are allowed")
        data = self._file.read(size if size >= 0 else self._allowed)  # zipfile reads without a size for the last 64 KiB
        if self.opening and data.count(CENTRAL_ENTRY) > self._max_members:
            raise too_many_members(self._max_members)
        return data


def zip_members(file: BinaryIO, limits: Limits, names: Names) -> Iterator[Member]:
    """The files of a zip archive in the order of its directory. Raises `BadRequest` bad_archive."""
    packed_bytes = file.seek(0, os.SEEK_END)
    directory = _Directory(file, limits.max_members)
    with refuse_damage():
        archive = zipfile.ZipFile(cast(IO[bytes], directory))
    directory.opening = False
    with archive:
        _check_directory(archive.infolist(), packed_bytes, limits)
        total = Meter("the archive", packed_bytes, limits)
        for info in archive.infolist():
            names.count()
            name = member_name(info)
            path = _zip_path(info, name)
            if name.endswith("/") or is_litter(path):
                continue
            names.add(path)
            meter = Meter(f"the archive's member {printable(name)!r}", info.compress_size, limits)
            with _opened(archive, info) as content:
                yield Member(path, info.file_size, MeteredReader(content, meter, total))


@contextmanager
def _opened(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[IO[bytes]]:
    with refuse_damage():
        content = archive.open(info)
    with content:
        yield content


def member_name(info: zipfile.ZipInfo) -> str:
    """The name that the writer meant, with `/` between folders; bytes that are not UTF-8 become surrogates.

    A name is UTF-8 where bit 11 says so or the Unicode path field is there (APPNOTE.TXT 4.6.9), else cp437. But
    Info-ZIP and macOS write UTF-8 without either, and Windows tools write backslashes.
    """
    name = info.orig_filename  # zipfile cuts `filename` at a NUL
    if not info.flag_bits & UTF8_FLAG:
        raw = name.encode("cp437")  # the bytes as they are: zipfile has decoded them by this code page
        name = (_unicode_path(info.extra, raw) or raw).decode("utf-8", "surrogateescape")
    return name.replace("\\", "/")


def _unicode_path(extra: bytes, raw: bytes) -> bytes:
    """The name in the Unicode path field; empty where there is none, or where it belongs to another name than `raw`."""
    at = 0
    while at + _FIELD.size <= len(extra):
        kind, size = _FIELD.unpack_from(extra, at)
        at += _FIELD.size
        content = extra[at : at + size]
        if kind == UNICODE_PATH and size > _UNICODE_PATH.size <= len(content):
            version, crc = _UNICODE_PATH.unpack_from(content)
            return content[_UNICODE_PATH.size :] if version == 1 and crc == zlib.crc32(raw) else b""
        at += size
    return b""


def _zip_path(info: zipfile.ZipInfo, full_name: str) -> tuple[str, ...]:
    path, name = parts_of(full_name), printable(full_name)
    if info.flag_bits & 0x41:
        raise bad_archive(f"the archive's member {name!r} is encrypted")
    if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise bad_archive(f"the archive's member {name!r} is a link or a device; only files and folders are accepted")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise bad_archive(f"the archive's member {name!r} uses zip method {info.compress_type}; expected 0 or 8")
    return path


def _check_directory(infos: list[zipfile.ZipInfo], packed_bytes: int, limits: Limits) -> None:
    """Refuse members that overlap, which make the densest bombs (D. Fifield, A better zip bomb, 2019)."""
    end = packed_bytes
    for info in sorted(infos, key=lambda info: info.header_offset, reverse=True):
        if info.header_offset + LOCAL_HEADER_BYTES + info.compress_size > end:
            raise bad_archive(
                f"the archive's member {printable(member_name(info))!r} overlaps another, or the archive is truncated"
            )
        end = info.header_offset
    if sum(info.file_size for info in infos) > limits.max_unpacked_bytes:
        raise too_many_bytes(limits)
