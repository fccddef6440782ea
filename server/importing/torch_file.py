"""Files that `torch.save` writes, read without torch and without unpickling (see `pickled.py`).

    zip, since torch 1.6       NAME/data.pkl and a member NAME/data/KEY for each storage, all stored as they are
    one stream, before that    pickles: a magic number, a version, the machine, the object, the storages' keys; then
                               each storage: how many numbers (int64), and the numbers
    a plain pickle             of NumPy arrays, without torch

`torch.load(weights_only=True)` reads them as well. It is not used: it looks names up and calls them from a list that
any import may extend, it had to be mended once for running what a file told it to (CVE-2025-32434), it brings every
tensor into memory whatever is wanted of it, and NumPy's arrays need its list to be extended for the whole process.
"""

from __future__ import annotations

import io
import os
import re
import struct
import zipfile
from collections.abc import Callable
from typing import IO, Any, BinaryIO, Final, cast

from . import pickled
from .arrays import CALLS, INERT, KINDS, STORAGES, Storage
from .pickled import Name
from .refusal import refused, shown

MAX_PROGRAM_BYTES: Final = 64 * 2**20  # NumPy arrays lie within the pickle
MAX_DIRECTORY_BYTES: Final = 8 * 2**20
ZIP: Final = b"PK\x03\x04"
STREAM: Final = bytes.fromhex("8002 8a0a 6cfc9c46f9206aa85019")  # protocol 2, a long of ten bytes: torch's magic number
_VERSION: Final = 1001
_DAMAGE: Final = (zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError, LookupError, struct.error)
_KEY: Final = re.compile(r"[0-9]{1,20}")

Reader = Callable[[int, int], bytes]  # first byte, one past the last


def read(file: BinaryIO) -> Any:
    """The object that was saved, of plain values and Arrays. Arrays are read from `file`, which must stay open.

    Raises Unprocessable (bad_checkpoint).
    """
    file.seek(0)
    head = file.read(len(STREAM))
    file.seek(0)
    if head.startswith(ZIP):
        return _read_zip(file)
    return _read_stream(file) if head == STREAM else _program(file, _nothing_outside)


# --- the zip ----------------------------------------------------------------------------------------------------------


def _read_zip(file: BinaryIO) -> Any:
    try:
        archive = zipfile.ZipFile(cast(IO[bytes], _Measured(file)))
    except _DAMAGE as error:
        raise refused(f"expected a file of torch.save, got a damaged zip ({type(error).__name__})") from error
    members = {info.filename: info for info in archive.infolist()}
    programs = [name for name in members if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(programs) != 1:
        raise refused(f"expected a zip of torch.save with one NAME/data.pkl, got {len(programs)} of these")
    root = programs[0].removesuffix("data.pkl")
    if (order := members.get(f"{root}byteorder")) and _member(archive, order, 0, 16) != b"little":
        raise refused("expected a checkpoint of a little-endian machine, got one of another")

    def outside(told: Any) -> Storage:
        kind, key, count = _storage(told)
        info = members.get(f"{root}data/{key}")
        width = KINDS[kind].itemsize
        if info is None or info.file_size != count * width:
            got = "none" if info is None else f"{info.file_size} bytes"
            raise refused(f"storage {key}: expected {count * width} bytes in the zip, got {got}")
        return Storage(kind, count, lambda first, stop: _member(archive, info, first * width, stop * width))

    program = members[programs[0]]
    if program.file_size > MAX_PROGRAM_BYTES:
        raise refused(f"pickle: expected at most {MAX_PROGRAM_BYTES} bytes, got {program.file_size}")
    return _program(io.BytesIO(_member(archive, program, 0, program.file_size)), outside)


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, first: int, stop: int) -> bytes:
    """A part of a member, which lies in the zip as it is: nothing can be larger than the file."""
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 0x41:
        raise refused(f"zip member {shown(info.filename)}: expected it stored, as torch.save does, got it compressed")
    try:
        with archive.open(info) as content:
            content.seek(first)
            return content.read(stop - first)
    except _DAMAGE as error:
        raise refused(f"zip member {shown(info.filename)}: damaged ({type(error).__name__})") from error


class _Measured:
    """The file as zipfile sees it, which reads the directory into memory at once: never more than a few MiB of it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._length = file.seek(0, os.SEEK_END)
        self.seek, self.tell, self.seekable, self.close = file.seek, file.tell, file.seekable, lambda: None

    def read(self, size: int = -1, /) -> bytes:
        return self._file.read(size if 0 <= size <= self._length else MAX_DIRECTORY_BYTES)


# --- the stream -------------------------------------------------------------------------------------------------------


def _read_stream(file: BinaryIO) -> Any:
    places: dict[str, tuple[str, int, int]] = {}  # by key: kind, count, where the numbers begin
    claims: dict[str, tuple[str, int]] = {}

    def outside(told: Any) -> Storage:
        kind, key, count = _storage(told)
        claims[key] = kind, count

        def content(first: int, stop: int) -> bytes:
            _, _, begin = places[key]
            width = KINDS[kind].itemsize
            file.seek(begin + first * width)
            return file.read((stop - first) * width)

        return Storage(kind, count, content)

    _program(file, _nothing_outside)  # the magic number, which brought us here
    if (version := _program(file, _nothing_outside)) != _VERSION:
        raise refused(f"expected version {_VERSION} of torch's stream, got {shown(version)}")
    machine = _program(file, _nothing_outside)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise refused("expected a checkpoint of a little-endian machine, got one of another")
    value, keys = _program(file, outside), _program(file, _nothing_outside)
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(claims):
        raise refused("expected the keys of all storages behind the object, got others")
    end = file.seek(0, os.SEEK_CUR)
    length = file.seek(0, os.SEEK_END)
    for key in keys:
        kind, count, begin = places[str(key)] = _place(file, str(key), end, length, claims[str(key)])
        end = begin + count * KINDS[kind].itemsize
    return value


def _place(file: BinaryIO, key: str, begin: int, length: int, claim: tuple[str, int]) -> tuple[str, int, int]:
    """A storage of a stream: kind, count, and where its numbers begin."""
    kind, count = claim
    file.seek(begin)
    told = file.read(8)
    if len(told) != 8 or int.from_bytes(told, "little") != count or begin + 8 + count * KINDS[kind].itemsize > length:
        raise refused(f"storage {shown(key)}: expected {count} numbers of {kind}, got others or a file cut short")
    return kind, count, begin + 8


# --- both -------------------------------------------------------------------------------------------------------------


def _program(file: BinaryIO, outside: pickled.Persistent) -> Any:
    return pickled.read(file, CALLS, INERT, outside)


def _storage(told: Any) -> tuple[str, str, int]:
    """('storage', type, key, device, count) and, in a stream, whether it is a view of another → kind, key, count."""
    if type(told) is not tuple or len(told) < 5 or told[0] != "storage" or any(part is not None for part in told[5:]):
        raise refused("pickle: expected ('storage', type, key, device, count) as a persistent id, got another")
    _, name, key, _, count = told[:5]
    if not isinstance(name, Name) or name not in STORAGES:
        raise refused(f"storage: expected numbers of up to 8 bytes, got {shown(str(name))}")
    if not isinstance(key, str) or not _KEY.fullmatch(key) or type(count) is not int or not 0 <= count < 2**40:
        raise refused(f"storage: expected a number as its key and a count, got {shown(key)} and {shown(count)}")
    return STORAGES[name], key, count


def _nothing_outside(told: Any) -> Any:
    raise refused("pickle: expected no persistent id here, got one")
