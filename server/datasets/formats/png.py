"""Writes PNG files whose bytes depend on the pixels alone.

A dataset is identified by its files' digests, and a compressor's output changes with its version. So nothing is
compressed: the zlib stream contains stored blocks (RFC 1951, 3.2.4).
"""

from __future__ import annotations

import struct
import zlib
from typing import Final

import numpy as np
import numpy.typing as npt

_BLOCK: Final = 0xFFFF  # bytes in a stored block
_COLOUR_TYPES: Final = {1: 0, 3: 2}  # channels to grey, RGB


def png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """A PNG file of uint8 [h, w, 1] (grey) or [h, w, 3] (RGB)."""
    height, width, channels = pixels.shape
    lines = np.zeros((height, 1 + width * channels), np.uint8)  # every line begins with its filter: 0, none
    lines[:, 1:] = pixels.reshape(height, width * channels)
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOUR_TYPES[channels], 0, 0, 0)
    body = _chunk(b"IHDR", header) + _chunk(b"IDAT", _stored(lines.tobytes())) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def _chunk(kind: bytes, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", zlib.crc32(kind + payload))


def _stored(data: bytes) -> bytes:
    parts = [b"\x78\x01"]
    for start in range(0, len(data), _BLOCK):
        block = data[start : start + _BLOCK]
        last = start + _BLOCK >= len(data)
        parts += [struct.pack("<BHH", last, len(block), len(block) ^ 0xFFFF), block]
    return b"".join([*parts, struct.pack(">I", zlib.adler32(data))])
