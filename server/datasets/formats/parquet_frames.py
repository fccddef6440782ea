"""What the parquet reader says to its server: kind, JSON, picture.

Kinds: `p` a picture and its label, or the reason why it has none; `n` a row without a picture; `e` the end, with the
error if there is one. A reader that ends without `e` has met a file that broke it.
"""

from __future__ import annotations

import json
import struct
from typing import IO, Any, Final

from .parquet_pages import MAX_PAGE_BYTES

MAX_TOLD_BYTES: Final = 64 * 1024

_HEAD: Final = struct.Struct(">cII")  # kind, bytes of JSON, bytes of picture

Frame = tuple[bytes, dict[str, Any], bytes]


def write_frame(out: IO[bytes], kind: bytes, told: dict[str, Any], data: bytes = b"") -> None:
    text = json.dumps(told).encode()
    out.write(_HEAD.pack(kind, len(text), len(data)) + text)
    out.write(data)


def read_frame(stream: IO[bytes]) -> Frame | None:
    """None when the stream has ended, or says what no reader would."""
    head = stream.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    kind, told, picture = _HEAD.unpack(head)
    if told > MAX_TOLD_BYTES or picture > MAX_PAGE_BYTES:
        return None
    text, data = stream.read(told), stream.read(picture)
    return (kind, json.loads(text), data) if len(text) + len(data) == told + picture else None
