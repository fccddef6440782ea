"""Reads files of `torch.save` without torch and without unpickling (see `pickled.py`).

    zip, since torch 1.6       NAME/data.pkl and a member NAME/data/KEY for each storage, all uncompressed
    one stream, before that    pickles: a magic number, a version, the machine, the object, the storages' keys; then
                               each storage: how many numbers (int64), and the numbers
    a plain pickle             of NumPy arrays, without torch

`torch.load(weights_only=True)` is not used, for four reasons: it resolves and calls names from a list that any import
may extend; it once ran code from a file (CVE-2025-32434); it loads every tensor into memory; and NumPy arrays need its
list to be extended for the whole process.
"""

from __future__ import annotations

import io
import os
import re
import struct
import zipfile
from typing import IO, Any, BinaryIO, Final, cast

from . import pickled
from .arrays import CALLS, INERT, KINDS, STORAGES, Storage
from .pickled import Name
from .refusal import quoted, refusal

MAX_PROGRAM_BYTES: Final = 64 * 2**20  # NumPy arrays are inside the pickle
MAX_DIRECTORY_BYTES: Final = 8 * 2**20
ZIP: Final = b"PK\x03\x04"
STREAM: Final = bytes.fromhex("8002 8a0a 6cfc9c46f9206aa85019")  # protocol 2; torch's magic number, ten bytes
_VERSION: Final = 1001
_DAMAGE: Final = (zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError, LookupError, struct.error)
_KEY: Final = re.compile(r"[0-9]{1,20}")


def read(file: BinaryIO) -> Any:
    """The saved object, of plain values and Arrays. `file` must stay open while arrays are read.

    Raises Unprocessable bad_checkpoint.
    """
    file.seek(0)
    head = file.read(len(STREAM))
    file.seek(0)
    if head.startswith(ZIP):
        return _read_zip(file)
    return _read_stream(file) if head == STREAM else _program(file, _no_persistent)


# --- the zip ----------------------------------------------------------------------------------------------------------


def _read_zip(file: BinaryIO) -> Any:
    try:
        archive = zipfile.ZipFile(cast(IO[bytes], _BoundedFile(file)))
    except _DAMAGE as error:
        raise refusal(f"expected a file of torch.save, got a damaged zip ({type(error).__name__})") from error
    members = {info.filename: info for info in archive.infolist()}
    programs = [name for name in members if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(programs) != 1:
        raise refusal(f"expected a zip of torch.save with one NAME/data.pkl, got {len(programs)}")
    root = programs[0].removesuffix("data.pkl")
    if (order := members.get(f"{root}byteorder")) and _member(archive, order, 0, 16) != b"little":
        raise refusal("expected a checkpoint of a little-endian machine, got a big-endian one")

    def resolve(persistent_id: Any) -> Storage:
        kind, key, count = _storage(persistent_id)
        info = members.get(f"{root}data/{key}")
        width = KINDS[kind].itemsize
        if info is None or info.file_size != count * width:
            got = "none" if info is None else f"{info.file_size} bytes"
            raise refusal(f"storage {key}: expected {count * width} bytes in the zip, got {got}")
        return Storage(kind, count, lambda first, stop: _member(archive, info, first * width, stop * width))

    program = members[programs[0]]
    if program.file_size > MAX_PROGRAM_BYTES:
        raise refusal(f"pickle: expected at most {MAX_PROGRAM_BYTES} bytes, got {program.file_size}")
    return _program(io.BytesIO(_member(archive, program, 0, program.file_size)), resolve)


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, first: int, stop: int) -> bytes:
    """Bytes first … stop - 1 of a member, which must be uncompressed: so it is never larger than the file."""
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 0x41:
        raise refusal(
            f"zip member {quoted(info.filename)}: expected it uncompressed, as torch.save writes it, got it compressed"
        )
    try:
        with archive.open(info) as content:
            content.seek(first)
            return content.read(stop - first)
    except _DAMAGE as error:
        raise refusal(f"zip member {quoted(info.filename)}: damaged ({type(error).__name__})") from error


class _BoundedFile:
    """A file for zipfile, which reads the whole directory into memory: at most MAX_DIRECTORY_BYTES of it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._length = file.seek(0, os.SEEK_END)
        self.seek, self.tell, self.seekable, self.close = file.seek, file.tell, file.seekable, lambda: None

    def read(self, size: int = -1, /) -> bytes:
        return self._file.read(size if 0 <= size <= self._length else MAX_DIRECTORY_BYTES)


# --- the stream -------------------------------------------------------------------------------------------------------


def _read_stream(file: BinaryIO) -> Any:
    places: dict[str, tuple[str, int, int]] = {}  # by key: kind, count, position of the numbers (bytes)
    claims: dict[str, tuple[str, int]] = {}

    def resolve(persistent_id: Any) -> Storage:
        kind, key, count = _storage(persistent_id)
        claims[key] = kind, count

        def content(first: int, stop: int) -> bytes:
            _, _, begin = places[key]
            width = KINDS[kind].itemsize
            file.seek(begin + first * width)
            return file.read((stop - first) * width)

        return Storage(kind, count, content)

    _program(file, _no_persistent)  # the magic number
    if (version := _program(file, _no_persistent)) != _VERSION:
        raise refusal(f"expected version {_VERSION} of torch's stream, got {quoted(version)}")
    machine = _program(file, _no_persistent)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise refusal("expected a checkpoint of a little-endian machine, got a big-endian one")
    value, keys = _program(file, resolve), _program(file, _no_persistent)
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(claims):
        raise refusal("expected the keys of all storages after the object, got others")
    end = file.seek(0, os.SEEK_CUR)
    length = file.seek(0, os.SEEK_END)
    for key in keys:
        kind, count, begin = places[str(key)] = _storage_place(file, str(key), end, length, claims[str(key)])
        end = begin + count * KINDS[kind].itemsize
    return value


def _storage_place(file: BinaryIO, key: str, begin: int, length: int, claim: tuple[str, int]) -> tuple[str, int, int]:
    """A storage of a stream: kind, count, and the position of its numbers (bytes)."""
    kind, count = claim
    file.seek(begin)
    head = file.read(8)
    if len(head) != 8 or int.from_bytes(head, "little") != count or begin + 8 + count * KINDS[kind].itemsize > length:
        raise refusal(f"storage {quoted(key)}: expected {count} numbers of {kind}, got others or a truncated file")
    return kind, count, begin + 8


# --- both -------------------------------------------------------------------------------------------------------------


def _program(file: BinaryIO, persistent: pickled.Persistent) -> Any:
    return pickled.read(file, CALLS, INERT, persistent)


def _storage(id_: Any) -> tuple[str, str, int]:
    """('storage', type, key, device, count) and, in a stream, whether it is a view of another → kind, key, count."""
    if type(id_) is not tuple or len(id_) < 5 or id_[0] != "storage" or any(part is not None for part in id_[5:]):
        raise refusal("pickle: expected ('storage', type, key, device, count) as a persistent id, got something else")
    _, name, key, _, count = id_[:5]
    if not isinstance(name, Name) or name not in STORAGES:
        raise refusal(f"storage: expected numbers of up to 8 bytes, got {quoted(str(name))}")
    if not isinstance(key, str) or not _KEY.fullmatch(key) or type(count) is not int or not 0 <= count < 2**40:
        raise refusal(f"storage: expected a number as its key and a count, got {quoted(key)} and {quoted(count)}")
    return STORAGES[name], key, count


def _no_persistent(persistent_id: Any) -> Any:
    raise refusal("pickle: expected no persistent id here, got one")
