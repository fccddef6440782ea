"""The limits of an archive, and meters of what it really unpacks to."""

from __future__ import annotations

import errno
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Protocol

from backports import zstd

from server.datasets.example import Place
from server.errors import BadRequest

MIB: Final = 2**20
MAX_READ_BYTES: Final = MIB  # of one read, whatever size is requested
DAMAGE: Final = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    zstd.ZstdError,
    lzma.LZMAError,
    struct.error,
    EOFError,
    ValueError,  # UnicodeDecodeError among them
    RuntimeError,  # NotImplementedError, RecursionError
    LookupError,
    OverflowError,
)


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of an archive. `max_ratio` is unpacked over packed bytes, of a member and of all; the first
    `ratio_free_bytes` of either are exempt, because a small flat picture may compress as well as a bomb."""

    max_members: int = 1_000_000
    max_unpacked_bytes: int = 40 * 1024 * MIB
    max_ratio: float = 200.0
    ratio_free_bytes: int = MIB


class Readable(Protocol):
    """What can be read in pieces."""

    def read(self, size: int, /) -> bytes: ...


class Member:
    """One regular file: `path` in parts and the `size` it claims. It can be read until the iterator moves on.
    `place` is its split and label, or why it has none, where its own row says so."""

    __slots__ = ("_file", "path", "place", "size")

    def __init__(self, path: tuple[str, ...], size: int, file: Readable, place: Place | None = None) -> None:
        self.path, self.size, self._file, self.place = path, size, file, place

    @property
    def name(self) -> str:
        return "/".join(self.path)

    def read(self, limit: int) -> bytes:
        """The content, up to `limit` + 1 bytes: one byte beyond the limit means that there is more."""
        return self.take(limit + 1)

    def take(self, size: int) -> bytes:
        """The next `size` bytes; fewer only at the end."""
        with refuse_damage():
            chunks: list[bytes] = []
            left = size
            while left and (chunk := self._file.read(min(left, MAX_READ_BYTES))):
                chunks.append(chunk)
                left -= len(chunk)
            return b"".join(chunks)


class Meter:
    """Counts the bytes that are really unpacked, whatever the headers claim. Raises `BadRequest` beyond the limits."""

    def __init__(self, subject: str, packed_bytes: int, limits: Limits) -> None:
        self._subject, self._limits = subject, limits
        self._ratio_bytes = max(limits.ratio_free_bytes, packed_bytes * limits.max_ratio)
        self.unpacked = 0

    def add(self, size: int) -> None:
        self.unpacked += size
        if self.unpacked > self._limits.max_unpacked_bytes:
            raise too_many_bytes(self._limits)
        if self.unpacked > self._ratio_bytes:
            raise bad_archive(
                f"{self._subject} unpacks to more than {self._limits.max_ratio:g} times its size, as a bomb does"
            )


def too_many_members(max_members: int) -> BadRequest:
    return bad_archive(f"the archive has more than the {max_members:,} members allowed")


def too_many_bytes(limits: Limits) -> BadRequest:
    return bad_archive(f"the archive unpacks to more than the {limits.max_unpacked_bytes:,} bytes allowed")


class MeteredReader:
    """A reader that counts every byte with all its meters, and reads at most MAX_READ_BYTES at once."""

    def __init__(self, file: Readable, *meters: Meter) -> None:
        self._file, self._meters = file, meters

    def read(self, size: int, /) -> bytes:
        data = self._file.read(min(size, MAX_READ_BYTES) if size >= 0 else MAX_READ_BYTES)
        for meter in self._meters:
            meter.add(len(data))
        return data


def bad_archive(detail: str) -> BadRequest:
    return BadRequest(detail, code="bad_archive")


@contextmanager
def refuse_damage() -> Iterator[None]:
    """Turn what the libraries raise on damaged input into `BadRequest` bad_archive. Disk errors pass through."""
    try:
        yield
    except DAMAGE as error:
        raise bad_archive(f"the archive is damaged or truncated ({type(error).__name__})") from error
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):  # None: gzip, bz2; EINVAL: a seek to before the start
            raise
        raise bad_archive(f"the archive is damaged or truncated ({type(error).__name__})") from error
