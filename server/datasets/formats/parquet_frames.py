"""The wire format between the parquet reader and the server: kind, JSON message, picture.

Kinds: `p` a picture and its label, or the reason why it has none; `n` a row without a picture; `t` a row of a table of
labels; `e` the end, with the error if there is one. A reader that ends without `e` was broken by the file.
"""

from __future__ import annotations

import json
import struct
from typing import IO, Any, Final

from .parquet_pages import MAX_PAGE_BYTES

MAX_MESSAGE_BYTES: Final = 64 * 1024

_HEAD: Final = struct.Struct(">cII")  # kind, bytes of JSON, bytes of picture

Frame = tuple[bytes, dict[str, Any], bytes]


def write_frame(out: IO[bytes], kind: bytes, message: dict[str, Any], data: bytes = b"") -> None:
    text = json.dumps(message).encode()
    out.write(_HEAD.pack(kind, len(text), len(data)) + text)
    out.write(data)


def read_frame(stream: IO[bytes]) -> Frame | None:
    """The next frame; None when the stream has ended, or is not of this format."""
    head = stream.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    kind, message_bytes, picture_bytes = _HEAD.unpack(head)
    if message_bytes > MAX_MESSAGE_BYTES or picture_bytes > MAX_PAGE_BYTES:
        return None
    text, data = stream.read(message_bytes), stream.read(picture_bytes)
    return (kind, json.loads(text), data) if len(text) + len(data) == message_bytes + picture_bytes else None
