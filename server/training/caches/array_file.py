"""The file of one cached array: a header, the raw values, and a checksum that also covers the key.

    magic "LRA1" · crc32 · dtype · number of axes · up to four sides        32 bytes, little-endian, then the values

A file that was truncated, overwritten, zeroed by a power cut or renamed to another key is detected as damaged. Large
arrays are mapped copy-on-write instead of read, so that the kernel can reclaim their memory.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
import zlib
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

MAGIC: Final = b"LRA1"
DTYPES: Final = ("|u1", "<u2", "<f2", "<f4")  # bfloat16 travels as its bits, in <u2
MAX_AXES: Final = 4
MAPPED_FROM: Final = 4 * 2**20  # bytes; below it reading is cheaper than page faults

_HEAD: Final = struct.Struct("<4sIII4I")  # magic, crc32, dtype, axes, sides
_SIGNED: Final = struct.Struct("<II4I")  # the header after the checksum, which covers it


class DamagedError(ValueError):
    """The file holds no array of this key."""


def size_of(array: Array) -> int:
    """Bytes of the array's file."""
    return _HEAD.size + array.nbytes


def write(path: Path, key: str, array: Array) -> None:
    """Write an array of uint8, uint16, float16 or float32 with one to four axes. Overwrites the file at `path`."""
    if array.dtype.str not in DTYPES or not 1 <= array.ndim <= MAX_AXES:
        raise TypeError(f"expected {DTYPES} of 1 to {MAX_AXES} axes, got {array.dtype.str} of {array.ndim}")
    values = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    sides = array.shape + (1,) * (MAX_AXES - array.ndim)
    header = _SIGNED.pack(DTYPES.index(array.dtype.str), array.ndim, *sides)
    with open(path, "wb") as file:
        file.write(MAGIC + struct.pack("<I", _checksum(key, header, values)) + header)
        file.write(values)


def read(path: Path, key: str) -> Array:
    """The array, writable without changing the file. Raises FileNotFoundError and other OSErrors, DamagedError."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size >= MAPPED_FROM:
            content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        else:
            content = memoryview(bytearray(size))
            content = content[: file.readinto(content)]
    return _parsed(content, key)


def _parsed(content: memoryview, key: str) -> Array:
    head, values = content[: _HEAD.size], content[_HEAD.size :]
    if len(head) < _HEAD.size:
        raise DamagedError(f"{len(head)} bytes")
    magic, crc, dtype, axes, *sides = _HEAD.unpack(head)
    if magic != MAGIC or crc != _checksum(key, head[8:], values):
        raise DamagedError("wrong checksum")
    shape = tuple(sides[:axes])
    if dtype >= len(DTYPES) or math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize != len(values):
        raise DamagedError("wrong size")  # the checksum is right: written by another version of this program
    return np.frombuffer(values, DTYPES[dtype]).reshape(shape)


def _checksum(key: str, header: bytes | memoryview, values: memoryview) -> int:
    return zlib.crc32(values, zlib.crc32(header, zlib.crc32(key.encode())))
